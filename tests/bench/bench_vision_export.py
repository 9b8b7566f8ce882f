"""Vision export at full width: memory, time against a plain copy and against torch.onnx.export, every byte read back.

    python tests/bench/bench_vision_export.py --full        the released shapes: 45 blocks, about 13 GB in, 12 GB out
    python tests/bench/bench_vision_export.py --layers 4    four blocks, beside torch.onnx.export with its weights

Needs three times the checkpoint's size on the disk of --folder. Prints a table and, as its last line, one JSON object.
Exit code 1 when a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table

HERE = Path(__file__).parent
MIB = 1 << 20
# 1.5 GiB; 60 s and three plain copies; against torch.onnx.export a quarter of the memory and no more time
PEAK_MIB = 1536
START_S, COPIES = 60, 3
PEAK_SHARE, TIME_SHARE = 0.25, 1.0


@dataclass(frozen=True)
class Run:
    """One child process: seconds from start to end, and the most memory it had (VmHWM, mapped files included)."""

    seconds: float
    peak_mib: float


def child(code: str, *arguments: object) -> Run:
    """Run Python code, which finds its arguments in sys.argv; it must succeed."""
    report = "\nprint('VmHWM', next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
    started = time.monotonic()
    command = [sys.executable, "-c", code + report, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    peak_kib = int(output.rsplit("VmHWM", 1)[1])
    return Run(time.monotonic() - started, peak_kib * 1024 / MIB)


OURS = """
import sys
from pathlib import Path
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.vision.export import onnx_from_checkpoint
checkpoint = Checkpoint.open(Path(sys.argv[1]))
onnx_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint), Path(sys.argv[2]), precision="bf16")
"""

# the usual way: the same network with its weights, the same opset, external data
PEER = """
import sys
from pathlib import Path
import torch
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
checkpoint = Checkpoint.open(Path(sys.argv[1]))
tower = vision_tower_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint), torch.bfloat16)
tiles = torch.zeros(2, 448, 448, 3, dtype=torch.uint8)
Path(sys.argv[2]).mkdir()
torch.onnx.export(
    tower, (tiles,), Path(sys.argv[2]) / "vision.onnx", dynamo=True, opset_version=20, external_data=True,
    dynamic_shapes=({0: torch.export.Dim("tiles", min=1)},), verbose=False,
)
"""

# by another reader than the one that wrote: onnx's own, a tensor at a time
READ_BACK = """
import sys
from pathlib import Path
import numpy as np, onnx, torch
from safetensors import safe_open
from nvlm_deploy.checkpoint.reader import Checkpoint
checkpoint = Checkpoint.open(Path(sys.argv[1]))
path = Path(sys.argv[2]) / "vision.onnx"
onnx.checker.check_model(str(path), full_check=True)
data = np.memmap(path.with_name("vision.onnx.data"), dtype=np.uint8, mode="r")
compared = 0
for tensor in onnx.load(path, load_external_data=False).graph.initializer:
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place:
        continue
    begin, size = int(place["offset"]), int(place["length"])
    with safe_open(checkpoint.info(tensor.name).shard, "pt") as shard:
        expected = shard.get_tensor(tensor.name)
    if list(expected.shape) != list(tensor.dims):  # dummy heads left out
        if tensor.name.endswith("qkv.weight"):
            expected = expected.view(3, 4096, -1)[:, :3200].reshape(9600, -1)
        else:
            expected = expected[..., :3200]
    expected = expected.contiguous().reshape(-1).view(torch.uint8).numpy()
    assert np.array_equal(data[begin:begin + size], expected), tensor.name
    compared += size
print("compared", compared)
"""


def forget(folder: Path) -> None:
    """Out of the page cache, so that whoever reads first does not pay for all."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy every file and have it on the disk; the copy is removed."""
    forget(source)
    started = time.monotonic()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def exported(checkpoint: Path, output: Path, code: str) -> Run:
    shutil.rmtree(output, ignore_errors=True)
    forget(checkpoint)
    return child(code, checkpoint, output)


def verdicts(folder: Path, layers: int, *, with_peer: bool) -> list[Verdict]:
    checkpoint, ours = folder / f"checkpoint-{layers}", folder / f"ours-{layers}"
    if not (checkpoint / "config.json").is_file():
        shutil.rmtree(checkpoint, ignore_errors=True)
        subprocess.run([sys.executable, str(HERE / "synthetic.py"), str(checkpoint), str(layers)], check=True)
    copy_s = plain_copy(checkpoint, folder / "copy")
    run = exported(checkpoint, ours, OURS)
    read_back = int(not subprocess.run([sys.executable, "-c", READ_BACK, str(checkpoint), str(ours)]).returncode)
    size_gb = sum(path.stat().st_size for path in ours.iterdir()) / 1e9
    judged = [
        Verdict(
            Measurement(f"export, {layers} blocks, {size_gb:.1f} GB: peak RSS", run.peak_mib, "MiB", 1),
            Bar("at most", PEAK_MIB),
        ),
        Verdict(
            Measurement(f"export, wall (a plain copy took {copy_s:.1f} s)", run.seconds, "s", 1),
            Bar("at most", round(START_S + COPIES * copy_s, 1)),
        ),
        Verdict(
            Measurement("onnx.checker passes, every initialiser equals the checkpoint", read_back, "", 1),
            Bar("at least", 1),
        ),
    ]
    if with_peer:
        peer = exported(checkpoint, folder / f"peer-{layers}", PEER)
        judged += [
            Verdict(
                Measurement(
                    f"peak RSS over torch.onnx.export's {peer.peak_mib:.0f} MiB", run.peak_mib / peer.peak_mib, "", 1
                ),
                Bar("at most", PEAK_SHARE),
            ),
            Verdict(
                Measurement(f"wall over torch.onnx.export's {peer.seconds:.1f} s", run.seconds / peer.seconds, "", 1),
                Bar("at most", TIME_SHARE),
            ),
        ]
        shutil.rmtree(folder / f"peer-{layers}")
    return judged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="45 blocks")
    size.add_argument("--layers", type=int, default=4, help="so many blocks, beside torch.onnx.export (default: 4)")
    parser.add_argument("--folder", type=Path, default=Path("engines/bench/vision-export"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    layers = 45 if arguments.full else arguments.layers
    judged = verdicts(arguments.folder, layers, with_peer=not arguments.full)
    Console().print(verdict_table(judged))
    results = {verdict.measurement.name: verdict.measurement.value for verdict in judged}
    bars = [verdict.as_json() for verdict in judged]
    print(json.dumps({"name": "vision_export", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
