"""The whole model as a Hugging Face folder: its content, what is refused, and that kills and full disks do no harm."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvlm_deploy.artifacts import digests
from nvlm_deploy.checkpoint import resumable
from nvlm_deploy.checkpoint.reader import INDEX_NAME, Checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.llm import hf_checkpoint
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.llm.hf_checkpoint import HfExport, hf_checkpoint_from, layout_for
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.decoder import PREFIX
from nvlm_deploy.model.reference import decoder_from_hf, decoder_from_trtllm
from nvlm_deploy.model.spec import ModelSpec, spec_from_checkpoint

TINY = Path(__file__).resolve().parents[1] / "models" / "nvlm-d-tiny"
SMALL_SHARDS = 500_000
ENCODER = ("mlp1.0.bias", "vision_model.encoder.layers.0.attn.qkv.weight")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint.open(TINY)


@pytest.fixture(scope="module")
def spec(tiny: Checkpoint) -> ModelSpec:
    return spec_from_checkpoint(tiny)


@pytest.fixture(scope="module")
def samples(tiny: Checkpoint) -> list[torch.Tensor]:
    table = tiny.tensor(f"{PREFIX}model.embed_tokens.weight").float()
    return [table[torch.randint(len(table), (30,), generator=torch.Generator().manual_seed(0))]]


@pytest.fixture(scope="module")
def calibrated(tiny: Checkpoint, spec: ModelSpec, samples: list[torch.Tensor]) -> CalibrationResult:
    return calibrate(tiny, spec, samples)


@pytest.fixture(scope="module")
def fp8(
    tiny: Checkpoint, spec: ModelSpec, calibrated: CalibrationResult, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """In several shards, with an FP8 KV cache. Do not write to it."""
    folder = tmp_path_factory.mktemp("hf") / "fp8"
    hf_checkpoint_from(
        tiny, spec, folder, calibration=calibrated, kv_cache_quant_algo=FP8, max_shard_bytes=SMALL_SHARDS
    )
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the small model's folder, to spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "source"))


def is_linear(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith(tuple(f"{linear}.weight" for linear in LINEARS))


def test_linears_of_the_decoder_are_fp8_with_their_scales_and_all_else_is_as_it_was(
    tiny: Checkpoint, fp8: Path
) -> None:
    before, after = tiny.tensors(""), Checkpoint.open(fp8).tensors("")
    scales = {name for name in after if name.endswith("_scale")}
    assert after.keys() - scales == before.keys()
    assert len(scales) == 4 * (7 * 2 + 2)
    for name in before:
        if is_linear(name):
            scale = after[name + "_scale"]
            assert after[name].dtype == torch.float8_e4m3fn
            torch.testing.assert_close(
                after[name].float() * scale, before[name].float(), rtol=1 / 16, atol=2**-10 * scale.item()
            )
        else:
            assert same_bytes(after[name], before[name]), name
    assert all(after[name].dtype == torch.float32 and after[name].shape == () for name in scales)


@pytest.mark.parametrize("quant_algo", [FP8, FP8_PER_CHANNEL, None])
def test_it_holds_the_very_decoder_of_the_tensorrt_llm_checkpoint(
    tiny: Checkpoint,
    spec: ModelSpec,
    calibrated: CalibrationResult,
    samples: list[torch.Tensor],
    tmp_path: Path,
    quant_algo: str | None,
) -> None:
    for write, name in ((hf_checkpoint_from, "hf"), (trtllm_checkpoint_from, "trtllm")):
        write(tiny, spec, tmp_path / name, calibration=calibrated, quant_algo=quant_algo)
    with torch.inference_mode():
        ours, theirs = decoder_from_hf(tmp_path / "hf"), decoder_from_trtllm(tmp_path / "trtllm")
        assert torch.equal(ours(samples[0][None]), theirs(samples[0][None]))


def test_bf16_is_the_source_again(tiny: Checkpoint, spec: ModelSpec, tmp_path: Path) -> None:
    written = hf_checkpoint_from(tiny, spec, tmp_path / "bf16", calibration=None)
    assert written.config == tiny.config
    assert not (tmp_path / "bf16" / "hf_quant_config.json").exists()
    before, after = tiny.tensors(""), written.tensors("")
    assert before.keys() == after.keys()
    assert [name for name in before if not same_bytes(before[name], after[name])] == []


def test_per_channel_needs_no_samples_and_has_a_scale_a_row(tiny: Checkpoint, spec: ModelSpec, tmp_path: Path) -> None:
    written = hf_checkpoint_from(
        tiny, spec, tmp_path / "rows", calibration=None, quant_algo=FP8_PER_CHANNEL, kv_cache_quant_algo=FP8
    )
    linear = f"{PREFIX}model.layers.2.mlp.up_proj"
    assert written.shape(f"{linear}.weight_scale") == (384,)
    assert f"{linear}.input_scale" not in written.infos
    assert written.tensor(f"{PREFIX}model.layers.2.self_attn.k_proj.k_scale").item() == 1.0
    assert "config_groups" not in written.config["quantization_config"]


def test_data_free_says_what_it_gives_up(
    tiny: Checkpoint, spec: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export = HfExport(tiny, layout_for(tiny, spec, FP8_PER_CHANNEL, FP8))
    export.write(tmp_path)
    assert len(export.notes["data-free"]) == 2
    assert all(loss in caplog.text for loss in export.notes["data-free"])


def test_keys_and_values_have_their_own_scales(fp8: Path, calibrated: CalibrationResult) -> None:
    tensors = Checkpoint.open(fp8).tensors(PREFIX)
    for layer in range(4):
        for which, kind in (("keys", "k"), ("values", "v")):
            scale = tensors[f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"]
            amax = calibrated.amax[f"model.layers.{layer}.self_attn.{which}"]
            assert torch.equal(scale, torch.tensor(amax) / 448)


def test_the_exclusions_name_all_that_is_not_quantised_and_nothing_that_is(fp8: Path) -> None:
    document = json.loads((fp8 / "hf_quant_config.json").read_text())
    config = json.loads((fp8 / "config.json").read_text())
    excluded = document["quantization"]["exclude_modules"]
    assert config["quantization_config"]["ignore"] == excluded
    for name, info in Checkpoint.open(fp8).infos.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(info.shape) > 1:
            is_excluded = any(fnmatch(module, pattern) for pattern in excluded)
            assert is_excluded == (info.dtype != "F8_E4M3"), name


def test_config_json_is_the_sources_and_says_how_it_is_quantised(tiny: Checkpoint, fp8: Path) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == tiny.config
    e4m3 = {"dynamic": False, "num_bits": 8, "type": "float"}
    assert quantization["quant_method"] == "modelopt"
    assert quantization["quant_algo"] == "FP8"
    assert quantization["kv_cache_scheme"] == e4m3
    assert quantization["config_groups"]["group_0"] == {
        "input_activations": e4m3,
        "weights": e4m3,
        "targets": ["Linear"],
    }


def test_shards_are_small_and_the_index_finds_every_tensor(fp8: Path) -> None:
    index = json.loads((fp8 / INDEX_NAME).read_text())
    shards = sorted(fp8.glob("*.safetensors"))
    assert len(shards) > 5
    tensors = {}
    for shard in shards:
        found = load_file(shard)
        size = sum(tensor.nbytes for tensor in found.values())
        assert size <= SMALL_SHARDS
        assert all(index["weight_map"][name] == shard.name for name in found)
        tensors |= found
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_what_engines_read_beside_the_weights_comes_along_and_other_weights_do_not(
    source: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    along = {"merges.txt", "LICENSE", "modeling_nvlm_d.py", "README.md", "chat_template.jinja"}
    stays = {"pytorch_model-00001-of-00046.bin", ".gitattributes", "pytorch_model.bin.index.json", "consolidated.pth"}
    for name in along | stays:
        (source / name).write_text(name)
    hf_checkpoint_from(Checkpoint.open(source), spec, tmp_path / "out", calibration=None)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found >= along | {"tokenizer.json", "preprocessor_config.json", "configuration_nvlm_d.py"}
    assert not found & stays
    assert all((tmp_path / "out" / name).read_text() == name for name in along)


def test_a_tensor_that_is_no_part_of_the_model_is_left_out(
    source: Path, spec: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_tensor(source, f"{PREFIX}model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(16))
    written = hf_checkpoint_from(Checkpoint.open(source), spec, tmp_path / "out", calibration=None)
    assert "inv_freq" in caplog.text
    assert not any("inv_freq" in name for name in written.names)


def test_an_existing_folder_is_replaced_by_force_only(tiny: Checkpoint, spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(NvlmError, match="exists and is not empty"):
        hf_checkpoint_from(tiny, spec, tmp_path, calibration=None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    hf_checkpoint_from(tiny, spec, tmp_path, calibration=None, force=True)
    assert not (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("place", [".", "..", "inside/out"])
def test_the_checkpoint_is_never_written_over(source: Path, spec: ModelSpec, place: str) -> None:
    before = digests(source)
    with pytest.raises(NvlmError, match="must not hold one another"):
        hf_checkpoint_from(Checkpoint.open(source), spec, source / place, calibration=None, force=True)
    assert digests(source) == before


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [("tokenizer.json", "no tokenizer in"), ("configuration_nvlm_d.py", "no configuration_nvlm_d.py in")],
)
def test_a_folder_that_no_engine_could_load_is_not_begun(
    source: Path, spec: ModelSpec, tmp_path: Path, missing: str, complaint: str
) -> None:
    (source / missing).unlink()
    with pytest.raises(NvlmError, match=complaint):
        hf_checkpoint_from(Checkpoint.open(source), spec, tmp_path / "out", calibration=None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_quantising_twice_is_refused(fp8: Path, spec: ModelSpec, tmp_path: Path) -> None:
    quantised = Checkpoint.open(fp8)
    with pytest.raises(NvlmError, match="is F8_E4M3, expected one of"):
        hf_checkpoint_from(quantised, spec, tmp_path / "out", calibration=None)
    with pytest.raises(NvlmError, match="quantised already"):
        spec_from_checkpoint(quantised)


@pytest.mark.parametrize(
    ("quantisation", "complaint"),
    [
        ({"quant_algo": FP8}, "needs a calibration"),
        ({"quant_algo": "INT4"}, "quant_algo is 'INT4'; supported"),
        ({"quant_algo": FP8_PER_CHANNEL, "kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo is 'INT8'"),
        ({"quant_algo": None, "kv_cache_quant_algo": FP8}, "no place in a Hugging Face folder"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(
    tiny: Checkpoint, spec: ModelSpec, tmp_path: Path, quantisation: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NvlmError, match=complaint):
        hf_checkpoint_from(tiny, spec, tmp_path / "out", calibration=None, **quantisation)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.layers.1.self_attn.values"])
def test_a_calibration_that_lacks_something_is_refused_and_names_it(
    tiny: Checkpoint, spec: ModelSpec, calibrated: CalibrationResult, tmp_path: Path, name: str
) -> None:
    amax = {key: value for key, value in calibrated.amax.items() if key != name}
    lacking = dataclasses.replace(calibrated, amax=amax)
    with pytest.raises(NvlmError, match=name.replace(".", r"\.")):
        hf_checkpoint_from(tiny, spec, tmp_path / "out", calibration=lacking, kv_cache_quant_algo=FP8)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_of_another_checkpoint_is_refused(
    tiny: Checkpoint, spec: ModelSpec, calibrated: CalibrationResult, tmp_path: Path
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    other = dataclasses.replace(calibrated, amax={**calibrated.amax, name: calibrated.amax[name] * 1.01})
    with pytest.raises(NvlmError, match=f"{name} has amax .* of another checkpoint"):
        hf_checkpoint_from(tiny, spec, tmp_path / "out", calibration=other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.encoder.layers.1.mlp.fc1.weight",
        "mlp1.0.bias",
        f"{PREFIX}lm_head.weight",
        f"{PREFIX}model.layers.1.self_attn.k_proj.bias",
        f"{PREFIX}model.layers.1.self_attn.k_proj.weight",
    ],
)
def test_nan_in_any_tensor_is_named_and_leaves_nothing(
    tiny: Checkpoint,
    spec: ModelSpec,
    calibrated: CalibrationResult,
    spoilt: Callable[[Checkpoint, str, float], Checkpoint],
    tmp_path: Path,
    name: str,
) -> None:
    with pytest.raises(NvlmError, match=f"{name} holds NaN"):
        hf_checkpoint_from(spoilt(tiny, name, float("nan")), spec, tmp_path / "out", calibration=calibrated)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_encoder_of_another_type_stays_of_it_to_the_bit(
    source: Path, spec: ModelSpec, tmp_path: Path, dtype: torch.dtype
) -> None:
    exact = {name: (Checkpoint.open(source).tensor(name).float() + 1e-7).to(dtype) for name in ENCODER}
    for name, tensor in exact.items():
        add_tensor(source, name, tensor)
    written = hf_checkpoint_from(Checkpoint.open(source), spec, tmp_path / "out", calibration=None)
    for name, tensor in exact.items():
        assert same_bytes(written.tensor(name), tensor)


@pytest.mark.parametrize("writes", [0, 1, 30, 111, 175])
def test_a_full_disk_is_the_machines_fault_and_the_next_run_goes_on(
    tiny: Checkpoint,
    spec: ModelSpec,
    calibrated: CalibrationResult,
    fp8: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
) -> None:
    honest, done = os.pwrite, []

    def nearly_full(*arguments: Any) -> int:
        done.append(1)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(*arguments)

    def write() -> Checkpoint:
        return hf_checkpoint_from(
            tiny,
            spec,
            tmp_path / "out",
            calibration=calibrated,
            kv_cache_quant_algo=FP8,
            max_shard_bytes=SMALL_SHARDS,
        )

    with monkeypatch.context() as patched:
        patched.setattr(resumable.os, "pwrite", nearly_full)
        with pytest.raises(MachineError, match="the disk is full"):
            write()
    assert not (tmp_path / "out").exists()
    assert digests(write().folder) == digests(fp8)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("document", ["tokenizer.json", "config.json"])
def test_a_disk_that_is_full_before_the_documents_is_the_machines_fault_too(
    tiny: Checkpoint, spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str
) -> None:
    def full(*arguments: Any) -> None:
        if any(isinstance(argument, Path) and argument.name == document for argument in arguments):
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(*arguments)

    owner, name = (shutil, "copyfile") if document == "tokenizer.json" else (hf_checkpoint, "write_text")
    honest = getattr(owner, name)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, full)
        with pytest.raises(MachineError, match="the disk is full"):
            hf_checkpoint_from(tiny, spec, tmp_path / "out", calibration=None)
    written = hf_checkpoint_from(tiny, spec, tmp_path / "out", calibration=None)
    assert written.config == tiny.config


KILLS = 10
# One process imports torch; a fork for each run is killed by it at a random moment, then another one is not.
SCRIPT = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.llm.calibrate import CalibrationResult
from nvlm_deploy.llm.hf_checkpoint import hf_checkpoint_from
from nvlm_deploy.model.spec import spec_from_checkpoint

source, amax, output, kills = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

def run(number, delay):
    process = os.fork()
    if process == 0:
        checkpoint = Checkpoint.open(source)
        hf_checkpoint_from(
            checkpoint, spec_from_checkpoint(checkpoint), output / str(number),
            calibration=CalibrationResult.load(amax), kv_cache_quant_algo="FP8", max_shard_bytes=500_000,
        )
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

start = time.monotonic()
assert run(0, None) == 0
seconds, chance = time.monotonic() - start, random.Random(0)
for number in range(1, kills + 1):
    print(run(number, chance.uniform(0, seconds)), flush=True)
    if not (output / str(number)).exists():
        assert run(number, None) == 0
"""


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_same_bytes(
    calibrated: CalibrationResult, fp8: Path, tmp_path: Path
) -> None:
    calibrated.save(tmp_path / "amax.json")
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-c", SCRIPT, TINY, tmp_path / "amax.json", tmp_path / "runs", str(KILLS)]
    ended = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.split()
    assert len(ended) == KILLS
    assert ended.count(str(-signal.SIGKILL)) > KILLS // 2
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == KILLS + 1
    assert all(digests(folder) == digests(fp8) for folder in folders)


def add_tensor(folder: Path, name: str, value: torch.Tensor) -> None:
    """In a shard of its own, in place of one of that name."""
    from safetensors.torch import save_file

    shard = f"{name}.safetensors"
    save_file({name: value}, folder / shard)
    index = json.loads((folder / INDEX_NAME).read_text())
    former = index["weight_map"].get(name)
    if former:
        rest = load_file(folder / former)
        del rest[name]
        save_file(rest, folder / former)
    index["weight_map"][name] = shard
    (folder / INDEX_NAME).write_text(json.dumps(index))


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
