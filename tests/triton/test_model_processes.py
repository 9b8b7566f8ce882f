"""Which process of a model has ended, and how: with real processes below a real parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nvlm_deploy.triton.model_processes import ModelProcesses, ending

# a server that starts two stubs, as Triton does, and does not ask how they ended
SERVER = """
import os, subprocess, sys, time
stubs = [
    subprocess.Popen(["triton_python_backend_stub", f"{sys.argv[1]}/{model}/1/model.py"], executable=sys.executable)
    for model in ("first", "second")
]
other = subprocess.Popen(["sleep", "600"])
print(*(stub.pid for stub in stubs), other.pid, flush=True)
if len(sys.argv) > 2:
    for stub in stubs: stub.wait()
time.sleep(600)
"""
MODEL = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
Path(__file__).with_name("up").touch()
time.sleep(600)
"""


class Tree:
    def __init__(self, repository: Path, *more: str) -> None:
        folders = [repository / model / "1" for model in ("first", "second")]
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "model.py").write_text(MODEL)
        command = [sys.executable, "-c", SERVER, str(repository), *more]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.server.stdout is not None
        self.first, self.second, self.other = map(int, self.server.stdout.readline().split())
        while not all((folder / "up").exists() for folder in folders):
            time.sleep(0.02)

    def end(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = Tree(tmp_path)
    yield tree
    tree.end()


def looked_until_one_ends(models: ModelProcesses) -> list[str]:
    deadline = time.monotonic() + 20
    while models.look():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return models.endings


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGKILL, "was killed by signal 9 (SIGKILL, as the kernel does when memory runs out)"),
        (signal.SIGSEGV, "was killed by signal 11 (SIGSEGV)"),
        (signal.SIGTERM, "ended with status 3"),
        (signal.SIGUSR1, "ended with status 0"),
        (signal.SIGRTMIN, f"was killed by signal {int(signal.SIGRTMIN)} (SIGRTMIN)"),
    ],
)
def test_the_model_is_named_and_how_its_process_ended(tree, how, said) -> None:
    models = ModelProcesses(tree.server.pid)
    assert models.look()
    os.kill(tree.second, how)
    assert looked_until_one_ends(models) == [f"the process of model second {said}"]
    assert models.failures == ([] if how == signal.SIGUSR1 else models.endings)
    assert not models.look()
    assert len(models.endings) == 1


def test_a_process_that_its_server_has_asked_for_is_missed_all_the_same(tmp_path) -> None:
    tree = Tree(tmp_path, "wait")
    try:
        models = ModelProcesses(tree.server.pid)
        assert models.look()
        os.kill(tree.first, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(tree.first)] if psutil.pid_exists(tree.first) else [], timeout=20)
        assert looked_until_one_ends(models)[0].startswith("the process of model first ")
    finally:
        tree.end()


def test_other_processes_may_end(tree) -> None:
    models = ModelProcesses(tree.server.pid)
    assert models.look()
    os.kill(tree.other, signal.SIGKILL)
    time.sleep(0.3)
    assert models.look()


def test_a_server_that_is_gone_has_no_processes(tree) -> None:
    models = ModelProcesses(tree.server.pid)
    tree.server.kill()
    tree.server.wait()
    assert models.look()
    assert models.endings == []


@pytest.mark.parametrize(
    ("status", "said"),
    [(0, "ended with status 0"), (7, "ended with status 7"), (-6, "was killed by signal 6 (SIGABRT)"), (None, "ended")],
)
def test_an_exit_code_is_said_in_words(status, said) -> None:
    assert ending(status) == said
    assert "signal 99" in ending(-99)
