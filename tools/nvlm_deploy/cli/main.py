"""The `nvlm` command: one verb per file, errors to exit codes here. Starts without torch, onnx or tritonclient."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback

import typer
from rich.console import Console

from nvlm_deploy.cli import artifacts, ask, build, demo, doctor, inspect, plan, profiles, serve, validate, verify
from nvlm_deploy.cli.control_characters import visible
from nvlm_deploy.cli.interruption import INTERRUPTED, Ending, Interruption
from nvlm_deploy.cli.lines import wrapped
from nvlm_deploy.cli.misuse import misuse
from nvlm_deploy.cli.os_errors import machine_error
from nvlm_deploy.cli.streams import open_ended_output
from nvlm_deploy.cli.verbs import Verbs
from nvlm_deploy.errors import MachineError, NvlmError

# markdown would take `<image>` for a tag and drop it, rich's own marks would take `[name]`: helps are plain text
app = typer.Typer(
    cls=Verbs,
    help="NVLM-D-72B to a Triton Inference Server ensemble: build, serve, ask, measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (inspect, profiles, plan, build, artifacts, verify, serve, ask, validate, doctor, demo):
    verb.register(app)


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
    interruption = Interruption()
    interruption.listen()
    with open_ended_output():
        code = _exit_code(arguments, interruption)
    sys.exit(code)


def _exit_code(arguments: list[str], interruption: Interruption | None = None) -> int:
    as_json = "--json" in arguments
    try:
        code = app(arguments, prog_name="nvlm", standalone_mode=False)
        print(end="", flush=True)
        if code == INTERRUPTED:  # typer's own way to say that Ctrl-C was pressed
            raise KeyboardInterrupt
    except NvlmError as problem:
        return _failed(problem, as_json=as_json)
    except typer.TyperException as problem:  # an option or argument that is missing, unknown or out of range
        return _failed(misuse(problem, arguments), as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _ended((interruption or Interruption()).ending(arguments), as_json=as_json)
    except SystemExit:  # what typer makes of any closed pipe; that of our output is none (streams.py)
        return _failed(MachineError("the other end of a pipe or connection was closed"), as_json=as_json)
    except OSError as problem:
        return _failed(machine_error(problem), as_json=as_json)
    except Exception as problem:
        traceback.print_exc()
        bug = MachineError(f"{type(problem).__name__}: {problem}", hint="this is a bug of nvlm: report the lines above")
        return _failed(bug, as_json=as_json)
    return code if isinstance(code, int) else 0


def _ended(ending: Ending, *, as_json: bool) -> int:
    """Its words on stderr; with --json an interruption is a failure, so there is a document."""
    with contextlib.suppress(OSError):
        print(ending.words, file=sys.stderr)
    if as_json and ending.exit_code:
        _print_error(NvlmError(ending.words), ending.exit_code)
    return ending.exit_code


def _failed(problem: NvlmError, *, as_json: bool) -> int:
    """The error for people on stderr; with --json also as the one document on stdout."""
    with contextlib.suppress(OSError):  # a full disk behind the output: nobody to tell
        _show(problem)
    if as_json:
        _print_error(problem, problem.exit_code)
    return problem.exit_code


def _print_error(problem: NvlmError, exit_code: int) -> None:
    error = {"message": problem.message, "hint": problem.hint, "exit_code": exit_code}
    so_far = {"partial": problem.partial} if problem.partial else {}
    with contextlib.suppress(OSError):
        print(json.dumps({**problem.details, "error": error | so_far}), flush=True)


def _show(problem: NvlmError) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    if problem.exit_code == INTERRUPTED:  # was wanted, and is no error
        print(problem.message, file=sys.stderr)
        return
    console.print("error:", style="bold red", end=" ")
    console.print(wrapped(visible(problem.message), first=7, rest=2), markup=False)
    if problem.hint:
        console.print(f"  hint: {wrapped(visible(problem.hint), first=8, rest=8)}", markup=False)
