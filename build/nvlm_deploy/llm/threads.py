"""torch's own threads, out of the way of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread_each() -> Iterator[None]:
    """Threads that are started inside run torch's operations by themselves, not each on all cores.

    Two that both wait for the other's share of the cores were seen to be thirty times slower than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
