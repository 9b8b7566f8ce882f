"""The decoder to FP8 for two ranks at the released width: memory and time, beside ModelOpt and a plain copy.

    python tests/bench/bench_quantize.py              2 layers, embeddings and head: 8.5 GB in, 6.7 GB out
    python tests/bench/bench_quantize.py --layers 4

Without samples (FP8_PER_CHANNEL_PER_TOKEN, from the weights alone) and with 4 samples of 256 tokens (FP8 with static
scales). ModelOpt does the same from the same files: load, quantise, export; both sides' tensors are then compared.
Every run begins with nothing in the page cache and ends with its output on the disk.

Needs three times the checkpoint's size on the disk of --folder. Prints tables and, as its last line, one JSON object.
Exit code 1 when a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_vision_export import MIB, forget
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from synthetic import hash_of, released_config

from nvlm_deploy.checkpoint.reader import INDEX_NAME
from nvlm_deploy.checkpoint.stream import tensor_stream
from nvlm_deploy.model.decoder import PREFIX, Decoder
from nvlm_deploy.model.spec import spec_from_config
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table

SAMPLES, TOKENS, RANKS = 4, 256, 2
RELEASED_LAYERS = 80
# the bars: GiB of memory; against ModelOpt's whole path; against a plain copy
DATA_FREE_MIB, CALIBRATED_MIB = 3 * 1024, 6 * 1024
TIMES_FASTER, COPIES, PEAK_SHARE = 2.0, 1.5, 1 / 3
SCALE_DIFFERENCE = 0.02
# one block of noise serves all tensors, each from another place
NOISE_VALUES = 1 << 26
COPY_BYTES = 1 << 24
SAMPLES_NAME = "samples.safetensors"

OURS = """
import sys, time
from pathlib import Path
from safetensors.torch import load_file
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL, Parallelism
from nvlm_deploy.llm.calibrate import calibrate
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.spec import spec_from_config
phase("start")
folder, output, with_samples = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "samples"
checkpoint = Checkpoint.open(folder)
spec = spec_from_config(checkpoint.config)
calibration = None
if with_samples:
    samples = load_file(folder.parent / "samples.safetensors").values()
    calibration = calibrate(checkpoint, spec, samples, work_folder=output.with_name("calibration"))
    phase("calibrate")
trtllm_checkpoint_from(
    checkpoint, spec, output, calibration=calibration, quant_algo=FP8 if with_samples else FP8_PER_CHANNEL,
    parallelism=Parallelism(2),
)
phase("export")
"""

# loaded in the way that is cheapest for it: tensors as they are in the files, no weights made first to be replaced
PEER = """
import contextlib, io, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from nvlm_deploy.checkpoint.reader import Checkpoint
phase("start")
folder, output, with_samples = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "samples"
checkpoint = Checkpoint.open(folder)
config = Qwen2Config(**{**checkpoint.config["llm_config"], "model_type": "qwen2"})
with torch.device("meta"):
    model = Qwen2ForCausalLM(config)
weights = {}
for shard in checkpoint.shards:
    with safe_open(shard, "pt") as file:
        weights |= {name.removeprefix("language_model."): file.get_tensor(name) for name in file.keys()}
model.load_state_dict(weights, assign=True)
model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
model.eval()
del weights
phase("load")
def run_all(model):
    for sample in load_file(folder.parent / "samples.safetensors").values():
        model(inputs_embeds=sample[None], logits_to_keep=1, use_cache=False)
with contextlib.redirect_stdout(io.StringIO()):
    if with_samples:
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, run_all)
    else:
        mtq.quantize(model, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
phase("quantise")
with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
    export_tensorrt_llm_checkpoint(model, "qwen", torch.bfloat16, output, inference_tensor_parallel=2)
phase("export")
"""

PROLOGUE = """
import os, sys, time
began = time.monotonic()
def phase(name):
    global began
    now = time.monotonic()
    print("PHASE", name, now - began, flush=True)
    began = now
"""
EPILOGUE = """
for path in output.iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
phase("to disk")
print("VmHWM", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@dataclass(frozen=True)
class Run:
    """One child process: seconds from start to end and of its phases, and the most memory it had (VmHWM)."""

    name: str
    seconds: float
    phases: dict[str, float]
    peak_mib: float


def run(name: str, code: str, checkpoint: Path, output: Path, samples: str) -> Run:
    """The child's output folder is the caller's to remove."""
    forget(checkpoint)
    command = [sys.executable, "-c", PROLOGUE + code + EPILOGUE, str(checkpoint), str(output), samples]
    started = time.monotonic()
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    seconds = time.monotonic() - started
    phases = {line.split(" ", 1)[1].rsplit(" ", 1)[0]: line for line in lines if line.startswith("PHASE ")}
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return Run(
        name, seconds, {phase: float(line.rsplit(" ", 1)[1]) for phase, line in phases.items()}, peak_kib * 1024 / MIB
    )


def config_of(layers: int) -> dict[str, Any]:
    config = released_config()
    config["llm_config"]["num_hidden_layers"] = layers
    return config


def write_decoder(folder: Path, layers: int) -> None:
    """BF16 shards of the decoder alone, one for the embedding table, for each layer, and for the rest."""
    folder.mkdir(parents=True)
    config = config_of(layers)
    with torch.device("meta"):
        decoder = Decoder(spec_from_config(config).decoder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in decoder.state_dict().items():
        shard = f"model-{'.'.join(name.removeprefix('model.').split('.')[:2])}.safetensors"
        shards.setdefault(shard, {})[PREFIX + name] = tuple(tensor.shape)
    noise = torch.randn(NOISE_VALUES, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for shard, shapes in shards.items():
        with tensor_stream(folder / shard, {name: ("BF16", shape) for name, shape in shapes.items()}) as stream:
            for name, shape in shapes.items():
                stream.put(name, _tensor(name, shape, noise))
    weight_map = {name: shard for shard, shapes in shards.items() for name in shapes}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def _tensor(name: str, shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    """Of a size that keeps activations near one."""
    start, count = hash_of(name) % (NOISE_VALUES // 2), math.prod(shape)
    values = noise.repeat(-(-(start + count) // NOISE_VALUES))[start : start + count].reshape(shape)
    if "norm" in name:
        return 1 + 0.1 * values
    return values * (0.1 if len(shape) == 1 else shape[1] ** -0.5)


def write_samples(path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = released_config()["llm_config"]["hidden_size"]
    samples = {str(n): torch.randn(TOKENS, hidden, generator=generator).to(torch.bfloat16) for n in range(SAMPLES)}
    save_file(samples, path)


def plain_copy(source: Path, target: Path, size_bytes: int) -> float:
    """Seconds to read every file of a folder and to have so many of the bytes on the disk."""
    forget(source)
    started = time.monotonic()
    with target.open("wb") as copy:
        for path in sorted(source.iterdir()):
            with path.open("rb") as file:
                while data := file.read(COPY_BYTES):
                    if copy.tell() < size_bytes:
                        copy.write(data)
        copy.flush()
        os.fsync(copy.fileno())
    seconds = time.monotonic() - started
    target.unlink()
    return seconds


@dataclass(frozen=True)
class Disk:
    """Bytes a second, one after the other."""

    read: float
    write: float


def disk_of(source: Path, target: Path) -> Disk:
    """One shard read, with nothing of it in the page cache, and written."""
    forget(source)
    path = max(source.iterdir(), key=lambda path: path.stat().st_size)
    size = path.stat().st_size
    started = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while data := file.read(COPY_BYTES):
            pass
    read = time.monotonic()
    with target.open("wb", buffering=0) as file:
        data = bytes(COPY_BYTES)
        for _ in range(size // COPY_BYTES):
            file.write(data)
        os.fsync(file.fileno())
    written = time.monotonic()
    target.unlink()
    return Disk(size / (read - started), size / (written - read))


@dataclass(frozen=True)
class Difference:
    """Between both sides' tensors: how many differ in a byte, and by how much activation scales do."""

    tensors: int
    activation_scale: float


def difference(ours: Path, theirs: Path) -> Difference:
    """All tensors of all ranks; where names or shapes differ, every one counts as different."""
    pairs = list(_pairs(ours, theirs))
    scales = [abs(one.item() / other.item() - 1) for name, one, other in pairs if "activation" in name]
    different = [name for name, one, other in pairs if "activation" not in name and not _same(one, other)]
    return Difference(len(different), max(scales, default=0.0))


def _pairs(ours: Path, theirs: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for rank in range(RANKS):
        name = f"rank{rank}.safetensors"
        with safe_open(ours / name, "pt") as mine, safe_open(theirs / name, "pt") as peers:
            if set(mine.keys()) != set(peers.keys()):
                raise SystemExit(f"{name}: tensors differ: {set(mine.keys()) ^ set(peers.keys())}")
            for tensor in mine.keys():  # noqa: SIM118 - not a dict
                yield tensor, mine.get_tensor(tensor), peers.get_tensor(tensor)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def runs_table(runs: list[Run]) -> Table:
    table = Table("", "wall", "peak RSS", "phases", title="whole paths, from start to disk", box=box.SIMPLE)
    for one in runs:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in one.phases.items())
        table.add_row(one.name, f"{one.seconds:.1f} s", f"{one.peak_mib:,.0f} MiB", phases)
    return table


def compared(folder: Path, checkpoint: Path, samples: str) -> tuple[Run, Run, Difference, int]:
    """Ours and ModelOpt's run of one recipe, and bytes that ours wrote; both outputs are removed."""
    what = "4 samples" if samples == "samples" else "data-free"
    ours, theirs = folder / f"ours-{samples}", folder / f"theirs-{samples}"
    for output in (ours, theirs, folder / "calibration"):
        shutil.rmtree(output, ignore_errors=True)
    own = run(f"ours, {what}", OURS, checkpoint, ours, samples)
    written = size_of(ours)
    peer = run(f"ModelOpt, {what}", PEER, checkpoint, theirs, samples)
    found = difference(ours, theirs)
    for output in (ours, theirs, folder / "calibration"):
        shutil.rmtree(output, ignore_errors=True)
    return own, peer, found, written


def verdict(what: str, value: float, unit: str, sense: Any, bound: float) -> Verdict:
    return Verdict(Measurement(what, value, unit, 1), Bar(sense, bound))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default: 2)")
    parser.add_argument("--folder", type=Path, default=Path("engines/bench/quantize"), help="removed at the end")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    try:
        return bench(arguments.folder, arguments.layers)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def bench(folder: Path, layers: int) -> int:
    checkpoint = folder / "checkpoint"
    write_decoder(checkpoint, layers)
    write_samples(folder / SAMPLES_NAME)
    free, peer_free, free_difference, written = compared(folder, checkpoint, "none")
    copy_s = plain_copy(checkpoint, folder / "copy", written)
    calibrated, peer_calibrated, difference_, _ = compared(folder, checkpoint, "samples")
    disk = disk_of(checkpoint, folder / "copy")

    allowed_s = max(peer_free.seconds / TIMES_FASTER, COPIES * copy_s)
    judged = [
        verdict("data-free: peak RSS", free.peak_mib, "MiB", "at most", DATA_FREE_MIB),
        verdict(
            f"data-free: wall, against half of ModelOpt's {peer_free.seconds:.1f} s or 1.5 copies of {copy_s:.1f} s",
            free.seconds,
            "s",
            "at most",
            round(allowed_s, 1),
        ),
        verdict(
            "data-free: peak RSS over ModelOpt's",
            free.peak_mib / peer_free.peak_mib,
            "",
            "at most",
            round(PEAK_SHARE, 3),
        ),
        verdict("data-free: tensors that differ from ModelOpt's", free_difference.tensors, "", "at most", 0),
        verdict(f"{SAMPLES} samples: peak RSS", calibrated.peak_mib, "MiB", "at most", CALIBRATED_MIB),
        verdict(
            f"{SAMPLES} samples: wall over ModelOpt's {peer_calibrated.seconds:.1f} s",
            calibrated.seconds / peer_calibrated.seconds,
            "",
            "at most",
            1,
        ),
        verdict(
            f"{SAMPLES} samples: peak RSS over ModelOpt's",
            calibrated.peak_mib / peer_calibrated.peak_mib,
            "",
            "at most",
            round(PEAK_SHARE, 3),
        ),
        verdict(f"{SAMPLES} samples: weights that differ from ModelOpt's", difference_.tensors, "", "at most", 0),
        verdict(
            f"{SAMPLES} samples: largest difference of an activation scale",
            difference_.activation_scale,
            "",
            "at most",
            SCALE_DIFFERENCE,
        ),
    ]
    figures = rates(checkpoint, layers, written, disk, free, calibrated)
    console = Console()
    console.print(runs_table([free, peer_free, calibrated, peer_calibrated]))
    for name, value in figures.items():
        console.print(f"  {name}: {value:.2f}", highlight=False)
    console.print(verdict_table(judged))
    results = {v.measurement.name: v.measurement.value for v in judged} | figures
    results |= {f"{one.name}: wall, s": one.seconds for one in (free, peer_free, calibrated, peer_calibrated)}
    results |= {f"{one.name}: peak RSS, MiB": one.peak_mib for one in (free, peer_free, calibrated, peer_calibrated)}
    bars = [v.as_json() for v in judged]
    print(json.dumps({"name": "quantize", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


def rates(checkpoint: Path, layers: int, written: int, disk: Disk, free: Run, calibrated: Run) -> dict[str, float]:
    """What was moved in a second, and what all layers take by that; the disk's limit beside it.

    Bytes of a layer, not of the whole, are multiplied: embedding table and head are there once. What is written is read
    back, so the disk moves it twice.
    """
    read = size_of(checkpoint)
    layer_read = sum(2 * math.prod(shape) for shape in _layer_shapes())
    more_layers = RELEASED_LAYERS - layers
    full_read, full_written = read + more_layers * layer_read, written + more_layers * layer_read // 2
    rate = (read + written) / free.phases["export"]
    return {
        "data-free: GB/s read and written": rate / 1e9,
        f"data-free: derived for {RELEASED_LAYERS} layers, min": (full_read + full_written) / rate / 60,
        f"{SAMPLES} samples: GB/s read and written by the export": (read + written) / calibrated.phases["export"] / 1e9,
        f"{SAMPLES} samples: derived for {RELEASED_LAYERS} layers, min": (
            calibrated.phases["calibrate"] / layers * RELEASED_LAYERS
            + (full_read + full_written) * calibrated.phases["export"] / (read + written)
        )
        / 60,
        "disk: GB/s read": disk.read / 1e9,
        "disk: GB/s written": disk.write / 1e9,
        f"disk: limit for {RELEASED_LAYERS} layers, reading once and writing once, min": (
            full_read / disk.read + full_written / disk.write
        )
        / 60,
        "disk: the same with what was written read back, min": (
            (full_read + full_written) / disk.read + full_written / disk.write
        )
        / 60,
    }


def _layer_shapes() -> list[torch.Size]:
    with torch.device("meta"):
        layer = Decoder(spec_from_config(config_of(1)).decoder).model.layers[0]
    return [tensor.shape for tensor in layer.state_dict().values()]


if __name__ == "__main__":
    sys.exit(main())
