"""How long work says how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as the work goes on: what is done, and how many bytes of how many."""

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None: ...


def silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """Nobody listens."""
