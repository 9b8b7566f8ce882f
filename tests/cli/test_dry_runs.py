"""Every --dry-run works with no heavy library installed, writes nothing, and prints commands that can be pasted.

Paths of this machine are on the left side of a mount, and nowhere else in what a container runs.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from nvlm_deploy.cli.main import app
from nvlm_deploy.llm.engine_tool import RELEASES
from nvlm_deploy.recipe import STEP_NAMES

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
CALIBRATION = REPOSITORY / "tests/models/calibration"
TINY = REPOSITORY / "tests/models/nvlm-d-tiny"
ROOTS = [str(REPOSITORY / root) for root in ("build", "triton_repo", "tools")]
MACHINE = REPOSITORY / "tests" / "machine"
if str(MACHINE) not in sys.path:
    sys.path.insert(0, str(MACHINE))

HEAVY = (
    *("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_llm", "tensorrt_rtx"),
    *("tensorrt_rtx_bindings", "tritonclient", "pytriton", "transformers", "scipy", "polygraphy"),
)
WITHOUT = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
sys.path[:0] = {ROOTS!r}
from nvlm_deploy.cli.main import run
run(sys.argv[1:])
"""
# what a paste would break on, or what stands for something
PLACEHOLDERS = re.compile(r"\bVERSION\b|\bREGISTRY\b|\bHOSTDIR\b|\bTODO\b|[<>]|\$\{|\.\.\.")


@functools.cache
def without_heavy_libraries(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Nothing is written, so that what was said once holds for all tests."""
    command = [sys.executable, "-c", WITHOUT, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def gpu_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shipped profile of two GPUs, as short as the small model; its own file, in a folder with a space."""
    text = (REPOSITORY / "engines/profiles/h100-sxm-80gb-throughput.toml").read_text()
    file = tmp_path_factory.mktemp("my profiles") / "two-gpus.toml"
    file.write_text(re.sub(r"(max_seq_len|max_num_tokens) = \d+", r"\1 = 1024", text))
    return file


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not there, and must not be afterwards."""
    return tmp_path_factory.mktemp("dry") / "my work"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `nvlm build` leaves it, with a decoder of bytes that mean nothing."""
    from built import Workspace

    from nvlm_deploy.checkpoint.reader import Checkpoint
    from nvlm_deploy.model.spec import spec_from_checkpoint
    from nvlm_deploy.profile import load_profile

    root = tmp_path_factory.mktemp("served") / "work"
    spec = spec_from_checkpoint(Checkpoint.open(TINY))
    workspace = Workspace(root, load_profile("cpu"), spec, TINY / "tokenizer.json")
    workspace.build()
    return workspace.repository


def verbs_with_a_dry_run(command: Any = None, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    command = get_command(app) if command is None else command
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs_with_a_dry_run(below, (*before, name))
    if any("--dry-run" in option.opts for option in command.params):
        yield before


def arguments_of(verb: tuple[str, ...], profile: Path, repository: Path, workspace: Path) -> list[str | Path]:
    if verb[0] in ("build", *STEP_NAMES):
        return [*verb, TINY, "--profile", profile, "--calibration", CALIBRATION, "--workspace", workspace]
    if verb == ("serve",):
        return [*verb, repository]
    if verb == ("artifacts", "prune"):
        return [*verb, repository.parents[1]]
    assert verb == ("sign",), f"{verb} has a --dry-run that no test runs"
    key = repository.parents[2] / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    return [*verb, repository, "--key", key]


def commands_in(text: str) -> list[str]:
    """The lines that are neither remarks nor the table of steps."""
    lines = text.splitlines()
    begin = lines.index("") + 1 if "" in lines else 0
    return [line for line in lines[begin:] if line and not line.startswith("#")]


@pytest.mark.parametrize("verb", [*verbs_with_a_dry_run()], ids=" ".join)
def test_a_dry_run_needs_no_heavy_library_and_writes_nothing(
    verb: tuple[str, ...], gpu_profile: Path, repository: Path, workspace: Path
) -> None:
    before = sorted(repository.parents[1].rglob("*"))
    arguments = arguments_of(verb, gpu_profile, repository, workspace)
    done = without_heavy_libraries(*arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()
    assert not workspace.exists()
    assert sorted(repository.parents[1].rglob("*")) == before
    as_json = without_heavy_libraries(*arguments, "--dry-run", "--json")
    assert as_json.returncode == 0
    assert json.loads(as_json.stdout)


@pytest.mark.parametrize("verb", ["build", *STEP_NAMES])
def test_a_dry_run_says_what_each_step_reads_and_writes(verb: str, gpu_profile: Path, workspace: Path) -> None:
    arguments = arguments_of((verb,), gpu_profile, Path(), workspace)
    steps = json.loads(without_heavy_libraries(*arguments, "--dry-run", "--json").stdout)["steps"]
    assert len(steps) == (6 if verb == "build" else 1)
    for step in steps:
        assert step["writes"].startswith(str(workspace))
        assert step["reads"]
        assert step["found"] is None
    read = {one.split(" (")[0] for step in steps for one in step["reads"]}
    written = {step["writes"] for step in steps}
    if verb == "build":
        assert read - {str(TINY), str(CALIBRATION)} == written - {str(workspace / "triton_repo/two-gpus")}


def left_sides(start: str) -> list[str]:
    words = shlex.split(start)
    return [words[place + 1].split(":")[0] for place, word in enumerate(words) if word == "-v"]


def require_pasteable(lines: Sequence[str], *, start: str, machines: Sequence[Path]) -> None:
    for line in (start, *lines):
        assert shlex.split(line)
        assert not PLACEHOLDERS.search(line), line
    hosts = set(left_sides(start))
    words = [word for line in (start, *lines) for word in shlex.split(line)]
    inside = [word.split(":", 1)[1] if word.split(":")[0] in hosts else word for word in words]
    assert not [word for word in inside if any(str(machine) in word for machine in machines)]
    absolute = [word for word in re.split(r"[\s=:]", " ".join(inside)) if word.startswith("/")]
    places = ("/workspace", "/checkpoint", "/calibration", "/profile", "/nvlm-deploy")
    assert [word for word in absolute if not word.startswith(places)] == []


@pytest.mark.parametrize("verb", ["build", "build-vision", "build-llm"])
def test_the_commands_of_a_gpu_profile_can_be_pasted_into_the_container(
    verb: str, gpu_profile: Path, workspace: Path
) -> None:
    arguments = arguments_of((verb,), gpu_profile, Path(), workspace)
    document = json.loads(without_heavy_libraries(*arguments, "--dry-run", "--json").stdout)
    start, commands = document["container"]["start"], document["commands"]
    assert list(commands) == (["build-vision", "build-llm"] if verb == "build" else [verb])
    every = [line for lines in commands.values() for line in lines]
    require_pasteable(every, start=start, machines=[REPOSITORY, workspace.parent, gpu_profile.parent])
    assert set(map(str, (workspace, TINY, CALIBRATION, gpu_profile))) <= set(left_sides(start))
    text = without_heavy_libraries(*arguments, "--dry-run").stdout
    assert commands_in(text) == [start, *every]


def test_the_image_is_one_of_the_cohort_and_can_be_named_as_a_registry_does(gpu_profile: Path, workspace: Path) -> None:
    arguments = arguments_of(("build-llm",), gpu_profile, Path(), workspace)
    container = json.loads(without_heavy_libraries(*arguments, "--dry-run", "--json").stdout)["container"]
    assert container["image"] in {f"tritonserver:{tag}-trtllm-python-py3" for tag in RELEASES[0].containers}
    assert shlex.split(container["start"])[-2:] == [container["image"], "bash"]
    mine = without_heavy_libraries(*arguments, "--dry-run", "--json", "--container-image", "mine/triton:1")
    assert shlex.split(json.loads(mine.stdout)["container"]["start"])[-2] == "mine/triton:1"


def test_the_builders_flags_have_values_and_engines_by_hand_lie_where_no_artifact_does(
    gpu_profile: Path, workspace: Path
) -> None:
    arguments = arguments_of(("build-llm",), gpu_profile, Path(), workspace)
    lines = json.loads(without_heavy_libraries(*arguments, "--dry-run", "--json").stdout)["commands"]["build-llm"]
    ranks = [shlex.split(line) for line in lines if "engine_one_rank.py" in line]
    assert [words[3] for words in ranks] == ["0", "1"]
    for words in ranks:
        flags = dict(zip(words[4::2], words[5::2], strict=True))
        assert flags["--checkpoint_dir"] == "/workspace/engines/two-gpus/decoder"
        assert flags["--output_dir"] == "/workspace/engines/two-gpus/by-hand/decoder-engine"
        assert flags["--input_timing_cache"] == "/workspace/engines/builder-cache/trtllm-1.2.1-h100-sxm-80gb.cache"
        assert all(name.startswith("--") and not value.startswith("-") for name, value in flags.items())


def test_a_workspace_that_is_the_checkout_itself_stays_writable(gpu_profile: Path) -> None:
    arguments = arguments_of(("build-llm",), gpu_profile, Path(), REPOSITORY)
    lines = json.loads(without_heavy_libraries(*arguments, "--dry-run", "--json").stdout)["commands"]["build-llm"]
    assert all("/workspace/engines/two-gpus" in line for line in lines if "--output_dir" in line)


def test_relative_paths_are_mounted_by_their_absolute_ones(gpu_profile: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "model").symlink_to(TINY)
    words = ["build-llm", "../model", "-p", gpu_profile, "--workspace", ".", "--calibration", CALIBRATION]
    done = without_heavy_libraries(*words, "--dry-run", "--json", cwd=tmp_path / "here")
    mounted = left_sides(json.loads(done.stdout)["container"]["start"])
    assert {str(tmp_path / "here"), str(tmp_path / "model")} <= set(mounted)


def test_serving_where_nothing_is_installed_says_what_to_install(repository: Path) -> None:
    lines = without_heavy_libraries("serve", repository, "--dry-run", "--grpc-port", "9001").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["#", "python3", "nvlm"]
    assert "nvidia-pytriton is not installed" in lines[0]
    assert "--grpc-port 9001" in lines[2]


def test_a_dry_run_of_serve_still_refuses_what_is_not_as_it_was_built(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / "copy")
    (tmp_path / "copy/nvlm/config.pbtxt").write_text("?")
    assert without_heavy_libraries("serve", tmp_path / "copy", "--dry-run").returncode == 1
    assert without_heavy_libraries("serve", tmp_path / "none", "--dry-run").returncode == 2
