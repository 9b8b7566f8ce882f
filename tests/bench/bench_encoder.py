"""The encoder under torch, BF16 and FP8, at full width: ms a tile against the roofline of the device.

    python tests/bench/bench_encoder.py --device cuda --sku h100-sxm-80gb      a GPU, all blocks: not run yet
    python tests/bench/bench_encoder.py                                        a CPU: one block, no roofline

Weights are noise: time does not depend on them. FP8 is static and per tensor in the four linears of every block, as
vision/quantize.py quantises them; its cosine against BF16 is printed so that a wrong kernel does not pass for a fast
one.
Prints a table and, as its last line, one JSON object. Exit code 1 when FP8's least cosine is below 0.98.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from synthetic import RELEASED_LAYERS, released_config
from torch import nn

from nvlm_deploy.model.fp8 import scale_from_amax, to_e4m3
from nvlm_deploy.model.fp8_linear import Fp8Linear
from nvlm_deploy.model.spec import ModelSpec, spec_from_config
from nvlm_deploy.model.vision import VisionTower
from nvlm_deploy.planning.roofline import encoder_flops
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table
from nvlm_deploy.sku import Sku, load_sku

ROUNDS = 10
LEAST_COSINE = 0.98
HEADS = 25  # without the dummy heads, as exported
Row = dict[str, float | str]

FP8_LINEARS = ("qkv", "proj", "fc1", "fc2")


def noise_tower(spec: ModelSpec, device: str) -> VisionTower:
    """BF16 weights of a size that keeps activations near one, made where they are used."""
    with torch.device("meta"):
        tower = VisionTower(spec.vision, spec.projector)
    tower = tower.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, weight in tower.named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "mlp1.0.weight")):
            weight.fill_(1.0)
        elif name.endswith(("ls1", "ls2")):
            weight.fill_(0.1)
        else:
            weight.normal_(std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
    fresh = type(tower.normalisation)()
    tower.normalisation = fresh.to(device)
    return tower


def quantise(tower: VisionTower, tiles: torch.Tensor) -> None:
    """Block linears become Fp8Linear, in place, with scales from what these tiles send through them."""
    amax: dict[nn.Linear, torch.Tensor] = {}

    def watch(linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        found = inputs[0].abs().amax()
        amax[linear] = torch.maximum(amax[linear], found) if linear in amax else found

    places = [
        (parent, name)
        for block in tower.vision_model.blocks
        for parent in (block.attn, block.mlp)
        for name in FP8_LINEARS
        if hasattr(parent, name)
    ]
    handles = [getattr(parent, name).register_forward_pre_hook(watch) for parent, name in places]
    tower(tiles)
    for handle in handles:
        handle.remove()
    for parent, name in places:
        linear = getattr(parent, name)
        scale = scale_from_amax(linear.weight.abs().amax().float())
        codes = to_e4m3(linear.weight, scale)
        setattr(parent, name, Fp8Linear(codes, scale, scale_from_amax(amax[linear].float()), linear.bias))


def seconds_of(run: Callable[[], torch.Tensor], device: str) -> float:
    """Median of ROUNDS on a GPU after three that are not kept, of three on a CPU."""
    rounds = ROUNDS if device == "cuda" else 3
    found = []
    for number in range(rounds + 3):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            found.append(time.perf_counter() - start)
    return median(found)


def tflop_of_a_tile(spec: ModelSpec) -> float:
    """Useful work: dummy heads are pruned here, as they are in the engine."""
    return sum(encoder_flops(spec).values()) / 1e12


def least_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Over tiles."""
    return float(torch.cosine_similarity(one.float().flatten(1), other.float().flatten(1)).min())


def table_of(rows: list[Row], sku: Sku | None) -> Table:
    table = Table("precision", "tiles", "ms", "ms a tile", "TFLOP/s", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("of peak" if sku else "of peak (no --sku)")
    for row in rows:
        share = f"{100 * float(row['share']):.0f} %" if "share" in row else "-"
        numbers = (f"{row['ms']:.2f}", f"{row['ms_per_tile']:.3f}", f"{row['tflops']:.2f}")
        table.add_row(str(row["precision"]), str(row["tiles"]), *numbers, share)
    return table


def measured(spec: ModelSpec, counts: list[int], device: str, sku: Sku | None) -> tuple[list[Row], float]:
    """A row for each precision and tile count, and FP8's least cosine against BF16."""
    size = spec.tiling.tile_size
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (max(counts), size, size, 3), dtype=torch.uint8, generator=generator).to(device)
    tower = noise_tower(spec, device)
    rows: list[Row] = []
    kept = tower(tiles)
    for precision in ("bf16", "fp8"):
        if precision == "fp8":
            quantise(tower, tiles)
        for count in counts:
            seconds = seconds_of(lambda count=count: tower(tiles[:count]), device)
            rows.append(row_of(precision, count, seconds, tflop_of_a_tile(spec), sku))
    return rows, least_cosine(tower(tiles), kept)


def row_of(precision: str, tiles: int, seconds: float, tflop: float, sku: Sku | None) -> Row:
    row: Row = {"precision": precision, "tiles": tiles, "ms": 1e3 * seconds}
    row |= {"ms_per_tile": 1e3 * seconds / tiles, "tflops": tiles * tflop / seconds}
    if sku is not None:
        row["share"] = float(row["tflops"]) / sku.dense_tflops[precision]
    return row


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sku", help="whose peak is the roofline, as h100-sxm-80gb")
    parser.add_argument("--blocks", type=int, help=f"{RELEASED_LAYERS} on a GPU, 1 on a CPU")
    parser.add_argument("--tiles", type=int, nargs="+", help="1 7 28 on a GPU, 1 on a CPU")
    arguments = parser.parse_args()
    sku = load_sku(arguments.sku) if arguments.sku else None
    on_gpu = arguments.device == "cuda"
    blocks = arguments.blocks or (RELEASED_LAYERS if on_gpu else 1)
    spec = spec_from_config(released_config(blocks), padded_heads=HEADS)
    rows, cosine = measured(spec, arguments.tiles or ([1, 7, 28] if on_gpu else [1]), arguments.device, sku)
    where = torch.cuda.get_device_name() if on_gpu else device_name()
    console = Console(highlight=False)
    print(f"{blocks} block(s), {tflop_of_a_tile(spec):.2f} TFLOP a tile, {where}")
    console.print(table_of(rows, sku))
    verdicts = [Verdict(Measurement("FP8, least cosine of a tile", cosine, "", 1), Bar("at least", LEAST_COSINE))]
    console.print(verdict_table(verdicts))
    bars = [verdict.as_json() for verdict in verdicts]
    print(json.dumps({"name": "encoder", "device": where, "rows": rows, "bars": bars}))
    return 0 if all_hold(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
