"""The weights in a graph's file are the checkpoint's, and the FP8 scales those of its calibration: no tile shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.vision.numerics.check import check_numerics
from nvlm_deploy.vision.numerics.compare import noise_tiles
from nvlm_deploy.vision.numerics.subgraph import VisionGraph
from nvlm_deploy.vision.numerics.weights import weight_problem

pytestmark = pytest.mark.slow

BLOCK = "vision_model.encoder.layers.1"
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
TYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16, 17: torch.float8_e4m3fn}


def change(path: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """An initialiser in the data file, by its values in float32."""
    graph = onnx.load(path, load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    data = bytearray(path.with_name("vision.onnx.data").read_bytes())
    values = torch.frombuffer(data[offset : offset + length], dtype=TYPES[tensor.data_type]).reshape(list(tensor.dims))
    changed = edit(values.float().clone()).to(values.dtype).contiguous().reshape(-1)
    data[offset : offset + length] = changed.view(torch.uint8).numpy().tobytes()
    path.with_name("vision.onnx.data").write_bytes(data)


def copy_of(path: Path, folder: Path) -> Path:
    shutil.copytree(path.parent, folder / "vision")
    return folder / "vision" / path.name


def findings(path: Path, checkpoint: Any) -> list[str]:
    spec = spec_from_checkpoint(checkpoint)
    return [str(finding) for finding in check_numerics(path, checkpoint, spec, noise_tiles(2, 56), threads=1).findings]


@pytest.mark.parametrize("factor", [0.9, 1.02, 1.1])
def test_an_fp8_scale_that_is_a_little_off_is_named(short_checkpoint, export_vision, tmp_path, factor):
    path = copy_of(export_vision(short_checkpoint, "fp8"), tmp_path)
    for linear in LINEARS:
        change(path, f"{BLOCK}.{linear}.weight_scale", lambda scale: scale * factor)
    found = findings(path, short_checkpoint)
    assert found[0].startswith("block 1: qkv projection: ")
    ratio = float(found[0].split("weight_scale are ")[1].split()[0])
    assert ratio == pytest.approx(factor, rel=0.01)
    for place in ("output projection", "fc1", "fc2"):
        assert f"block 1: {place}: 0" in "; ".join(found)


def test_a_few_wrong_fp8_codes_are_named(short_checkpoint, export_vision, tmp_path):
    path = copy_of(export_vision(short_checkpoint, "fp8"), tmp_path)

    def three_rows_zero(codes: torch.Tensor) -> torch.Tensor:
        codes[7:10] = 0
        return codes

    change(path, f"{BLOCK}.mlp.fc2.weight", three_rows_zero)
    assert findings(path, short_checkpoint)[0].startswith("block 1: fc2: 0.02")


@pytest.mark.parametrize("factor", [0.5, 8])
def test_an_activation_scale_of_another_calibration_is_named(short_checkpoint, export_vision, tmp_path, factor):
    path = copy_of(export_vision(short_checkpoint, "fp8"), tmp_path)
    change(path, f"{BLOCK}.mlp.fc1.input_scale", lambda scale: scale * factor)
    amax = json.loads(path.with_name("calibration.json").read_text())["amax"]["block.1.norm2"]
    expected = f"block 1: fc1: {BLOCK}.mlp.fc1.input_scale holds up to {amax * factor:.1f}"
    assert findings(path, short_checkpoint)[0].startswith(expected[:-2])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_wrong_value_is_named_exactly(short_checkpoint, export_vision, tmp_path, precision):
    path = copy_of(export_vision(short_checkpoint, precision), tmp_path)

    def one_ulp(values: torch.Tensor) -> torch.Tensor:
        values[3, 5] *= 1.01
        return values

    change(path, f"{BLOCK}.attn.qkv.weight", one_ulp)
    first = findings(path, short_checkpoint)[0]
    assert first.startswith(f"block 1: qkv projection: 2e-05 of {BLOCK}.attn.qkv.weight in the file differs")


def test_rows_that_a_loud_channel_drowns_are_named(make_checkpoint, export_vision, tmp_path):
    def loud(weights: Any) -> None:
        for block in range(2):
            weights[f"vision_model.encoder.layers.{block}.mlp.fc2.bias"][5] = 300.0
            weights[f"vision_model.encoder.layers.{block}.ls2"][5] = 1.0

    def silenced(values: torch.Tensor) -> torch.Tensor:
        values[6 : 6 + len(values) // 10] = 0
        return values

    checkpoint = make_checkpoint(vision_layers=2, decoder_layers=1, edit=loud)
    path = copy_of(export_vision(checkpoint, "bf16"), tmp_path)
    assert not findings(path, checkpoint)
    change(path, f"{BLOCK}.ls1", silenced)
    assert findings(path, checkpoint)[0].startswith(f"block 1: attention residual: 0.094 of {BLOCK}.ls1 in the file")


def test_a_weight_without_its_name_is_not_taken_on_trust(short_checkpoint, export_vision, tmp_path):
    path = copy_of(export_vision(short_checkpoint, "bf16"), tmp_path)
    model = onnx.load(path, load_external_data=False)
    name = f"{BLOCK}.mlp.fc1.weight"
    for node in model.graph.node:
        node.input[:] = ["w" if source == name else source for source in node.input]
    next(tensor for tensor in model.graph.initializer if tensor.name == name).name = "w"
    onnx.save(model, path)
    assert findings(path, short_checkpoint)[0].startswith(f"block 1: fc1: the graph has no initialiser {name}")


@pytest.mark.parametrize("attention", [False, True])
def test_the_weights_of_an_export_are_right(short_checkpoint, export_vision, attention):
    graph = VisionGraph(export_vision(short_checkpoint, "fp8", attention=attention))
    for name in (f"{BLOCK}.mlp.fc1.weight", f"{BLOCK}.mlp.fc1.bias", "mlp1.1.weight"):
        assert weight_problem(graph, name, short_checkpoint.tensor(name).float()) is None
    misshapen = weight_problem(graph, "mlp1.1.weight", torch.zeros(3, 3))
    assert misshapen is not None
    assert "in the file, [3, 3] in the checkpoint" in misshapen
