"""The exported graph computes what torch computes, and is never an artifact when it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx.external_data_helper import uses_external_data

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.inventory import vision_tensors
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.tensors import EMBEDDINGS, TILES
from nvlm_deploy.vision.engine import OnnxRuntimeEngine
from nvlm_deploy.vision.export import DATA_NAME, ONNX_NAME, VisionExport, onnx_from_checkpoint, vision_export
from nvlm_deploy.vision.numerics.compare import cosines, noise_tiles
from nvlm_deploy.vision.stages import stages
from nvlm_deploy.vision.trace import require_borders, traced_stage

pytestmark = pytest.mark.slow

QKV = "vision_model.encoder.layers.0.attn.qkv.weight"
# what TensorRT's parser has always read; nothing with run-time shapes but the batch axis
PLAIN_OPERATORS = """
Add Cast Concat Conv Div Expand Gelu LayerNormalization MatMul Mul Pow Reciprocal ReduceMean Reshape Shape Slice Softmax
Split Sqrt Sub Transpose
"""


@pytest.fixture(scope="module")
def graph(exported_vision):
    return onnx.load(exported_vision, load_external_data=False)


@pytest.fixture(scope="module")
def spec(random_checkpoint):
    return spec_from_checkpoint(random_checkpoint)


@pytest.fixture(scope="module")
def kept(make_checkpoint, tmp_path_factory):
    """A one-block checkpoint whose dummy heads hold noise, and its graph."""

    def disturb(weights) -> None:
        random = torch.Generator().manual_seed(1)
        weights[QKV] = torch.randn(weights[QKV].shape, generator=random).to(torch.bfloat16) / 11
        for name in ("q_norm.weight", "k_norm.weight"):
            weights[QKV.replace("qkv.weight", name)].fill_(1.5)

    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=disturb)
    path = onnx_from_checkpoint(
        checkpoint, spec_from_checkpoint(checkpoint), tmp_path_factory.mktemp("kept") / "vision", precision="fp32"
    )
    return checkpoint, path


def shape_of(value) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def compared(path, checkpoint, spec, count) -> tuple[float, float]:
    """Lowest cosine of a tile and largest relative error against torch in float32."""
    tiles = noise_tiles(count, 56, seed=count)
    with torch.inference_mode():
        expected = vision_tower_from_checkpoint(checkpoint, spec)(torch.from_numpy(tiles)).numpy()
    found = OnnxRuntimeEngine(path)(tiles)
    lowest, error = cosines(found, expected).min(), np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{count} tiles: cosine {lowest:.9f}, relative error {error:.1e}")
    return lowest, error


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_every_tile_equals_torch_in_float32(exported_vision, random_checkpoint, spec, count):
    lowest, error = compared(exported_vision, random_checkpoint, spec, count)
    assert lowest > 0.99999
    assert error < 1e-4


def test_the_borders_are_the_border_tensors_with_a_free_number_of_tiles(graph):
    (tiles,), (embeddings,) = graph.graph.input, graph.graph.output
    assert (tiles.name, shape_of(tiles)) == (TILES.name, ["tiles", 56, 56, 3])
    assert tiles.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert (embeddings.name, shape_of(embeddings)) == (EMBEDDINGS.name, ["tiles", 4, 256])


def test_only_plain_operators_are_in_the_graph(graph):
    assert {node.op_type for node in graph.graph.node} <= set(PLAIN_OPERATORS.split())
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]


def test_the_uint8_tiles_go_into_a_cast_and_nowhere_else_as_tensorrt_demands(graph):
    readers = {node.op_type for node in graph.graph.node if TILES.name in node.input}
    assert readers == {"Cast", "Shape"}  # TensorRT-RTX 1.7 refused a Transpose of uint8 and built this for SM80/89/120


def test_attention_is_two_products_around_a_softmax_and_no_shape_is_computed_in_it(graph):
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("Softmax") == 4
    assert operators.count("Shape") == 1  # the number of tiles, for the class token


def test_every_weight_lies_in_the_one_data_file_under_its_checkpoint_name(graph, exported_vision, spec):
    external = {tensor.name: tensor for tensor in graph.graph.initializer if uses_external_data(tensor)}
    assert set(external) == set(vision_tensors(spec))
    locations = {
        entry.value for tensor in external.values() for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {DATA_NAME}
    assert sorted(path.name for path in exported_vision.parent.iterdir()) == [ONNX_NAME, DATA_NAME]
    assert exported_vision.stat().st_size < 200_000


def test_the_weights_read_back_are_the_checkpoints(exported_vision, random_checkpoint):
    loaded = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(exported_vision).graph.initializer
    }
    for name in ("mlp1.3.weight", "vision_model.encoder.layers.3.mlp.fc2.weight"):
        assert np.array_equal(loaded[name], random_checkpoint.tensor(name).float().numpy())


def test_zero_dummy_heads_are_left_out(graph):
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}
    assert shapes[QKV] == [3 * 128, 128]
    assert {entry.key: entry.value for entry in graph.metadata_props} == {
        "nvlm.precision": "fp32",
        "nvlm.vision_heads": "4 of 11",
    }


def test_dummy_heads_that_hold_something_are_kept_with_the_real_divisor(kept):
    checkpoint, path = kept
    shapes = {tensor.name: list(tensor.dims) for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert shapes[QKV] == [3 * 11 * 32, 128]
    lowest, error = compared(path, checkpoint, spec_from_checkpoint(checkpoint), 2)
    assert lowest > 0.99999
    assert error < 1e-4


def test_the_graph_names_no_path_of_the_machine_that_built_it(exported_vision):
    content = exported_vision.read_bytes()
    assert b"/model/vision.py" not in content
    assert str(Path.cwd()).encode() not in content


def test_exporting_twice_gives_the_same_bytes(kept, tmp_path):
    checkpoint, first = kept
    second = onnx_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint), tmp_path / "again", precision="fp32")
    for name in (ONNX_NAME, DATA_NAME):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()


@pytest.fixture
def no_export(monkeypatch):
    """The exporter's seconds are not spent where the weights are what is wrong."""

    bfloat16 = onnx_ir.TensorType(onnx_ir.DataType.BFLOAT16)

    def traced(self):
        graph = onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20})
        for name, shape in vision_tensors(replace(self.spec, vision=self.vision)).items():
            graph.initializers.add(onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=bfloat16))
        return onnx_ir.Model(graph, ir_version=10)

    monkeypatch.setattr(VisionExport, "graph", traced)


@pytest.mark.usefixtures("no_export")
def test_a_tensor_of_the_wrong_shape_is_found_before_anything_is_written(make_checkpoint, tmp_path):
    def cut(weights) -> None:
        weights["mlp1.1.weight"] = weights["mlp1.1.weight"][:, :-1]

    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=cut)
    with pytest.raises(NvlmError, match=r"mlp1\.1\.weight .*\[384, 511\], expected \[384, 512\]"):
        onnx_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint), tmp_path / "vision")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_export")
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(make_checkpoint, tmp_path):
    def spoil(weights) -> None:
        weights["mlp1.3.weight"][5, 5] = float("nan")

    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=spoil)
    with pytest.raises(NvlmError, match=r"tensor mlp1\.3\.weight holds NaN or infinity"):
        onnx_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint), tmp_path / "vision")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("name", [QKV, "mlp1.1.weight", "vision_model.embeddings.position_embedding"])
def test_a_weight_of_zeros_is_named_and_nothing_is_written(make_checkpoint, tmp_path, name):
    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=lambda weights: weights[name].zero_())
    with pytest.raises(NvlmError, match=f"tensor {name} is all zeros") as refusal:
        onnx_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint), tmp_path / "vision")
    assert "fetch its shard again" in refusal.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_export")
def test_biases_layer_scales_and_dummy_heads_may_be_zero(make_checkpoint, tmp_path):
    def quiet(weights) -> None:
        for name in weights:
            if name.startswith(("vision_model.", "mlp1.")) and name.endswith(("bias", "ls1", "ls2", "class_embedding")):
                weights[name].zero_()

    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=quiet)
    export = vision_export(checkpoint, spec_from_checkpoint(checkpoint), precision="bf16")
    assert export.vision.padded_heads == 4
    for weight in export.weights():
        assert sum(map(len, weight.chunks())) == weight.shape[0]


@pytest.mark.usefixtures("no_export")
def test_an_unknown_precision_is_refused_with_those_there_are(random_checkpoint, spec, tmp_path):
    with pytest.raises(NvlmError, match="no vision precision 'int3'; there is fp32, fp16, bf16"):
        onnx_from_checkpoint(random_checkpoint, spec, tmp_path / "vision", precision="int3")


@pytest.mark.parametrize("frozen", ["tiles", "patch_embedding"])
def test_an_axis_that_the_exporter_froze_is_noticed(spec, frozen):
    prologue = stages(spec.vision)[0]
    model = traced_stage(prologue, spec, torch.float32)
    value = model.graph.inputs[0] if frozen == "tiles" else model.graph.outputs[0]
    value.shape = onnx_ir.Shape([2, *value.shape[1:]])
    with pytest.raises(RuntimeError, match=rf"the exporter made {frozen} \[2, .*\], not \['tiles', "):
        require_borders(model, prologue, spec)
