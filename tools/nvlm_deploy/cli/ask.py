"""`nvlm ask`: one question to a running server, its answer streamed to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from nvlm_deploy.cli.control_characters import for_output
from nvlm_deploy.cli.options import JsonOption

if TYPE_CHECKING:
    from nvlm_deploy.client import Answer, AnswerStream, Generation, NvlmClient

LONGEST_START_S = 300


def register(app: typer.Typer) -> None:
    app.command(name="ask", cls=_AskCommand)(ask)


class _AskCommand(TyperCommand):
    """Lets `--wait` stand alone: the word after it is its value only if that is a number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_seconds(args))


def with_seconds(arguments: Sequence[str]) -> list[str]:
    """The command line with `--wait=300` for every `--wait` that no number follows; nothing after `--` is changed."""
    options = list(arguments[: arguments.index("--")]) if "--" in arguments else list(arguments)
    for place, word in enumerate(options):
        if word == "--wait" and not (place + 1 < len(options) and _is_number(options[place + 1])):
            options[place] = f"--wait={LONGEST_START_S}"
    return options + list(arguments[len(options) :])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def ask(
    question: Annotated[str, typer.Argument(help="The question; `<image>` marks where an image goes.")],
    image: Annotated[list[str] | None, typer.Option(help="A JPEG, PNG or WebP file; repeat for several.")] = None,
    url: Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC service.")] = "localhost:8001",
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="[SECONDS]",
            help=f"First wait until the server is ready, at most so long; without a number {LONGEST_START_S}.",
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Shortest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Draw with this temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens; 1 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest of this total probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repetition less likely.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Above 0 makes any token used before rarer.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="As that, more so the more often it came.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End after this text; repeat for several.")] = None,
    bad_word: Annotated[list[str] | None, typer.Option(help="Never write this text; repeat for several.")] = None,
    timeout: Annotated[float, typer.Option(help="Longest wait for the whole answer, in seconds.")] = 300.0,
    json_output: JsonOption = False,
) -> None:
    """Ask a running server and stream the answer. Greedy unless --temperature, --top-k or --top-p is given.

    On a terminal, control characters of the answer are shown as escapes (`\\x1b`), not obeyed. A pipe or file gets the
    answer as it is.

    Exit code 2 for what cannot be asked or the server refuses, 3 when no server answers, it fails, or it takes too
    long. What had come of the answer stays on stdout; with --json it is the error's `partial`.
    """
    from nvlm_deploy.client import Generation, NvlmClient
    from nvlm_deploy.client.values import seconds

    generation = Generation(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_words=stop or (),
        bad_words=bad_word or (),
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
    )
    with NvlmClient(url, timeout_s=seconds("--timeout", timeout)) as client:
        if wait is not None:
            client.request(question, image or [], generation)  # what cannot be asked is said before, not after
            _wait(client, seconds("--wait", wait))
        _ask(client, question, image or [], generation, json_output=json_output)


def _wait(client: NvlmClient, timeout_s: float) -> None:
    print(f"waiting up to {timeout_s:g} s for the server at {client.url}", file=sys.stderr)
    client.wait_until_ready(timeout_s)


def _ask(
    client: NvlmClient, question: str, images: Sequence[str], generation: Generation, *, json_output: bool
) -> None:
    from nvlm_deploy.client import AnswerCancelled

    stream = client.ask(question, images, generation)
    try:
        _print_json(stream.answer()) if json_output else _print_pieces(stream)
    except KeyboardInterrupt:
        stopped = AnswerCancelled("interrupted")
        stopped.partial = stream.text
        raise stopped from None
    finally:
        stream.cancel()


def _print_pieces(stream: AnswerStream) -> None:
    """The last line ends, also when the answer breaks off in it."""
    try:
        for piece in stream:
            print(for_output(piece), end="", flush=True)
    except BaseException:
        if stream.text:
            print(flush=True)
        raise
    print()


def _print_json(answer: Answer) -> None:
    document = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "num_input_tokens": answer.num_input_tokens,
        "num_output_tokens": answer.num_output_tokens,
        "time_to_first_token_s": answer.time_to_first_token_s,
        "time_per_token_s": answer.time_per_token_s,
        "end_to_end_s": answer.end_to_end_s,
    }
    print(json.dumps(document))
