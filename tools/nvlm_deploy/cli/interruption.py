"""How a command ends on Ctrl-C, a closed terminal or a polite kill: what it says, and with which exit code."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

from nvlm_deploy.steps.order import STEPS

INTERRUPTED = 130
# what these have finished is kept
_RESUMABLE = frozenset(("build", "demo", *STEPS))
_SERVE = "serve"


class Ending(NamedTuple):
    """The last line on stderr, and the exit code."""

    words: str
    exit_code: int


class Interruption:
    """Turns signals into KeyboardInterrupt, so that servers are stopped and temporary folders removed."""

    def __init__(self) -> None:
        self._is_polite_kill = False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._raise)

    def ending(self, arguments: Sequence[str]) -> Ending:
        """A server is stopped by SIGTERM in its ordinary course, by systemd as by Kubernetes: that is no failure."""
        verb = next((argument for argument in arguments if not argument.startswith("-")), None)
        if verb == _SERVE and self._is_polite_kill:
            return Ending("stopped", 0)
        if verb in _RESUMABLE:
            return Ending("interrupted; run it again to resume", INTERRUPTED)
        return Ending("interrupted", INTERRUPTED)

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        self._is_polite_kill = number == signal.SIGTERM
        raise KeyboardInterrupt
