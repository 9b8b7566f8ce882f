"""What an application gets that installs the client with numpy 2: pip, an empty environment, the built wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
USE_CLIENT = """
import sys
import numpy
import nvlm_deploy.client as client
assert numpy.__version__.startswith("2."), numpy.__version__
assert client.__file__.startswith(sys.prefix), client.__file__
print(sorted({"torch", "onnx", "pytriton"} & sys.modules.keys()))
"""


def output(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel's extra `client` and numpy 2, on the Python that runs this test."""
    folder = tmp_path_factory.mktemp("application")
    output(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=REPOSITORY)
    (wheel,) = folder.glob("*.whl")
    output(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    pins = REPOSITORY / "constraints-core.txt"
    pip = (folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--constraint", pins)
    output(*pip, f"nvlm-deploy[client] @ {wheel.as_uri()}", cwd=folder)
    return folder / "venv"


@pytest.mark.slow
def test_the_client_works_beside_numpy_2_in_an_empty_environment(environment: Path, tmp_path: Path) -> None:
    assert output(environment / "bin/python", "-I", "-c", USE_CLIENT, cwd=tmp_path).strip() == "[]"


@pytest.mark.slow
def test_the_planner_works_there_from_the_wheels_own_data(environment: Path, tmp_path: Path) -> None:
    plan = output(
        environment / "bin/nvlm", "plan", "--spec", "nvlm-d-72b", "-p", "h100-sxm-80gb-throughput", cwd=tmp_path
    )
    assert "h100-sxm-80gb-throughput" in plan
    assert "KV" in plan
