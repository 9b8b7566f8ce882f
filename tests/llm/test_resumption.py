"""A calibration and an export that are killed, or run out of disk, go on with the same result."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_deploy.artifacts import JOURNAL_NAME, digests
from nvlm_deploy.checkpoint.trtllm import CheckpointWriter
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL, Parallelism
from nvlm_deploy.checkpoint.unfinished import PROGRESS_NAME
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.llm import calibrate as calibrating
from nvlm_deploy.llm import hidden_states
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.llm.hidden_states import CalibrationState, HiddenStates
from nvlm_deploy.llm.observed import ObservedLayer
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from

LAYERS = 4


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


@pytest.fixture(scope="module")
def whole(random_case: Any) -> CalibrationResult:
    return calibrate(random_case.checkpoint, random_case.spec, random_case.samples)


@pytest.fixture
def three_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample on its own."""
    monkeypatch.setattr(hidden_states, "TOKENS_PER_RUN", 1)


def kill(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int) -> None:
    """The run ends when it makes the method's so many-th call, from 0."""
    original, calls = getattr(owner, method), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        if len(calls) > call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, dying)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the layers whose weights are read, as it happens."""
    numbers: list[int] = []
    original = ObservedLayer.__init__

    def init(self: Any, checkpoint: Any, spec: Any, index: int, dtype: Any) -> None:
        numbers.append(index)
        original(self, checkpoint, spec, index, dtype)

    monkeypatch.setattr(ObservedLayer, "__init__", init)
    return numbers


@pytest.mark.parametrize(
    ("owner", "method", "call", "first_layer"),
    [
        (HiddenStates, "put", 1, 0),
        (CalibrationState, "record", 0, 0),
        (ObservedLayer, "advance", 4, 1),
        (HiddenStates, "put", 7, 1),
        (CalibrationState, "record", 2, 1),
        (HiddenStates, "take", 6, 2),
        (ObservedLayer, "advance", 11, 3),
        (CalibrationState, "record", 4, 3),
        (CalibrationState, "_remove_others", 3, 2),
    ],
)
def test_a_killed_calibration_goes_on_at_the_layer_it_was_in_with_the_same_bytes(
    random_case: Any,
    whole: CalibrationResult,
    three_runs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: list[int],
    owner: type,
    method: str,
    call: int,
    first_layer: int,
) -> None:
    alone = calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    with monkeypatch.context() as patched:
        kill(patched, owner, method, call)
        with pytest.raises(Killed):
            calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path / "work")
    opened.clear()
    resumed = calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path / "work")
    assert opened == list(range(first_layer, LAYERS))
    assert resumed == alone
    assert resumed.amax == pytest.approx(whole.amax, rel=1e-5), "samples that share a run do not see one another"


def test_a_finished_calibration_keeps_no_hidden_states_and_is_not_computed_again(
    random_case: Any, tmp_path: Path, opened: list[int]
) -> None:
    first = calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_NAME]
    opened.clear()
    assert calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path) == first
    assert opened == []


@pytest.mark.parametrize("damage", ["zeros", "cut", "gone", "folder gone", "one bit", "amax", "checksum"])
def test_hidden_states_that_are_not_as_they_were_written_are_computed_again(
    random_case: Any,
    three_runs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: list[int],
    damage: str,
) -> None:
    alone = calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    with monkeypatch.context() as patched:
        kill(patched, ObservedLayer, "advance", 7)
        with pytest.raises(Killed):
            calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path)
    damage_state(tmp_path, tmp_path / "layer-002" / "run-00001.safetensors", damage)
    opened.clear()
    resumed = calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path)
    assert resumed == alone
    assert opened[-LAYERS:] == list(range(LAYERS)), "of former layers nothing is left"
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_NAME]


def damage_state(work_folder: Path, spill: Path, damage: str) -> None:
    content, progress = bytearray(spill.read_bytes()), work_folder / PROGRESS_NAME
    if damage == "zeros":
        content[-4000:] = bytes(4000)
    elif damage == "cut":
        del content[-4000:]
    elif damage == "one bit":
        content[-1] ^= 1
    spill.write_bytes(content)
    if damage == "gone":
        spill.unlink()
    elif damage == "folder gone":
        shutil.rmtree(spill.parent)
    elif damage in ("amax", "checksum"):
        key = {"amax": '"model.layers.1.mlp.up_proj.weight": ', "checksum": '"0": '}[damage]
        assert key in progress.read_text()
        progress.write_text(progress.read_text().replace(key, f"{key}1"))


def test_a_disk_that_gives_back_other_hidden_states_is_said_not_retried_for_ever(
    random_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "checksum_of", lambda states: 0)
    with pytest.raises(MachineError, match=r"run-00000\.safetensors is not what was written there") as refusal:
        calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path)
    assert "check the disk" in (refusal.value.hint or "")


def test_what_a_killed_run_had_half_written_is_removed(
    random_case: Any, whole: CalibrationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "layer-002").mkdir()
    for name in ("layer-002/run-00000.safetensors", f".partial-17-{PROGRESS_NAME}"):
        (tmp_path / name).write_bytes(b"half")
    calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_NAME]

    with monkeypatch.context() as patched:
        kill(patched, CheckpointWriter, "rows", 30)
        with pytest.raises(Killed):
            export(random_case, whole, tmp_path / "decoder")
    left = next(path for path in tmp_path.iterdir() if path.name.endswith("-decoder"))
    (left / ".partial-17-config.json").write_bytes(b"half")
    export(random_case, whole, tmp_path / "decoder")
    names = sorted(path.name for path in (tmp_path / "decoder").iterdir())
    assert names == ["config.json", "rank0.safetensors", "rank1.safetensors"]


def test_samples_that_are_named_are_not_made_again(random_case: Any, whole: CalibrationResult, tmp_path: Path) -> None:
    def never() -> Iterator[torch.Tensor]:
        raise AssertionError("made again")
        yield

    def run(samples: Any) -> CalibrationResult:
        return calibrate(
            random_case.checkpoint, random_case.spec, samples, work_folder=tmp_path, samples_digest="the list of today"
        )

    named = dataclasses.replace(whole, samples_digest="the list of today")
    assert run(random_case.samples) == named
    assert run(never()) == named


@pytest.mark.parametrize("change", ["sample", "order", "precision", "damage"])
def test_a_state_of_something_else_is_not_used(
    random_case: Any, tmp_path: Path, opened: list[int], change: str
) -> None:
    calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=tmp_path)
    samples, dtype = [sample.clone() for sample in random_case.samples], None
    if change == "sample":
        samples[1][3, 5] += 1
    elif change == "order":
        samples.reverse()
    elif change == "precision":
        dtype = torch.bfloat16
    else:
        (tmp_path / PROGRESS_NAME).write_text('{"digest": ')
    opened.clear()
    found = calibrate(random_case.checkpoint, random_case.spec, samples, work_folder=tmp_path, dtype=dtype)
    assert opened == list(range(LAYERS))
    assert found == calibrate(random_case.checkpoint, random_case.spec, samples, dtype=dtype)


@pytest.mark.parametrize(("budget_bytes", "spilled"), [(1 << 30, 0), (9_000, 1), (0, 3)])
def test_hidden_states_beyond_the_budget_go_to_the_disk_and_change_nothing(
    random_case: Any, three_runs: None, monkeypatch: pytest.MonkeyPatch, budget_bytes: int, spilled: int
) -> None:
    """Samples of 9, 24 and 17 tokens, 64 float32 values each: the first and one other stay within 9,000 bytes."""
    expected = calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    written: list[str] = []
    original = hidden_states.write_safetensors
    monkeypatch.setattr(hidden_states, "write_safetensors", lambda *args: (written.append("run"), original(*args)))
    monkeypatch.setattr(calibrating, "HIDDEN_STATES_BYTES", budget_bytes)
    assert calibrate(random_case.checkpoint, random_case.spec, random_case.samples) == expected
    assert len(written) == spilled * LAYERS, "before each layer"


def test_progress_is_told_in_bytes_of_hidden_states_up_to_the_end_also_after_a_kill(
    random_case: Any, three_runs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []

    def run() -> None:
        calibrate(
            random_case.checkpoint,
            random_case.spec,
            random_case.samples,
            work_folder=tmp_path,
            on_progress=lambda _, done, total: told.append((done, total)),
        )

    with monkeypatch.context() as patched:
        kill(patched, CalibrationState, "record", 2)
        with pytest.raises(Killed):
            run()
    run()
    token = random_case.spec.decoder.hidden_size * 4
    assert told[-1] == (4 * 50 * token, 4 * 50 * token)
    assert told[6][0] == (50 + 9) * token, "layer 1 begins again"


@pytest.mark.parametrize("quant_algo", [None, FP8, FP8_PER_CHANNEL])
def test_a_killed_export_goes_on_with_what_it_had_written(
    random_case: Any,
    whole: CalibrationResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quant_algo: str | None,
) -> None:
    export(random_case, whole, tmp_path / "whole", quant_algo)
    with monkeypatch.context() as patched:
        kill(patched, CheckpointWriter, "rows", 30)
        with pytest.raises(Killed):
            export(random_case, whole, tmp_path / "decoder", quant_algo)
    written: list[str] = []
    original = CheckpointWriter.rows

    def rows(self: CheckpointWriter, tensor: Any) -> Any:
        written.append(tensor.name)
        return original(self, tensor)

    monkeypatch.setattr(CheckpointWriter, "rows", rows)
    checkpoint = export(random_case, whole, tmp_path / "decoder", quant_algo)
    assert 0 < len(written) < len(checkpoint.layout.tensors) - 20
    assert digests(tmp_path / "decoder") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder", "whole"]


@pytest.mark.parametrize("damage", ["bytes", "journal", "cut journal", "odd lines", "binary", "file", "split", "scale"])
def test_what_a_killed_export_left_is_trusted_only_as_far_as_it_is_right(
    random_case: Any, whole: CalibrationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with monkeypatch.context() as patched:
        kill(patched, CheckpointWriter, "rows", 40)
        with pytest.raises(Killed):
            export(random_case, whole, tmp_path / "decoder")
    left = next(path for path in tmp_path.iterdir() if path.name.endswith("-decoder"))
    journal = left / JOURNAL_NAME
    if damage == "bytes":
        with (left / "rank1.safetensors").open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(bytes(range(100)) * 10)
    elif damage == "journal":
        journal.write_text(journal.read_text().replace("rank0.safetensors", "rank1.safetensors"))
    elif damage == "cut journal":
        journal.write_text(journal.read_text()[:-3])
    elif damage == "odd lines":
        journal.write_text(journal.read_text() + '3\n["rank0.safetensors"]\n["rank9.safetensors", "none", 3]\n')
    elif damage == "binary":
        journal.write_bytes(journal.read_bytes() + bytes(range(128, 256)))
    elif damage == "file":
        (left / "rank0.safetensors").unlink()
    calibration = CalibrationResult({**whole.amax, INPUT: 3.0}, 1, 1) if damage == "scale" else whole
    parallelism = Parallelism(4) if damage == "split" else Parallelism(2)
    export(random_case, calibration, tmp_path / "decoder", parallelism=parallelism)
    export(random_case, calibration, tmp_path / "whole", parallelism=parallelism)
    assert digests(tmp_path / "decoder") == digests(tmp_path / "whole")
    # of another split or other scales: not ours to go on with, and not ours to remove
    kept = [left.name] if damage in ("split", "scale") else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "decoder", "whole"]


def test_wrong_input_leaves_nothing_to_go_on_with(random_case: Any, spoilt: Any, tmp_path: Path) -> None:
    holed = spoilt(random_case.checkpoint, "language_model.lm_head.weight", float("inf"))
    with pytest.raises(NvlmError, match="infinity"):
        trtllm_checkpoint_from(holed, random_case.spec, tmp_path / "decoder", calibration=None)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def resize(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of a size that can be changed, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        how = ["-o", f"remount,size={size}"] if folder.is_mount() else ["-o", f"size={size}", "-t", "tmpfs", "tmpfs"]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(["mount", *how, folder]).returncode:
            pytest.skip("mounting a small file system needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def test_an_export_to_a_full_disk_says_what_it_lacks_and_goes_on_when_there_is_room(
    random_case: Any, whole: CalibrationResult, tmp_path: Path, resize: Callable[[str], Path]
) -> None:
    disk = resize("160k")
    with pytest.raises(MachineError, match=r"the disk is full: .* needs 0\.\d MB more, 0\.\d MB are free") as refusal:
        export(random_case, whole, disk / "decoder")
    assert refusal.value.exit_code == 3
    assert "run the same command again" in (refusal.value.hint or "")
    assert not list(disk.rglob("*.safetensors")), "half of the files would be of no use"
    resize("2m")
    export(random_case, whole, disk / "decoder")
    export(random_case, whole, tmp_path / "whole")
    assert digests(disk / "decoder") == digests(tmp_path / "whole")


def test_a_calibration_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    random_case: Any,
    whole: CalibrationResult,
    resize: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    opened: list[int],
) -> None:
    disk = resize("100k")
    with monkeypatch.context() as patched:
        original = CalibrationState.record

        def record(self: CalibrationState, finished: Any) -> None:
            original(self, finished)
            if finished.layers == 2:
                (disk / "somebody else's").write_bytes(bytes(shutil.disk_usage(disk).free))

        patched.setattr(CalibrationState, "record", record)
        with pytest.raises(MachineError, match="the disk is full"):
            calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=disk / "work")
    resize("200k")
    opened.clear()
    resumed = calibrate(random_case.checkpoint, random_case.spec, random_case.samples, work_folder=disk / "work")
    assert opened == [2, 3]
    assert resumed == whole


# Imports torch once and forks before its first operation: twenty interpreters would take a minute to start
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from nvlm_deploy.artifacts import digests
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import Parallelism
from nvlm_deploy.llm.calibrate import calibrate
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.spec import spec_from_config

checkpoint, folder = Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2])
samples = [*load_file(folder / "samples.safetensors").values()]
torch.set_num_threads(1)

def work(output):
    spec = spec_from_config(checkpoint.config)
    calibration = calibrate(checkpoint, spec, samples, work_folder=output / "work")
    calibration.save(output / "result" / "calibration.json")
    trtllm_checkpoint_from(
        checkpoint, spec, output / "result" / "decoder", calibration=calibration, parallelism=Parallelism(2),
        kv_cache_quant_algo="FP8",
    )

def begun(output):
    child = os.fork()
    if not child:
        try:
            work(output)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

started = time.monotonic()
assert ended(begun(folder / "whole")) == 0
duration = time.monotonic() - started
expected, kills, at_work = digests(folder / "whole" / "result"), 0, set()
for number in range(60):
    output = folder / str(number)
    child = begun(output)
    time.sleep(random.uniform(0, duration))
    os.kill(child, signal.SIGKILL)
    if ended(child) == -signal.SIGKILL:
        kills += 1
        at_work.update(path.name.split("-")[0] for path in output.rglob("*"))
    assert ended(begun(output)) == 0
    found = digests(output / "result")
    assert found == expected, (number, found, expected)
    if kills == 20:
        break
print(kills, sorted(at_work))
"""


@pytest.mark.slow
def test_after_twenty_kills_at_random_moments_the_bytes_are_those_of_an_uninterrupted_run(
    random_case: Any, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({str(n): sample for n, sample in enumerate(random_case.samples)}, tmp_path / "samples.safetensors")
    command = [sys.executable, "-c", KILLS, str(random_case.checkpoint.folder), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    kills, _, found = ended.stdout.partition(" ")
    assert int(kills) == 20
    assert "progress.json" in found, "some were killed in the midst of it"


INPUT = "model.layers.2.mlp.gate_proj.input"


def export(
    case: Any,
    calibration: CalibrationResult,
    output: Path,
    quant_algo: str | None = FP8,
    parallelism: Parallelism = Parallelism(2),  # noqa: B008 - frozen
) -> Any:
    return trtllm_checkpoint_from(
        case.checkpoint,
        case.spec,
        output,
        calibration=calibration,
        quant_algo=quant_algo,
        parallelism=parallelism,
    )
