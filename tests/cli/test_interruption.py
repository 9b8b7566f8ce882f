"""Ctrl-C and a polite kill end every verb with one line and the right exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nvlm_deploy.cli import main
from nvlm_deploy.cli.interruption import Ending, Interruption
from nvlm_deploy.steps.order import STEPS
from nvlm_deploy.triton.server import Ports

NVLM = [sys.executable, "-c", "from nvlm_deploy.cli.main import run; run()"]
BUILD_LIKE = ["build", "demo", *STEPS]
OTHERS = ["artifacts", "ask", "doctor", "inspect", "plan", "profiles", "serve", "sign", "validate", "verify"]


def test_every_verb_is_in_one_of_the_lists() -> None:
    import typer

    from nvlm_deploy.cli.main import app

    assert sorted(typer.main.get_command(app).commands) == sorted([*BUILD_LIKE, *OTHERS])  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", BUILD_LIKE)
def test_what_can_be_resumed_says_so(verb: str) -> None:
    assert Interruption().ending(["--verbose", verb, "x"]) == Ending("interrupted; run it again to resume", 130)


@pytest.mark.parametrize("verb", OTHERS)
def test_what_cannot_be_resumed_does_not_say_so(verb: str) -> None:
    assert Interruption().ending([verb, "build"]) == Ending("interrupted", 130)


@pytest.mark.parametrize(("verb", "words"), [("ask", "interrupted"), ("build", "interrupted; run it again to resume")])
def test_an_interruption_is_one_document_too(
    verb: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", interrupted)
    assert main._exit_code([verb, "x", "--json"], Interruption()) == 130
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"] == {"message": words, "hint": None, "exit_code": 130}
    assert shown.err == f"{words}\n"


def started(arguments: list[str], *, until: str) -> subprocess.Popen[str]:
    """A command that has said `until` in a line of its output or its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    child = subprocess.Popen([*NVLM, *arguments], stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)
    assert child.stdout is not None
    for line in child.stdout:
        if until in line:
            return child
    raise AssertionError(f"ended with {child.wait()} before it said {until}")


def ended(child: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """The exit code after a signal, and the last line."""
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)
    return child.returncode, output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, 0, "stopped"),
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGHUP, 130, "interrupted"),
    ],
)
def test_a_running_server_stops_and_says_how(
    number: signal.Signals, code: int, words: str, built_repository: Path
) -> None:
    ports = Ports.free()
    options = ["--grpc-port", ports.grpc, "--http-port", ports.http, "--metrics-port", ports.metrics]
    child = started(["serve", str(built_repository), *map(str, options)], until="ready")
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) == 6
    assert ended(child, number) == (code, words)
    assert not [process for process in family if process.is_running()]


@pytest.mark.slow
def test_a_server_that_still_loads_stops_as_well(built_repository: Path) -> None:
    ports = Ports.free()
    options = ["--grpc-port", ports.grpc, "--http-port", ports.http, "--metrics-port", ports.metrics]
    child = subprocess.Popen(
        [*NVLM, "serve", str(built_repository), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not psutil.Process(child.pid).children():
        assert child.poll() is None
        time.sleep(0.02)
    assert ended(child, signal.SIGTERM) == (0, "stopped")


@pytest.mark.slow
def test_what_a_killed_server_left_is_cleared_by_the_next(
    built_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ports = Ports.free()
    options = ["--grpc-port", ports.grpc, "--http-port", ports.http, "--metrics-port", ports.metrics]
    first = started(["serve", str(built_repository), *map(str, options)], until="ready")
    family = psutil.Process(first.pid).children(recursive=True)
    (left,) = tmp_path.glob("nvlm-*")
    first.kill()
    first.wait()
    psutil.wait_procs(family, timeout=60)
    assert left.is_dir()
    second = started(["serve", str(built_repository), *map(str, options)], until="ready")
    (fresh,) = tmp_path.glob("nvlm-*")
    assert fresh != left
    assert ended(second, signal.SIGTERM) == (0, "stopped")
    assert [*tmp_path.glob("nvlm-*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_build_says_how_to_go_on_and_goes_on(
    number: signal.Signals, tiny_folder: Path, tmp_path: Path
) -> None:
    calibration = Path(__file__).parents[1] / "models" / "calibration"
    arguments = ["build", str(tiny_folder), "--calibration", str(calibration), "--workspace", str(tmp_path)]
    child = started(arguments, until="export-vision  built")
    assert ended(child, number) == (130, "interrupted; run it again to resume")
    done = subprocess.run([*NVLM, *arguments, "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    assert '"export-vision", "state": "up to date"' in done.stdout
