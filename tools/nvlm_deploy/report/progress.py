"""Progress of long work, on stderr: a bar with its ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_EVERY_S = 10.0


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields the function to call after each of `total` pieces of work."""
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
    else:
        yield lambda: None
    console.print(f"{what}: {total} in {time.monotonic() - started:.1f} s")


class BytesProgress:
    """A `nvlm_deploy.progress.Progress` on stderr; work that is over in a moment says nothing."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.what = ""
        self.started = self.last_line = 0.0
        self.first_bytes = 0

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if what != self.what or done_bytes < self.first_bytes:
            self.what, self.started, self.last_line, self.first_bytes = what, now, now, done_bytes
        if self.console.is_terminal:
            self._draw(done_bytes, total_bytes)
        elif now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            self.console.print(self._line(now, done_bytes, total_bytes))

    def _line(self, now: float, done_bytes: int, total_bytes: int) -> str:
        """As `vision weights: 5.2 of 24.6 GB, 0.43 GB/s, 45 s left`."""
        rate = (done_bytes - self.first_bytes) / (now - self.started)
        left_s = (total_bytes - done_bytes) / rate if rate else float("inf")
        done, total = done_bytes / 1e9, total_bytes / 1e9
        return f"{self.what}: {done:.1f} of {total:.1f} GB, {rate / 1e9:.2f} GB/s, {left_s:.0f} s left"

    def _draw(self, done_bytes: int, total_bytes: int) -> None:
        if self.bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.bar.add_task(self.what, total=total_bytes)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=done_bytes)
        if done_bytes >= total_bytes:
            self.close()

    def close(self) -> None:
        """Give the terminal back; also after a failure in the middle."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
