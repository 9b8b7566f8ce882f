"""A lowered graph gives what the 16-bit or FP8 graph means, whatever ONNX Runtime's optimiser does to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_ir import DataType

from nvlm_deploy.vision.element_types import HALF_TYPES, element_types
from nvlm_deploy.vision.engine import OnnxRuntimeEngine
from nvlm_deploy.vision.lowering import lowered, write_lowered
from nvlm_deploy.vision.numerics.compare import cosines, noise_tiles
from nvlm_deploy.vision.numerics.subgraph import VisionGraph

pytestmark = pytest.mark.slow

HALVES = {torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16}
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
ELEMENTWISE = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "MatMul": lambda a, b: (a.float() @ b.float()).to(a.dtype),
}


def model_of(nodes, inputs, outputs, initialisers=()) -> onnx_ir.Model:
    sides = [
        [helper.make_tensor_value_info(name, element_type, None) for name, element_type in side.items()]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "part", *sides, list(initialisers))
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def run(model: onnx_ir.Model, level: str = "ORT_ENABLE_ALL", **inputs: torch.Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    content = onnx_ir.to_proto(lowered(model)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.float().numpy() for name, tensor in inputs.items()})


def noise(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("operator", ELEMENTWISE)
def test_an_operator_equals_torchs_16_bit_arithmetic_bit_for_bit(operator, dtype, level):
    half = HALVES[dtype]
    model = model_of([helper.make_node(operator, ["a", "b"], ["y"])], {"a": half, "b": half}, {"y": half})
    a, b = noise(32, 32, dtype=dtype), noise(32, 32, dtype=dtype, seed=1)
    (found,) = run(model, level, a=a, b=b)
    assert np.array_equal(found, ELEMENTWISE[operator](a, b).float().numpy())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_result_of_a_chain_is_rounded_on_its_way(dtype, level):
    half = HALVES[dtype]
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=half),
        helper.make_node("Mul", ["x16", "x16"], ["square"]),
        helper.make_node("Add", ["square", "x16"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    x = noise(64, 64)
    (found,) = run(model_of(nodes, {"x": 1}, {"y": 1}), level, x=x)
    narrow = x.to(dtype)
    assert np.array_equal(found, (narrow * narrow + narrow).float().numpy())


def test_what_half_precision_cannot_hold_becomes_infinite():
    half = TensorProto.FLOAT16
    model = model_of([helper.make_node("Mul", ["a", "a"], ["y"])], {"a": half}, {"y": half})
    (found,) = run(model, a=torch.tensor([255.0, 256.0]))
    assert found.tolist() == [65024.0, np.inf]


def test_constants_and_castlike_keep_their_16_bit_values():
    value = helper.make_tensor("value", TensorProto.BFLOAT16, [1], [1 / 3])
    nodes = [
        helper.make_node("Constant", [], ["third"], value=value),
        helper.make_node("CastLike", ["x", "third"], ["x16"]),
        helper.make_node("Mul", ["x16", "third"], ["y"]),
    ]
    x = noise(16)
    (found,) = run(model_of(nodes, {"x": 1}, {"y": TensorProto.BFLOAT16}), x=x)
    assert np.array_equal(found, (x.bfloat16() * torch.tensor(1 / 3).bfloat16()).float().numpy())


@pytest.mark.parametrize("level", LEVELS)
def test_fp8_codes_and_their_16_bit_values_are_the_graphs_own(level):
    scale = helper.make_tensor("scale", TensorProto.BFLOAT16, [], [0.05])
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    half = TensorProto.BFLOAT16
    x = noise(64, 64, dtype=torch.bfloat16) * 5
    (found,) = run(model_of(nodes, {"x": half}, {"y": half}, [scale, zero]), level, x=x)
    factor = torch.tensor(0.05).bfloat16().float()
    codes = (x.float() / factor).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert np.array_equal(found, (codes.float() * factor).bfloat16().float().numpy())
    assert found.max() == (448 * factor).bfloat16()  # saturated, not infinite


def test_a_float32_graph_is_returned_as_it_is(short_checkpoint, export_vision):
    model = onnx_ir.load(export_vision(short_checkpoint, "fp32"))
    assert lowered(model) is model


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_nothing_but_casts_gives_16_bits_and_the_embeddings_are_float32(short_checkpoint, export_vision, precision):
    model = lowered(onnx_ir.load(export_vision(short_checkpoint, precision)))
    types = element_types(model.graph)
    assert {node.op_type for node in model.graph if types[node.outputs[0]] in HALF_TYPES} == {"Cast"}
    assert model.graph.outputs[0].dtype == DataType.FLOAT


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_a_lowered_folder_runs_in_the_engine_on_the_same_weights(short_checkpoint, export_vision, tmp_path, precision):
    source = export_vision(short_checkpoint, precision)
    path = write_lowered(source, tmp_path / "lowered")
    data = sorted(file.name for file in path.parent.iterdir())
    assert data == ["vision.onnx", "vision.onnx.data"]
    assert (path.parent / data[1]).read_bytes() == (source.parent / data[1]).read_bytes()
    tiles = noise_tiles(3, 56)
    found = OnnxRuntimeEngine(path, threads=1)(tiles)
    graph = VisionGraph(source, threads=1)
    (expected,) = graph.run(graph.subgraph(["embeddings"], {"tiles"}), {"tiles": tiles}, ["embeddings"])
    assert np.array_equal(found, torch.from_numpy(found).bfloat16().float().numpy())
    # the optimiser may add float32 products in another order, and now and then another 16-bit or FP8 code comes out
    assert cosines(found, expected).min() > (0.999 if precision == "fp8" else 0.99998)


def test_the_graph_on_disk_is_valid_onnx(short_checkpoint, export_vision, tmp_path: Path):
    onnx.checker.check_model(str(write_lowered(export_vision(short_checkpoint, "bf16"), tmp_path)), full_check=True)


def test_lowering_a_lowered_graph_gives_no_name_twice_and_the_same_result(short_checkpoint, export_vision, tmp_path):
    once = write_lowered(export_vision(short_checkpoint, "fp8"), tmp_path / "once")
    twice = write_lowered(once, tmp_path / "twice")
    graph = onnx.load(twice, load_external_data=False).graph
    for names in ([node.name for node in graph.node], [name for node in graph.node for name in node.output]):
        assert len(set(names)) == len(names)
    tiles = noise_tiles(2, 56)
    assert np.array_equal(OnnxRuntimeEngine(twice, threads=1)(tiles), OnnxRuntimeEngine(once, threads=1)(tiles))
