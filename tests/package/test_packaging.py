"""What the wheel carries, and what `nvlm --help` needs to run."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
VERBS = (
    *(
        "inspect",
        "profiles",
        "plan",
        "build",
        "export-vision",
        "build-vision",
        "calibrate-llm",
        "quantize-llm",
        "export-hf",
        "build-llm",
    ),
    *("assemble", "serve", "ask", "validate", "verify", "sign", "doctor", "demo"),
)


ASK_EVERY_HELP = """
import contextlib, io, json, sys
sys.path += json.loads(sys.argv[1])
from nvlm_deploy.cli.main import run
sys.argv[0] = "nvlm"
helps = {}
for verb in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        run([*verb.split(), "--help"])
    helps[verb] = text.getvalue()
print(json.dumps(helps))
"""


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_module_of_the_three_roots(wheel_names: set[str]) -> None:
    roots = [REPOSITORY / root for root in ("build", "triton_repo", "tools")]
    sources = {path.relative_to(root).as_posix() for root in roots for path in (root / "nvlm_deploy").rglob("*.py")}
    assert {name for name in wheel_names if name.endswith(".py")} == sources


def test_the_wheel_holds_the_data_and_nothing_at_its_top_but_our_package(wheel_names: set[str]) -> None:
    for kind in ("profiles", "skus"):
        data = {f"nvlm_deploy/data/{kind}/{path.name}" for path in (REPOSITORY / "engines" / kind).glob("*.toml")}
        assert data
        assert data <= wheel_names
    assert {name.split("/")[0] for name in wheel_names} == {"nvlm_deploy", "nvlm_deploy-0.1.0.dist-info"}


def core_distributions() -> set[str]:
    """The closure of nvlm-deploy's own requirements, without its extras."""
    pending, found = ["nvlm-deploy"], set()
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            requirements = [Requirement(text) for text in metadata.requires(name) or []]
            pending += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found - {"nvlm-deploy"}


@pytest.fixture(scope="module")
def light_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with the core requirements and nothing else: no torch, onnx, onnxruntime, tritonclient."""
    site = tmp_path_factory.mktemp("site")
    for name in core_distributions():
        files = metadata.files(name) or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(metadata.distribution(name).locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(source)
    return site


def helps_in(site: Path) -> dict[str, str]:
    """What `--help` of nvlm and of every verb says, asked of one interpreter with `site` and our roots alone."""
    paths = [str(site), *(str(REPOSITORY / root) for root in ("build", "triton_repo", "tools"))]
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ASK_EVERY_HELP, json.dumps(paths), json.dumps(["", *VERBS])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    helps: dict[str, str] = json.loads(result.stdout)
    return helps


@pytest.fixture(scope="module")
def helps(light_environment: Path) -> dict[str, str]:
    return helps_in(light_environment)


def test_the_light_environment_really_lacks_the_heavy_libraries(light_environment: Path) -> None:
    assert not {"torch", "onnx", "onnxruntime", "tritonclient"} & {path.name for path in light_environment.iterdir()}


@pytest.mark.parametrize("verb", ["", *VERBS], ids=lambda verb: f"nvlm {verb}".strip())
def test_help_runs_without_the_heavy_libraries(helps: dict[str, str], verb: str) -> None:
    assert helps[verb].lstrip().startswith("Usage: nvlm " + verb)


def test_every_verb_is_in_the_help(helps: dict[str, str]) -> None:
    assert [verb for verb in VERBS if verb not in helps[""]] == []
