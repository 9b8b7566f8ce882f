"""How one model's process tells another's that a request is to stop: datagrams between children of one tritonserver.

Triton has no such way: a model may call another one (BLS), but then by a request id that a client chose.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

_KEY = struct.Struct("<Q")


def address() -> str:
    """Return the abstract socket's name: the processes of all models are children of one server.

    Containers may share the network's names and count their processes alike, so the name holds the process namespace.
    """
    return f"\0nvlm-stop-{Path('/proc/self/ns/pid').readlink()}-{os.getppid()}"


class StopSender:
    """Sends keys of requests to the process that runs them."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, key: int) -> None:
        """Send a key. A full or missing receiver is passed over: the next piece of the request sends it again."""
        with contextlib.suppress(BlockingIOError, ConnectionError, FileNotFoundError):
            self._socket.sendto(_KEY.pack(key), address())

    def close(self) -> None:
        self._socket.close()


class StopReceiver:
    """Hands each key that comes to `stop`, on a thread of its own."""

    def __init__(self, stop: Callable[[int], None]) -> None:
        self._stop = stop
        self._is_closing = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address())
        self._thread = threading.Thread(target=self._receive, name="stop receiver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._is_closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self._thread.join(timeout=1)
        self._socket.close()

    def _receive(self) -> None:
        while not self._is_closing:
            message = self._socket.recv(_KEY.size + 1)
            if len(message) == _KEY.size:
                self._stop(_KEY.unpack(message)[0])
