"""Every way to fail has one sentence, one exit code and, with --json, one document; never a bare traceback."""

from __future__ import annotations

import json

import pytest

from nvlm_deploy.cli import main
from nvlm_deploy.cli.main import run


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
        (BrokenPipeError(), 0, ""),
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
    monkeypatch.setattr(main.sys, "stdout", main.sys.stdout)  # a broken pipe closes it
    assert main._exit_code(["inspect", "x"]) == code
    assert word in capsys.readouterr().err
