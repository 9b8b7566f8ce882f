"""What calibration needs of the encoder on a CPU: memory while ONNX Runtime loads it, core-seconds a block and a tile.

    python tests/bench/bench_calibration_encoder.py      # 2 and 6 full-width blocks, 12 GB of disk, 8 GB of memory

The planner's rules for `calibrate-llm` (planning/build_steps.py) rest on this: weights of 16 bits are cast to float32
when the graph is loaded, and both are there for a while. Core-seconds, which other programs on the machine lengthen
little, are extrapolated to 45 blocks. Prints a table and, as its last line, one JSON object. Exit code 1 when memory or
time is beyond the planner's rule.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bench_vision_export import Run, child
from rich.console import Console
from synthetic import RELEASED_LAYERS, write_checkpoint

from nvlm_deploy.planning.build_steps import BESIDE_A_LAYER_BYTES, ENCODER_COPIES, ENCODER_FLOPS_PER_CORE_S
from nvlm_deploy.planning.known_models import DEFAULT_SPEC, planned_model
from nvlm_deploy.planning.roofline import encoder_flops
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table

MIB = 1 << 20
FEW, MORE, TILES = 2, 6, 2
# between the planner's rule and what is measured
MOST_TIMES = 1.5

EXPORT = """
import sys
from pathlib import Path
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.vision.export import onnx_from_checkpoint
from nvlm_deploy.vision.lowering import write_lowered
checkpoint, folder = Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2])
(folder / "lowered").mkdir(parents=True)
onnx_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint), folder / "exported", precision="bf16")
write_lowered(next((folder / "exported").glob("*.onnx")), folder / "lowered")
"""

ENCODE = """
import sys, time
from pathlib import Path
import numpy as np
from nvlm_deploy.vision.engine import OnnxRuntimeEngine
folder, count = Path(sys.argv[1]), int(sys.argv[2])
engine = OnnxRuntimeEngine(next((folder / "lowered").glob("*.onnx")))
tiles = np.random.default_rng(0).integers(0, 255, (count, 448, 448, 3), dtype=np.uint8)
engine(tiles)
times = []
for _ in range(3):
    started = time.process_time()
    engine(tiles)
    times.append(time.process_time() - started)
Path(folder / "seconds").write_text(str(min(times)))
"""


def encoded(folder: Path, layers: int) -> tuple[Run, float, int]:
    """The run, the least core-seconds of TILES tiles, and the bytes of the weights in 16 bits."""
    checkpoint, output = folder / f"checkpoint-{layers}", folder / f"graph-{layers}"
    write_checkpoint(checkpoint, layers)
    child(EXPORT, checkpoint, output)
    run = child(ENCODE, output, TILES)
    weights = sum(path.stat().st_size for path in (output / "lowered").iterdir())
    return run, float((output / "seconds").read_text()), weights


def verdicts(folder: Path) -> Iterator[Verdict]:
    few, more = (encoded(folder, layers) for layers in (FEW, MORE))
    for layers, (run, _, weights) in ((FEW, few), (MORE, more)):
        allowed = (ENCODER_COPIES * weights + BESIDE_A_LAYER_BYTES) / MIB
        name = f"{layers} blocks, {weights / 1e9:.2f} GB in BF16: peak memory"
        yield Verdict(Measurement(name, run.peak_mib, "MiB", 1), Bar("at most", round(allowed)))
    block_s = (more[1] - few[1]) / (MORE - FEW) / TILES
    tile_s = few[1] / TILES + (RELEASED_LAYERS - FEW) * block_s
    flops = sum(encoder_flops(planned_model(spec_name=DEFAULT_SPEC).spec).values())
    planned_s = flops / ENCODER_FLOPS_PER_CORE_S
    name = f"{RELEASED_LAYERS} blocks, a tile, from {block_s:.2f} core-seconds a block; planned: {planned_s:.0f}"
    found = Measurement(name, tile_s, "core-s", 3, evidence="derived")
    yield Verdict(found, Bar("at most", round(MOST_TIMES * planned_s)))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("engines/bench/calibration-encoder"))
    folder: Path = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    judged = list(verdicts(folder))
    shutil.rmtree(folder)
    Console(width=140).print(verdict_table(judged))
    results = {verdict.measurement.name: verdict.measurement.value for verdict in judged}
    bars = [verdict.as_json() for verdict in judged]
    print(json.dumps({"name": "calibration_encoder", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
