"""`make gpu`: what only a GPU can show. Nothing here skips: without a GPU every test fails, naming what is missing."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="`cpu` runs these tests' own logic where there is no GPU")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    import torch

    device: str = request.config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.fail("no GPU that this torch can use: `not run`, which is not a pass")
    return device
