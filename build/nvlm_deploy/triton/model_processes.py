"""The processes of a server's models: which one has ended, and how.

Triton neither restarts a python stub that died nor says that it is not ready any more, and its log does not tell what
the stub died of. The kernel does, for as long as Triton has not taken note.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

_STUB = "triton_python_backend_stub"
_STARTERS = ("mpirun", "orterun", "prterun")
# /proc/PID/stat, the last field: the status as `waitpid` gives it (proc(5), field 52)
_EXIT_CODE = -1


def ending(status: int | None) -> str:
    """How a process ended, from its exit code; negative for a signal, None where nobody knows."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        name = "no name"
    why = ", as the kernel does when memory runs out" if -status == signal.SIGKILL else ""
    return f"was killed by signal {-status} ({name}{why})"


class ModelProcesses:
    """Watches the processes below a server; what was seen once is missed when it is gone."""

    def __init__(self, server: int) -> None:
        """`server` is the process id of tritonserver, or of the mpirun that starts several."""
        self._server = server
        self._names: dict[int, str] = {}
        self._endings: dict[int, int | None] = {}

    @property
    def endings(self) -> list[str]:
        """A sentence for each process that was seen to have ended."""
        return [f"the process of {self._names[one]} {ending(status)}" for one, status in self._endings.items()]

    @property
    def failures(self) -> list[str]:
        """As `endings`, of those that a signal or a fault of their own has ended, not the server that stops them."""
        return [said for said, status in zip(self.endings, self._endings.values(), strict=True) if status]

    def look(self) -> bool:
        """Take note of all that run and of those that have ended since; whether none has."""
        import psutil

        running = set()
        try:
            top = psutil.Process(self._server)
            has_ranks = top.name() in _STARTERS
            for child in top.children(recursive=True):
                self._note(child, is_rank=has_ranks and child.ppid() == self._server)
                running.add(child.pid)
        except psutil.Error:  # it ends while it is looked at
            return not self._endings
        for process in self._names.keys() - running - self._endings.keys():
            self._endings[process] = None
        return not self._endings

    def _note(self, child: Any, *, is_rank: bool) -> None:
        import psutil

        if child.pid in self._endings:
            return
        try:
            if child.status() == psutil.STATUS_ZOMBIE:
                if child.pid in self._names:
                    self._endings[child.pid] = _exit_code(child.pid)
            elif name := _model_in(child.cmdline()):
                self._names[child.pid] = f"model {name}"
            elif is_rank:
                self._names[child.pid] = "a rank"
        except psutil.NoSuchProcess:
            return


def _model_in(command: list[str]) -> str | None:
    """The model a stub runs: its first argument is REPOSITORY/MODEL/VERSION/model.py."""
    if len(command) < 2 or Path(command[0]).name != _STUB:
        return None
    return Path(command[1]).parent.parent.name


def _exit_code(process: int) -> int | None:
    """Of a process that has ended and that its parent has not asked for; None where it has, or we may not know."""
    try:
        fields = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()
        return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE]))
    except (OSError, ValueError, IndexError):
        return None
