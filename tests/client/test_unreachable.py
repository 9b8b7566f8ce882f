"""Nobody there, or nobody who answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from nvlm_deploy.client import AsyncNvlmClient, NvlmClient
from nvlm_deploy.errors import MachineError, NvlmError


@pytest.fixture
def closed_port() -> Iterator[str]:
    """A port that is taken but not listened on, so that nobody else can come to listen there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent_port() -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_an_unreachable_server_is_named(closed_port: str) -> None:
    with NvlmClient(closed_port) as client, pytest.raises(MachineError, match=f"no server answers at {closed_port}"):
        client.ask("hello").answer()


def test_an_unreachable_server_is_named_by_the_async_client_too(closed_port: str) -> None:
    async def ask() -> None:
        async with AsyncNvlmClient(closed_port) as client:
            await client.ask("hello").answer()

    with pytest.raises(MachineError, match=f"no server answers at {closed_port}"):
        asyncio.run(ask())


def test_a_server_that_never_answers_is_given_up(silent_port: str) -> None:
    with NvlmClient(silent_port, timeout_s=0.2) as client, pytest.raises(MachineError, match=silent_port):
        client.ask("hello").answer()


def test_a_missing_image_fails_before_anything_is_sent(closed_port: str, tmp_path) -> None:
    with NvlmClient(closed_port) as client, pytest.raises(NvlmError, match="does not exist"):
        client.ask("hello", [tmp_path / "none.png"])


def test_a_cancelled_question_does_not_wait(silent_port: str) -> None:
    with NvlmClient(silent_port) as client:
        stream = client.ask("hello")
        stream.cancel()
        with contextlib.suppress(MachineError):
            stream.answer()
