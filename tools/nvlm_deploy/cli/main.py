"""The `nvlm` command: one verb per file, errors to exit codes here. Starts without torch, onnx or tritonclient."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import traceback
from types import FrameType

import typer
from rich.console import Console

from nvlm_deploy.cli import artifacts, ask, build, demo, doctor, inspect, plan, profiles, serve, validate, verify
from nvlm_deploy.cli.lines import wrapped
from nvlm_deploy.cli.streams import open_ended_output
from nvlm_deploy.errors import MachineError, NvlmError

app = typer.Typer(
    help="NVLM-D-72B to a Triton Inference Server ensemble: build, serve, ask, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for verb in (inspect, profiles, plan, build, artifacts, verify, serve, ask, validate, doctor, demo):
    verb.register(app)

INTERRUPTED = 130


@app.callback()
def _options(verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what is done, to stderr.")) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[_Lines()])


class _Lines(logging.Handler):
    """As errors are shown: a path in one piece, no clock."""

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname.lower()}: {record.getMessage()}"
        print(wrapped(line, first=0, rest=2), file=sys.stderr)


def run(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 the answer is no, 2 wrong input, 3 tool or machine failed, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with open_ended_output():
        code = _exit_code(arguments)
    sys.exit(code)


def _exit_code(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        code = app(arguments, standalone_mode=False)
        print(end="", flush=True)
        if code == INTERRUPTED:  # typer's own way to say that Ctrl-C was pressed
            raise KeyboardInterrupt
    except NvlmError as problem:
        return _failed(problem, as_json=as_json)
    except typer.TyperException as problem:  # an option or argument that is missing, unknown or out of range
        return _misused(problem.format_message(), as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    except SystemExit:  # what typer makes of any closed pipe; that of our output is none (streams.py)
        return _failed(MachineError("the other end of a pipe or connection was closed"), as_json=as_json)
    except OSError as problem:
        place = f"{problem.filename}: " if problem.filename else ""
        return _failed(MachineError(f"{place}{problem.strerror or type(problem).__name__}"), as_json=as_json)
    except Exception as problem:
        traceback.print_exc()
        bug = MachineError(f"{type(problem).__name__}: {problem}", hint="this is a bug of nvlm: report the lines above")
        return _failed(bug, as_json=as_json)
    return code if isinstance(code, int) else 0


def _misused(message: str, *, as_json: bool) -> int:
    """The message is empty when the help was shown instead."""
    wrong = NvlmError(message, hint="`nvlm --help`, `nvlm VERB --help`")
    return _failed(wrong, as_json=as_json) if message else wrong.exit_code


def _failed(problem: NvlmError, *, as_json: bool) -> int:
    """The error for people on stderr; with --json also as the one document on stdout."""
    with contextlib.suppress(OSError):  # a full disk behind the output: nobody to tell
        _show(problem)
    with contextlib.suppress(OSError):
        if as_json:
            error = {"message": problem.message, "hint": problem.hint, "exit_code": problem.exit_code}
            print(json.dumps({"error": error}), flush=True)
    return problem.exit_code


def _show(problem: NvlmError) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    console.print("error:", style="bold red", end=" ")
    console.print(wrapped(problem.message, first=7, rest=2), markup=False)
    if problem.hint:
        console.print(f"  hint: {wrapped(problem.hint, first=8, rest=8)}", markup=False)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """A polite kill ends like Ctrl-C: servers are stopped, temporary folders removed."""
    raise KeyboardInterrupt
