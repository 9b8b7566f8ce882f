"""Who is prepared when: texts and pictures wait in lanes of their own, first come first served, within bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from nvlm_deploy.errors import MachineError


class Lanes:
    """Runs jobs on threads. A text never stands behind a picture, and one picture's work leaves room for another's."""

    def __init__(self, *, threads: int, max_jobs: int, max_bytes: int) -> None:
        """Each lane has `threads`; at most `max_jobs` of `max_bytes` in all are held at once."""
        self.max_jobs, self.max_bytes = max_jobs, max_bytes
        self._texts = ThreadPoolExecutor(threads, thread_name_prefix="texts")
        self._pictures = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        self._held = self._held_bytes = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of what waits and end the threads."""
        for pool in (self._texts, self._pictures):
            pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, job: Callable[[], None], *, has_pictures: bool, size_bytes: int) -> None:
        """Queue a job, which must not raise. Raises MachineError at once when as much is held as may be."""
        with self._lock:
            if self._held >= self.max_jobs:
                raise MachineError(f"{self.max_jobs} requests wait already", hint="try again later")
            if self._held and self._held_bytes + size_bytes > self.max_bytes:
                raise MachineError(f"requests of {self.max_bytes:,} bytes wait already", hint="try again later")
            self._held += 1
            self._held_bytes += size_bytes
        lane = self._pictures if has_pictures else self._texts
        lane.submit(self._run, job, size_bytes)

    def _run(self, job: Callable[[], None], size_bytes: int) -> None:
        try:
            job()
        finally:
            with self._lock:
                self._held -= 1
                self._held_bytes -= size_bytes
