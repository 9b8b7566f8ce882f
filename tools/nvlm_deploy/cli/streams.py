"""stdout and stderr that outlive their reader: `nvlm ... | head` ends with the verb's own exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _OpenEnded:
    """A stream; what is written after its reader went away is lost, and nobody is told."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._reader_may_go():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader_may_go():
            self._stream.flush()

    @contextlib.contextmanager
    def _reader_may_go(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            self._discard()
            if not isinstance(problem, BrokenPipeError):  # a full disk is an error, but only once
                raise

    def _discard(self) -> None:
        """Into nothing with what the buffer still holds, too: or the interpreter complains of it when it ends."""
        with contextlib.suppress(io.UnsupportedOperation):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def open_ended_output() -> Iterator[None]:
    """While it lasts, neither a closed pipe nor a name that the terminal's encoding lacks is an error."""
    before = sys.stdout, sys.stderr
    streams = [_OpenEnded(stream) for stream in before if stream is not None]
    for stream in streams:
        if isinstance(stream._stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if len(streams) == len(before):
        sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        for stream in streams:
            with contextlib.suppress(OSError):  # the verb's own last flush has said so
                stream.flush()
        sys.stdout, sys.stderr = before
