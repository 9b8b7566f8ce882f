"""Which spelling of attention the official TensorRT-RTX builder makes one fused kernel of: it says so in its log.

NVIDIA's page "Fused Attention" asks for the scale on q or k before the first product and says no more of types. Found
with 1.7.1.116 for SM80, SM89 and SM120 alike: the scores must come out of the first product in 16 bits. Casting them to
float32 for the softmax afterwards does no harm, nor does casting the factors of a product to float32 and its result
straight back, which for FP16 chooses a kernel that accumulates in float32 (for BF16 it is the same kernel).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from nvlm_deploy.sku import load_sku
from nvlm_deploy.vision.tensorrt import BuildSettings, TileRange, engine_from_onnx

pytest.importorskip("tensorrt_rtx_bindings", reason="its wheels are for x86-64 Linux (extra `test`)")

FLOAT = TensorProto.FLOAT
TYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp32": FLOAT}
TOKENS, HEADS, HEAD_SIZE = 12, 2, 32


class AttentionGraph:
    """tiles [n, 16, 16, 3] -> q, k, v of 12 tokens, 2 heads of 32 -> one attention -> embeddings [n, 12, 64]."""

    def __init__(self, base: int) -> None:
        self.base, self.nodes, self.names = base, [], map("v{}".format, itertools.count())

    def op(self, operator: str, *inputs: str, **attributes: object) -> str:
        output = next(self.names)
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def cast(self, value: str, to: int) -> str:
        return self.op("Cast", value, to=to)

    def product(self, left: str, right: str, *, accumulate: bool) -> str:
        """In the base type, or with float32 factors and the result straight back: float32 accumulation, spelled out."""
        if not accumulate:
            return self.op("MatMul", left, right)
        return self.cast(self.op("MatMul", self.cast(left, FLOAT), self.cast(right, FLOAT)), self.base)

    def softmax32(self, scores: str) -> str:
        return self.cast(self.op("Softmax", self.cast(scores, FLOAT), axis=-1), self.base)

    def attention(self, spelling: str, q: str, k: str, v: str) -> str:
        accumulate = "accumulate" in spelling
        if spelling == "scores stay float32":
            scores = self.op("MatMul", self.cast(q, FLOAT), self.cast(k, FLOAT))
            weights = self.cast(self.op("Softmax", scores, axis=-1), self.base)
        elif spelling == "16-bit softmax":
            weights = self.op("Softmax", self.product(q, k, accumulate=False), axis=-1)
        else:
            weights = self.softmax32(self.product(q, k, accumulate=accumulate))
        return self.product(weights, v, accumulate=accumulate)

    def write(self, folder: Path, spelling: str) -> Path:
        pixels = self.op("Reshape", self.cast("tiles", self.base), "heads")
        q, k, v = (
            self.op("Transpose", self.op("Mul", pixels, name), perm=[0, 2, 1, 3]) for name in ("scale", "one", "two")
        )
        mixed = self.attention(spelling, q, self.op("Transpose", k, perm=[0, 1, 3, 2]), v)
        rows = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), "rows")
        self.nodes.append(helper.make_node("Cast", [rows], ["embeddings"], to=FLOAT))
        constants = [
            helper.make_tensor("heads", TensorProto.INT64, [4], [0, TOKENS, HEADS, HEAD_SIZE]),
            helper.make_tensor("rows", TensorProto.INT64, [3], [0, TOKENS, HEADS * HEAD_SIZE]),
            *(
                helper.make_tensor(name, self.base, [1], [value])
                for name, value in (("scale", HEAD_SIZE**-0.5), ("one", 1.5), ("two", 2.5))
            ),
        ]
        sides = (
            helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["tiles", 16, 16, 3]),
            helper.make_tensor_value_info("embeddings", FLOAT, ["tiles", TOKENS, HEADS * HEAD_SIZE]),
        )
        graph = helper.make_graph(self.nodes, "attention", sides[:1], sides[1:], constants)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "vision.onnx"
        )
        return folder / "vision.onnx"


def fused_kernels(graph: Path, folder: Path, sku: str = "l40s") -> int:
    """How many fused attention kernels the builder's own list of layers has."""
    engine_from_onnx(graph, folder, BuildSettings("tensorrt_rtx", load_sku(sku), TileRange(1, 7, 8), folder / "cache"))
    return (folder / "builder.log").read_text().count("\nName: _gemm_mha")


@pytest.mark.slow
@pytest.mark.parametrize("sku", ["a100-80gb", "l40s", "rtx-pro-6000"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("spelling", "kernels"),
    [
        ("16-bit softmax", 1),
        ("softmax in float32", 1),
        ("accumulate, softmax in float32", 1),
        ("scores stay float32", 0),
    ],
)
def test_attention_is_one_kernel_when_its_scores_pass_through_16_bits(tmp_path, precision, sku, spelling, kernels):
    graph = AttentionGraph(TYPES[precision]).write(tmp_path, spelling)
    assert fused_kernels(graph, tmp_path, sku) == kernels


@pytest.mark.slow
def test_float32_attention_is_never_one_kernel(tmp_path):
    assert fused_kernels(AttentionGraph(FLOAT).write(tmp_path, "16-bit softmax"), tmp_path) == 0
