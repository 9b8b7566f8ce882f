"""`nvlm build` on the command line: refusals before anything is written, dry run, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_deploy.cli.main import run

REPOSITORY = Path(__file__).parents[2]
CALIBRATION = REPOSITORY / "tests/models/calibration"


def exit_code_of(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        run([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path) -> list[str | Path]:
    return ["build", tiny_folder, "--calibration", CALIBRATION, "--workspace", tmp_path / "work"]


def test_a_dry_run_lists_the_steps_and_writes_nothing(
    command: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(*command, "--dry-run", "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [row["step"] for row in steps] == [
        "export-vision",
        "build-vision",
        "calibrate-llm",
        "quantize-llm",
        "assemble",
    ]
    assert not (tmp_path / "work").exists()


def test_fp8_without_calibration_samples_is_refused_with_the_mend(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of("build", tiny_folder, "--workspace", tmp_path / "work") == 2
    assert "--calibration FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_an_unknown_profile_names_those_there_are(
    command: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(*command, "--profile", "gpu-of-my-dreams") == 2
    assert "cpu-bf16" in capsys.readouterr().err


def test_a_profile_with_an_unknown_key_names_the_nearest(
    command: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text((REPOSITORY / "engines/profiles/cpu.toml").read_text().replace("max_seq_len", "max_seq_length"))
    assert exit_code_of(*command, "--profile", profile) == 2
    assert "did you mean 'max_seq_len'" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_without_its_tokenizer_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "tokenizer.json").unlink()
    arguments = ("build", copy, "--calibration", CALIBRATION, "--workspace", tmp_path / "work")
    assert exit_code_of(*arguments) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def start_build(tiny_folder: Path, workspace: Path, verb: str = "build") -> subprocess.Popen[str]:
    arguments = [verb, tiny_folder, "--calibration", CALIBRATION, "--workspace", workspace]
    program = f"from nvlm_deploy.cli.main import run; run({[str(argument) for argument in arguments]!r})"
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.needs("build")
def test_a_build_killed_in_the_middle_goes_on_where_it_was_and_ends_with_the_same_bytes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_build(tiny_folder, whole).wait() == 0
    build = start_build(tiny_folder, killed)
    vision = killed / "engines/cpu/vision/manifest.json"
    wait_until(lambda: vision.is_file() or build.poll() is not None)
    os.kill(build.pid, signal.SIGKILL)
    build.wait()
    before = vision.stat().st_mtime_ns
    assert start_build(tiny_folder, killed).wait() == 0
    assert vision.stat().st_mtime_ns == before, "the finished step was built again"
    assert artifact_bytes(killed) == artifact_bytes(whole)
    assert not list(killed.rglob(".partial-*"))


@pytest.mark.slow
@pytest.mark.needs("build")
def test_an_export_killed_among_the_weights_goes_on_and_ends_with_the_same_bytes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_build(tiny_folder, whole, "export-vision").wait() == 0
    build = start_build(tiny_folder, killed, "export-vision")
    wait_until(lambda: list(killed.rglob("*.journal")) or build.poll() is not None)
    os.kill(build.pid, signal.SIGKILL)
    assert build.wait() == -signal.SIGKILL
    assert not list(killed.rglob("manifest.json"))
    assert start_build(tiny_folder, killed, "export-vision").wait() == 0
    assert artifact_bytes(killed) == artifact_bytes(whole)
    assert not list(killed.rglob(".partial-*"))


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_nothing_half_written(tiny_folder: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "work"
    build = start_build(tiny_folder, workspace)
    wait_until(lambda: list(workspace.rglob(".partial-*")) or build.poll() is not None)
    build.send_signal(signal.SIGINT)
    _, errors = build.communicate(timeout=60)
    assert build.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not list(workspace.rglob("manifest.json"))
    assert all(path.name.startswith(".partial-begun-") for path in workspace.rglob(".partial-*"))


@pytest.mark.slow
@pytest.mark.needs("build")
def test_a_disk_that_fills_up_while_building_is_said_and_the_build_goes_on_after(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """A file system of 4 MiB of its own, in a mount namespace, where the kernel allows one to be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = ["build", tiny_folder, "--calibration", CALIBRATION, "--workspace", disk]
    program = f"from nvlm_deploy.cli.main import run; run({[str(argument) for argument in arguments]!r})"
    (tmp_path / "build.py").write_text(program)
    script = (
        f"mount -t tmpfs -o size=4m tmpfs {disk} && {{ {sys.executable} {tmp_path}/build.py; echo exit $?; }};"
        f"find {disk} -name '.partial-[!b]*'; mount -o remount,size=200m {disk} && "
        f"{sys.executable} {tmp_path}/build.py; echo exit $?"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "mount" in done.stderr and "exit" not in done.stdout:
        pytest.skip(f"this kernel lets nobody mount a small file system: {done.stderr}")
    assert next(line for line in done.stdout.splitlines() if line.startswith(("exit", "/"))) == "exit 3", done.stdout
    assert "disk is full" in done.stderr
    assert ".partial-" not in done.stdout
    assert done.stdout.splitlines()[-1] == "exit 0", done.stderr


def wait_until(condition: object, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def artifact_bytes(workspace: Path) -> dict[str, bytes]:
    files = [path for path in workspace.rglob("*") if path.is_file() and path.name not in ("manifest.json", ".lock")]
    return {path.relative_to(workspace).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda text: "{}", "tokenizer"),
        (lambda text: text.replace("<|vision_pad|>", "<|other_pad|>"), "<|vision_pad|>"),
        (lambda text: text.replace("<|im_end|>", "<|im_fin|>"), "<|im_end|>"),
    ],
    ids=["empty", "no vision pad", "no im_end"],
)
def test_a_tokenizer_of_another_model_is_refused_before_the_first_step(
    tiny_folder: Path, tmp_path: Path, edit: Callable[[str], str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "tokenizer.json").write_text(edit((copy / "tokenizer.json").read_text()))
    assert exit_code_of("build", copy, "--profile", "cpu-bf16", "--workspace", tmp_path / "work") == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("max_batch_size = 8", "max_batch_size = true", "max_batch_size is True"),
        ("max_batch_size = 8", 'max_batch_size = "8"', "max_batch_size is '8'"),
        ("tensor_parallel = 1", "tensor_parallel = 3", "3"),
        ("pipeline_parallel = 1", "pipeline_parallel = 9", "9"),
        ("max_seq_len = 1024", "max_seq_len = 10000000", "2048 positions"),
        ("default_max_tokens = 128", "default_max_tokens = 5000", "leaves no room"),
    ],
)
def test_a_profile_that_cannot_work_is_refused_before_the_first_step(
    command: list[str | Path], tmp_path: Path, before: str, after: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text((REPOSITORY / "engines/profiles/cpu.toml").read_text().replace(before, after))
    assert exit_code_of(*command, "--profile", profile) == 2
    assert word in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "work").exists()


def test_forcing_plans_every_step(command: list[str | Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(*command, "--dry-run", "--force") == 0
    assert capsys.readouterr().out.count("to build") == 5


def test_a_checkpoint_that_is_not_there_is_said_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("export-vision", tmp_path / "nope", "--workspace", tmp_path / "work") == 2
    assert f"no checkpoint folder {tmp_path / 'nope'}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
@pytest.mark.needs("build")
def test_the_encoder_of_one_checkpoint_is_not_joined_to_the_decoder_of_another(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config + "\n")
    options = ("--profile", "cpu-bf16", "--workspace", tmp_path / "work")
    assert exit_code_of("export-vision", tiny_folder, *options) == 0
    assert exit_code_of("build-vision", tiny_folder, *options) == 0
    assert exit_code_of("quantize-llm", other, *options) == 0
    assert exit_code_of("assemble", other, *options) == 2
    assert "vision is not what would be made now: input config.json differs" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.fixture
def two_lists(tmp_path: Path) -> list[Path]:
    """The first and the last questions of the calibration list, in folders of their own."""
    lines = (CALIBRATION / "samples.jsonl").read_text().splitlines(keepends=True)
    folders = []
    for name, some in (("first", lines[:6]), ("last", lines[-6:])):
        folders.append(tmp_path / name)
        shutil.copytree(CALIBRATION, tmp_path / name)
        (tmp_path / name / "samples.jsonl").write_text("".join(some))
    return folders


@pytest.mark.needs("build")
@pytest.mark.slow
def test_a_calibration_outlives_one_with_another_list_finished_or_killed_in_the_middle(
    tiny_folder: Path, tmp_path: Path, two_lists: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvlm_deploy.llm import hidden_states

    workspace, layers = tmp_path / "work", list[int]()
    honest = hidden_states.record_progress

    def counting(folder: Path, digest: str, finished: dict[str, object]) -> None:
        honest(folder, digest, finished)
        layers.append(1)
        if killed_after == len(layers):
            raise KeyboardInterrupt

    monkeypatch.setattr(hidden_states, "record_progress", counting)

    def build(samples: Path) -> int:
        layers.clear()
        return exit_code_of("build", tiny_folder, "--calibration", samples, "--workspace", workspace)

    first, last = two_lists
    killed_after = 2
    assert build(first) == 130
    killed_after = 0
    assert build(last) == 0
    whole = len(layers)
    bytes_of_last = artifact_bytes(workspace / "triton_repo")
    assert build(first) == 0
    assert len(layers) < whole, "the killed run's layers were calibrated again"
    assert artifact_bytes(workspace / "triton_repo") != bytes_of_last
    assert build(last) == 0
    assert layers == []
    assert artifact_bytes(workspace / "triton_repo") == bytes_of_last
    alone = exit_code_of("quantize-llm", tiny_folder, "--calibration", first, "--workspace", workspace)
    assert (alone, layers) == (0, []), "a step alone reads the calibration of its own list"
