"""`nvlm ask`: one question to a running server, its answer streamed to stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_deploy.cli.options import JsonOption

if TYPE_CHECKING:
    from nvlm_deploy.client import Answer, AnswerStream


def register(app: typer.Typer) -> None:
    app.command(name="ask")(ask)


def ask(
    question: Annotated[str, typer.Argument(help="The question; <image> marks where an image goes.")],
    image: Annotated[list[Path] | None, typer.Option(help="A JPEG, PNG or WebP file; repeat for several.")] = None,
    url: Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC service.")] = "localhost:8001",
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Draw with this temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens; 1 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest of this total probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repetition less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End after this text; repeat for several.")] = None,
    timeout: Annotated[float, typer.Option(help="Longest wait for the whole answer, in seconds.")] = 300.0,
    json_output: JsonOption = False,
) -> None:
    """Ask a running server and stream the answer. Greedy unless --temperature, --top-k or --top-p is given."""
    from nvlm_deploy.client import Generation, NvlmClient

    generation = Generation(max_tokens, temperature, top_k, top_p, repetition_penalty, seed, tuple(stop or ()))
    with NvlmClient(url, timeout_s=timeout) as client:
        stream = client.ask(question, image or [], generation)
        try:
            _print_json(stream.answer()) if json_output else _print_pieces(stream)
        finally:
            stream.cancel()


def _print_pieces(stream: AnswerStream) -> None:
    for piece in stream:
        print(piece, end="", flush=True)
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
