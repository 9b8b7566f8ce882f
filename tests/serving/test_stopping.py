"""One process tells another which request is to stop; real sockets."""

from __future__ import annotations

import os
import queue
import socket
from collections.abc import Iterator

import pytest

from nvlm_deploy.serving import stopping
from nvlm_deploy.serving.stopping import StopReceiver, StopSender


@pytest.fixture
def keys(monkeypatch) -> Iterator[queue.Queue[int]]:
    name = f"\0nvlm-stop-test-{os.getpid()}"
    monkeypatch.setattr(stopping, "address", lambda: name)
    found: queue.Queue[int] = queue.Queue()
    receiver = StopReceiver(found.put)
    yield found
    receiver.close()


def test_each_key_arrives_as_it_was_sent(keys) -> None:
    sender = StopSender()
    for key in (0, 7, 2**64 - 1):
        sender.send(key)
        assert keys.get(timeout=10) == key
    sender.close()


def test_what_is_no_key_is_passed_over(keys) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        for message in (b"", b"x", b"x" * 9):
            other.sendto(message, stopping.address())
    sender = StopSender()
    sender.send(5)
    assert keys.get(timeout=10) == 5
    sender.close()


def test_without_a_receiver_nothing_is_raised(monkeypatch) -> None:
    monkeypatch.setattr(stopping, "address", lambda: f"\0nvlm-stop-nobody-{os.getpid()}")
    sender = StopSender()
    sender.send(1)
    sender.close()


def test_the_name_is_the_servers_own() -> None:
    assert stopping.address().startswith("\0nvlm-stop-pid:[")
    assert stopping.address().endswith(f"-{os.getppid()}")
