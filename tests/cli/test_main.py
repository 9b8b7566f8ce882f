"""Every way to fail has one sentence, one exit code and, with --json, one document; never a bare traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_deploy.cli import main
from nvlm_deploy.cli.interruption import Interruption
from nvlm_deploy.cli.lines import wrapped
from nvlm_deploy.cli.main import run
from nvlm_deploy.errors import NvlmError, RejectedError


def exit_code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        run(list(arguments))
    return int(exit_.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["inspect"], "Missing argument"),
        (["inspect", "x", "--bogus"], "No such option"),
        (["ask", "hi", "--max-tokens", "x"], "x"),
        (["serve", "x", "--grpc-port", "0"], "grpc-port"),
        (["demo", "--questions", "0"], "questions"),
        (["validate", "accuracy"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misused_command_is_wrong_input(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(*arguments, "--json") == 2
    shown = capsys.readouterr()
    assert word in json.loads(shown.out)["error"]["message"]
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["plan", "--images", "x"], "'--images'", "`nvlm plan --help`"),
        (["serve", "x", "--grpc-port=0"], "given: '0'", "`nvlm serve --help`"),
        (["plan", "--images", "two"], "given: 'two'", "`nvlm plan --help`"),
        (["validate", "numerics", "x", "--tiles", "0"], "given: '0'", "`nvlm validate numerics --help`"),
        (["validate", "bogus"], "No such command 'bogus'", "`nvlm validate --help`"),
        (["build", "x", "--bogus"], "No such option: --bogus", "`nvlm build --help`"),
        (["bogus"], "No such command 'bogus'", "`nvlm --help`"),
        (["ask"], "Missing argument 'question'", "`nvlm ask --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misuse_repeats_the_value_and_names_the_help_of_its_verb(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(*arguments, "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert message in error["message"]
    assert error["hint"] == hint


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of() == 2
    shown = capsys.readouterr()
    assert "inspect" in shown.out
    assert "error" not in shown.err


@pytest.mark.parametrize(
    ("problem", "code", "word"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "secret"), 3, "secret: Permission denied"),
        (BrokenPipeError(32, "Broken pipe"), 3, "Broken pipe"),  # a server's, not that of our output
        (SystemExit(1), 3, "closed"),
        (ZeroDivisionError("x"), 3, "this is a bug of nvlm"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_verb_raises_becomes_an_exit_code(
    problem: BaseException, code: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(main, "app", fail)
    assert main._exit_code(["inspect", "x"], Interruption()) == code
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "x"], "interrupted; run it again to resume\n"),
        (["-v", "calibrate-llm", "x"], "interrupted; run it again to resume\n"),
        (["demo"], "interrupted; run it again to resume\n"),
        (["serve", "x"], "interrupted\n"),
        (["ask", "x"], "interrupted\n"),
        (["doctor"], "interrupted\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_only_what_can_be_resumed_says_so(arguments, said, monkeypatch, capsys) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", interrupt)
    assert main._exit_code(arguments) == 130
    assert capsys.readouterr().err == said
    assert main._exit_code([*arguments, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"] == {"message": said.strip(), "hint": None, "exit_code": 130}


NVLM = [sys.executable, "-c", "from nvlm_deploy.cli.main import run; run()"]


def ended_with(arguments: list[str], *, lines: int, cwd: Path, both: bool = False) -> tuple[int, bytes]:
    """The exit code of `nvlm ARGUMENTS | head -n LINES`, and what it said on stderr."""
    sink = subprocess.STDOUT if both else subprocess.PIPE
    with subprocess.Popen([*NVLM, *arguments], stdout=subprocess.PIPE, stderr=sink, cwd=cwd) as child:
        assert child.stdout is not None
        for _ in range(lines):
            child.stdout.readline()
        child.stdout.close()
        said = child.stderr.read() if child.stderr else b""
        return child.wait(), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "lines", "code"),
    [
        (["doctor", "--profile", "h100-sxm-80gb-throughput"], 2, 1),
        (["doctor", "--profile", "h100-sxm-80gb-throughput", "--json"], 0, 1),
        (["plan", "--spec", "nvlm-d-72b", "-p", "h100-sxm-80gb-throughput"], 2, 0),
        (["plan", "--spec", "nvlm-d-72b", "--ttft-ms", "0.001"], 0, 1),
        (["profiles"], 1, 0),
        (["--help"], 0, 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_pipe_that_is_closed_early_keeps_the_verdict(arguments, lines, code, tmp_path) -> None:
    found, said = ended_with(arguments, lines=lines, cwd=tmp_path)
    assert found == code
    assert b"Broken" not in said
    assert b"Exception" not in said


def test_a_pipe_for_both_outputs_that_is_closed_early_keeps_the_verdict(tmp_path) -> None:
    assert ended_with(["verify", "no-such-folder"], lines=0, cwd=tmp_path, both=True)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["doctor"], 3, b"No space left on device"),
        (["profiles", "--json"], 3, b"No space left on device"),
        (["verify", "no-such-folder", "--json"], 2, b"no folder"),
    ],
)
def test_a_full_disk_behind_stdout_is_the_machines_fault(arguments, code, words, tmp_path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*NVLM, *arguments], stdout=full, stderr=subprocess.PIPE, cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii"}
    command = [*NVLM, "verify", b"caf\xc3\xa9 \xff"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert b"no folder caf" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_errors_are_as_wide_as_the_terminal_and_80_at_most(columns, monkeypatch, capsys) -> None:
    def fail(*_: object, **__: object) -> None:
        command = "`docker run --gpus all --shm-size=1g a-container`"
        raise RejectedError("some words " * 20 + "\n  a line of its own", hint=f"{'more words ' * 9}{command} " * 2)

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(main, "app", fail)
    assert main._exit_code(["inspect"], Interruption()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: some words ")
    assert "    a line of its own" in lines
    assert sum("`docker run --gpus all --shm-size=1g a-container`" in line for line in lines) == 2
    wide = [line for line in lines if len(line) > min(columns, 80)]
    assert all(line.strip() == "`docker run --gpus all --shm-size=1g a-container`" for line in wide)
    assert columns == 40 or not wide


def test_warnings_are_lines_like_errors_and_information_comes_when_asked_for(tmp_path) -> None:
    program = """import logging, sys
from nvlm_deploy.cli import main
def verb():
    logging.getLogger("nvlm_deploy").warning("%s is " + "much " * 30, "/a/" + "very-" * 20 + "long-path")
    logging.getLogger("nvlm_deploy").info("done")
main.app.command(name="speak")(verb)
main.run()"""
    for verbose in ([], ["-v"]):
        command = [sys.executable, "-c", program, *verbose, "speak"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0
        assert done.stderr.startswith("warning:")
        assert "/a/" + "very-" * 20 + "long-path" in done.stderr
        assert ("info: done" in done.stderr) is bool(verbose)


def test_a_path_or_an_option_that_is_longer_than_a_line_is_not_cut(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/very-long/path-with/many-hyphens-and/no/end/that/would/fit/in/forty"
    assert path in wrapped(f"no folder {path} here", first=7, rest=2).splitlines()[1]
    assert wrapped("", first=7, rest=2) == ""
    assert wrapped("word", first=7, rest=2) == "word"


@pytest.mark.parametrize("columns", ["1", "0", "-5", "wide", ""])
def test_a_senseless_width_is_survived(columns, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert max(map(len, wrapped("word " * 50, first=9, rest=9).splitlines())) <= 80


def test_marks_in_a_message_are_shown_as_they_are(monkeypatch, capsys) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NvlmError("[red]x[/red] :cat: `y")

    monkeypatch.setattr(main, "app", fail)
    main._exit_code([], Interruption())
    assert capsys.readouterr().err == "error: [red]x[/red] :cat: `y\n"


def test_the_document_comes_though_nobody_can_be_told_the_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*NVLM, "verify", "/nonexistent", "--json"], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert done.returncode == 2
    assert "no folder /nonexistent" in json.loads(done.stdout)["error"]["message"]
