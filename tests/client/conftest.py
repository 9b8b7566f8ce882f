"""Both clients, and a server that does what a test asks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from both_clients import BOTH
from fake_triton import FakeTriton, Relay


@pytest.fixture(params=BOTH)
def client_class(request):
    """NvlmClient, then AsyncNvlmClient behind the same methods."""
    return BOTH[request.param]


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        yield server


@pytest.fixture
def client(client_class, triton):
    with client_class(triton.url, timeout_s=30) as client:
        yield client


@pytest.fixture
def relay(triton) -> Iterator[Relay]:
    with Relay(triton.port) as relay:
        yield relay
