"""Mistakes planted in every precision are caught by the gate and named by the bisection: which block, which operation.

They are planted in the torch modules while these are exported, and in the ONNX file, where names stay what they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from nvlm_deploy.model import vision as network
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.vision import stages
from nvlm_deploy.vision.export import onnx_from_checkpoint
from nvlm_deploy.vision.numerics.check import check_numerics
from nvlm_deploy.vision.numerics.compare import difference, noise_tiles

pytestmark = pytest.mark.slow

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
FLOAT, HALF, BFLOAT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
BASE = {"fp32": FLOAT, "bf16": BFLOAT, "fp16": HALF, "fp8": BFLOAT}
TILES = noise_tiles(2, 56)
# a mistake by a place is planted in one precision each, so that every mistake and every place meets every precision
NORMS = {"norm1": "norm1", "q_norm": "QK-norm (q)", "k_norm": "QK-norm (k)", "norm2": "norm2"}


LAYER = "vision_model.encoder.layers"


def check(path, checkpoint, tiles=TILES):
    return check_numerics(path, checkpoint, spec_from_checkpoint(checkpoint), tiles, threads=1)


def in_turn(mistakes, places, precisions=PRECISIONS):
    """Every mistake at every place, the precisions taking turns."""
    return [
        (mistake, place, precisions[(row + column) % len(precisions)])
        for row, mistake in enumerate(mistakes)
        for column, place in enumerate(places)
    ]


# --- in the torch modules, while they are exported


def divided_by_the_padded_width(self, x):
    wide = x.float()
    mean_square = wide[..., : self.real_width].pow(2).sum(-1, keepdim=True) / 352
    return (wide * torch.rsqrt(mean_square + self.epsilon)).to(x.dtype) * self.weight


def in_half_precision(self, x):
    wide = x.half()
    mean_square = wide[..., : self.real_width].pow(2).mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + self.epsilon)).to(x.dtype) * self.weight


def version_1(patches, *, grid):
    half, channels = grid // 2, patches.shape[-1]
    blocks = patches.reshape(-1, half, 2, half, 2, channels).permute(0, 3, 1, 2, 4, 5)
    return blocks.reshape(-1, half * half, 4 * channels)


@pytest.mark.parametrize(
    ("place", "name", "mistake", "named"),
    [
        (network.JointRmsNorm, "forward", divided_by_the_padded_width, "block 0: QK-norm (q): max relative error"),
        (network.JointRmsNorm, "forward", in_half_precision, "block 0: norm1 in fp16"),
        (stages, "pixel_shuffle", version_1, "pixel shuffle: max relative error"),
    ],
    ids=["a wrong divisor", "a norm in half precision", "pixel shuffle version 1"],
)
def test_a_mistake_in_the_exported_network_is_named(
    kept_checkpoint, tmp_path, monkeypatch, place, name, mistake, named
):
    with monkeypatch.context() as planted:
        planted.setattr(place, name, mistake)
        path = onnx_from_checkpoint(
            kept_checkpoint, spec_from_checkpoint(kept_checkpoint), tmp_path / "vision", precision="bf16"
        )
    report = check(path, kept_checkpoint)
    assert not report.passed
    assert named in "; ".join(map(str, report.findings))


# --- in the ONNX file


class File:
    """A graph under the knife."""

    def __init__(self, path) -> None:
        self.model = onnx.load(path, load_external_data=False)
        self.graph = self.model.graph
        self.names = map("planted_{}".format, count())

    def producer(self, value: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if value in node.output)

    def before(self, value: str, operator: str) -> onnx.NodeProto:
        """The nearest node of this kind before a value."""
        waiting = [value]
        while waiting:
            value = waiting.pop(0)
            for node in self.graph.node:
                if value in node.output:
                    if node.op_type == operator:
                        return node
                    waiting.extend(node.input)
        raise AssertionError(f"no {operator}")

    def constant(self, array) -> str:
        name = next(self.names)
        self.graph.initializer.append(numpy_helper.from_array(np.array(array), name))
        return name

    def number(self, value: float, to: int, shape=()) -> str:
        """A constant in a type of ONNX."""
        name = next(self.names)
        size = int(np.prod(shape))
        self.graph.initializer.append(helper.make_tensor(name, to, shape, [value] * size))
        return name

    def between(self, node: onnx.NodeProto, index: int, *steps: Callable[[str], onnx.NodeProto]) -> None:
        """New nodes in front of one input."""
        for step in steps:
            new = step(node.input[index])
            new.output.append(next(self.names))
            self.graph.node.insert(list(self.graph.node).index(node), new)
            node.input[index] = new.output[0]

    def instead(self, nodes: list[onnx.NodeProto], *old: onnx.NodeProto) -> None:
        """New nodes in the place of old ones."""
        place = list(self.graph.node).index(old[0])
        for node in old:
            self.graph.node.remove(node)
        for offset, node in enumerate(nodes):
            self.graph.node.insert(place + offset, node)

    def save(self, path, folder):
        shutil.copyfile(path.with_name("vision.onnx.data"), folder / "vision.onnx.data")
        onnx.save(self.model, folder / "vision.onnx")
        return folder / "vision.onnx"


def cast(to: int) -> Callable[[str], onnx.NodeProto]:
    return lambda value: helper.make_node("Cast", [value], [], to=to)


def times(file: File, factor: float) -> Callable[[str], onnx.NodeProto]:
    factor_name = file.constant(np.float32(factor))
    return lambda value: helper.make_node("Mul", [value, factor_name], [])


def channels(file: File, stop: int) -> Callable[[str], onnx.NodeProto]:
    bounds = [file.constant(np.array([number])) for number in (0, stop, -1)]
    return lambda value: helper.make_node("Slice", [value, *bounds], [])


def planted(export_vision, checkpoint, precision, folder, edit: Callable[[File], None]):
    path = export_vision(checkpoint, precision)
    file = File(path)
    edit(file)
    return check(file.save(path, folder), checkpoint)


DIVISORS: dict[str, Callable[[File, str], None]] = {
    "11 heads for 4": lambda file, point: file.between(file.before(point, "Sqrt"), 0, times(file, 128 / 352)),
    "4096 for 3200": lambda file, point: file.between(file.before(point, "Sqrt"), 0, times(file, 3200 / 4096)),
    "96 channels of 128": lambda file, point: file.between(file.before(point, "ReduceMean"), 0, channels(file, 96)),
    "the other axis": lambda file, point: file.before(point, "ReduceMean").input.__setitem__(1, file.constant([1])),
}


@pytest.mark.parametrize(("divisor", "norm", "precision"), in_turn(DIVISORS, NORMS))
def test_a_wrong_divisor_is_named(short_checkpoint, export_vision, tmp_path, precision, norm, divisor):
    def edit(file: File) -> None:
        DIVISORS[divisor](file, f"block.1.{norm}")

    report = planted(export_vision, short_checkpoint, precision, tmp_path, edit)
    assert not report.passed
    assert str(report.findings[0]).startswith(f"block 1: {NORMS[norm]}: ")


CASTS: dict[str, Callable[[File, str, int], None]] = {
    "before the square": lambda file, point, to: file.between(file.before(point, "Pow"), 0, cast(to), cast(FLOAT)),
    "between square and mean": lambda file, point, to: file.between(
        file.before(point, "ReduceMean"), 0, cast(to), cast(FLOAT)
    ),
    "between mean and root": lambda file, point, to: file.between(file.before(point, "Sqrt"), 0, cast(to), cast(FLOAT)),
    "after the root": lambda file, point, to: file.between(file.before(point, "Reciprocal"), 0, cast(to), cast(FLOAT)),
}


FIRST, *LATER = CASTS


@pytest.mark.parametrize(
    ("where", "norm", "precision"),
    # what goes into a norm of an FP16 graph is FP16 anyway
    [*in_turn([FIRST], NORMS, ("fp32", "bf16", "fp8")), *in_turn(LATER, NORMS)],
)
def test_half_precision_in_a_norm_is_named_although_the_numbers_hide_it(
    short_checkpoint, export_vision, tmp_path, precision, norm, where
):
    def edit(file: File) -> None:
        CASTS[where](file, f"block.0.{norm}", HALF)

    report = planted(export_vision, short_checkpoint, precision, tmp_path, edit)
    assert str(report.findings[0]).startswith(f"block 0: {NORMS[norm]} in fp16: ")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_norm_in_the_base_type_is_named(short_checkpoint, export_vision, tmp_path, precision):
    def edit(file: File) -> None:
        norm = file.before("block.1.k_norm", "ReduceMean")
        file.between(norm, 0, cast(BASE[precision]))
        root = file.before("block.1.k_norm", "Sqrt")
        file.between(root, 0, cast(FLOAT))
        epsilon = file.producer(file.producer(root.input[0]).input[0])
        epsilon.input[1] = file.constant(np.float32(1e-6))
        file.between(epsilon, 1, cast(BASE[precision]))

    report = planted(export_vision, short_checkpoint, precision, tmp_path, edit)
    short = {HALF: "fp16", BFLOAT: "bf16"}[BASE[precision]]
    assert str(report.findings[0]).startswith(
        f"block 1: QK-norm (k) in {short}: norms and softmax must compute in fp32"
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_softmax_in_16_bits_is_named(short_checkpoint, export_vision, tmp_path, precision):
    def edit(file: File) -> None:
        softmax = file.before("block.1.attention", "Softmax")
        reader = next(node for node in file.graph.node if softmax.output[0] in node.input)
        file.between(softmax, 0, cast(BASE[precision]))
        file.between(reader, 0, cast(FLOAT))

    report = planted(export_vision, short_checkpoint, precision, tmp_path, edit)
    assert str(report.findings[0]).startswith("block 1: attention in ")


PERMUTATIONS = {
    "version 1": [0, 3, 1, 2, 4, 5],
    "corners swapped": [0, 1, 3, 4, 2, 5],
    "nothing moved": [0, 1, 2, 3, 4, 5],
}


@pytest.mark.parametrize(("order", "precision"), list(zip(PERMUTATIONS, PRECISIONS[1:], strict=True)))
def test_another_pixel_shuffle_is_named(short_checkpoint, export_vision, tmp_path, precision, order):
    def edit(file: File) -> None:
        transpose = file.before("pixel_shuffle", "Transpose")
        transpose.ClearField("attribute")
        transpose.attribute.append(helper.make_attribute("perm", PERMUTATIONS[order]))

    report = planted(export_vision, short_checkpoint, precision, tmp_path, edit)
    assert str(report.findings[0]).startswith("pixel shuffle: ")


def without_bias(file: File, point: str) -> None:
    add = file.producer(point)
    assert add.op_type == "Add"
    product = next(name for name in add.input if not name.endswith("bias"))
    add.op_type, add.input[:] = "Identity", [product]


def swapped(file: File, one: str, other: str) -> None:
    names = {f"vision_model.encoder.layers.1.{a}": f"vision_model.encoder.layers.1.{b}" for a, b in [(one, other)]}
    names |= {b: a for a, b in names.items()}
    for node in file.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


OTHERS: dict[str, tuple[Callable[[File], None], str]] = {
    "scores scaled": (
        lambda file: file.between(file.before("block.1.attention", "Softmax"), 0, times(file, 2)),
        "block 1: attention",
    ),
    "no bias of proj": (lambda file: without_bias(file, "block.1.proj"), "block 1: output projection"),
    "no bias of fc1": (lambda file: without_bias(file, "block.1.fc1"), "block 1: fc1"),
    "no bias of fc2": (lambda file: without_bias(file, "block.1.fc2"), "block 1: fc2"),
    "layer scales swapped": (lambda file: swapped(file, "ls1", "ls2"), "block 1: attention residual"),
    "norm weights swapped": (lambda file: swapped(file, "norm1.weight", "norm2.weight"), "block 1: norm1"),
    "q and k weights swapped": (
        lambda file: swapped(file, "attn.q_norm.weight", "attn.k_norm.weight"),
        "block 1: QK-norm (q)",
    ),
}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("mistake", OTHERS)
def test_other_mistakes_are_named_however_coarse_the_precision(
    short_checkpoint, export_vision, tmp_path, precision, mistake
):
    edit, named = OTHERS[mistake]
    report = planted(export_vision, short_checkpoint, precision, tmp_path, edit)
    assert str(report.findings[0]).startswith(named)


# --- an axis that is as long as the tracer's example


RESHAPES = {
    "patch_embedding": "patch embedding",
    "block.1.attention": "block 1: attention",
    "pixel_shuffle": "pixel shuffle",
}


def frozen(file: File, point: str, tiles: int) -> None:
    reshape = file.before(point, "Reshape")
    shape = next(tensor for tensor in file.graph.initializer if tensor.name == reshape.input[1])
    entries = numpy_helper.to_array(shape).copy()
    entries[0] = tiles
    reshape.input[1] = file.constant(entries)


@pytest.mark.parametrize(("point", "precision"), list(zip(RESHAPES, ("fp32", "bf16", "fp8"), strict=True)))
def test_a_tile_axis_frozen_to_the_traced_number_is_named(short_checkpoint, export_vision, tmp_path, point, precision):
    report = planted(export_vision, short_checkpoint, precision, tmp_path, lambda file: frozen(file, point, len(TILES)))
    assert str(report.findings[0]).startswith(f"{RESHAPES[point]}: on 1 tile(s) it cannot be run: ")


@pytest.mark.parametrize(("tiles", "count"), [(1, 1), (1, 3), (3, 3)])
def test_a_tile_axis_frozen_to_any_number_is_seen_on_any_number_of_tiles(
    short_checkpoint, export_vision, tmp_path, tiles, count
):
    file = File(export_vision(short_checkpoint, "fp32"))
    frozen(file, "pixel_shuffle", tiles)
    path = file.save(export_vision(short_checkpoint, "fp32"), tmp_path)
    report = check(path, short_checkpoint, noise_tiles(count, 56))
    assert str(report.findings[0]).startswith("pixel shuffle: ")


# --- a norm in half precision that is no Reduce* operator


def by_matmul(file: File, to: int) -> None:
    square, mean = file.before("block.1.k_norm", "Pow"), file.before("block.1.k_norm", "ReduceMean")
    weights = file.number(1 / 128, to, (128, 1))
    nodes = [
        helper.make_node("Cast", [square.input[0]], ["narrow"], to=to),
        helper.make_node("Mul", ["narrow", "narrow"], ["squares"]),
        helper.make_node("MatMul", ["squares", weights], ["narrow_mean"]),
        helper.make_node("Cast", ["narrow_mean"], [mean.output[0]], to=FLOAT),
    ]
    file.instead(nodes, square, mean)


def by_einsum(file: File, to: int) -> None:
    square, mean = file.before("block.1.k_norm", "Pow"), file.before("block.1.k_norm", "ReduceMean")
    nodes = [
        helper.make_node("Cast", [square.input[0]], ["narrow"], to=to),
        helper.make_node("Einsum", ["narrow", "narrow"], ["sums"], equation="btc,btc->bt"),
        helper.make_node("Mul", ["sums", file.number(1 / 128, to)], ["narrow_mean"]),
        helper.make_node("Unsqueeze", ["narrow_mean", file.constant(np.array([2]))], ["rows"]),
        helper.make_node("Cast", ["rows"], [mean.output[0]], to=FLOAT),
    ]
    file.instead(nodes, square, mean)


@pytest.mark.parametrize("form", [by_matmul, by_einsum])
@pytest.mark.parametrize(("precision", "to"), [("fp32", HALF), ("fp16", HALF), ("bf16", BFLOAT)])
def test_a_norm_in_half_precision_is_named_however_it_is_spelt(
    short_checkpoint, export_vision, tmp_path, precision, to, form
):
    report = planted(export_vision, short_checkpoint, precision, tmp_path, lambda file: form(file, to))
    named = f"block 1: QK-norm (k) in {'fp16' if to == HALF else 'bf16'}: norms and softmax must compute in fp32"
    assert str(report.findings[0]).startswith(named)


def test_one_constant_of_another_type_does_not_make_a_graph_one_of_that_type(short_checkpoint, export_vision, tmp_path):
    def edit(file: File) -> None:
        tiny = helper.make_node("Identity", [file.number(1, HALF, (1,))], ["nowhere"], name="tiny")
        file.graph.node.insert(0, tiny)
        file.between(file.producer("block.1.gelu"), 0, cast(HALF), cast(FLOAT))

    report = planted(export_vision, short_checkpoint, "fp32", tmp_path, edit)
    assert report.precision == "fp32"
    assert "block 1: GELU in fp16: this graph computes in fp32" in "; ".join(map(str, report.findings))


def test_what_a_local_function_computes_is_not_taken_on_trust(short_checkpoint, export_vision, tmp_path):
    def edit(file: File) -> None:
        body = [helper.make_node("Gelu", ["x"], ["y"])]
        function = helper.make_function("local", "Mine", ["x"], ["y"], body, [helper.make_opsetid("", 20)])
        file.model.functions.append(function)
        file.model.opset_import.append(helper.make_opsetid("local", 1))
        gelu = file.producer("block.1.gelu")
        gelu.op_type, gelu.domain = "Mine", "local"
        gelu.ClearField("attribute")

    report = planted(export_vision, short_checkpoint, "fp32", tmp_path, edit)
    assert "block 1: GELU in local.Mine: " in str(report.findings[0])


# --- numbers that ordinary activations hide in BF16's rounding


def another_epsilon(epsilon: float) -> Callable[[File], None]:
    def edit(file: File) -> None:
        root = file.before("block.1.q_norm", "Sqrt")
        file.producer(root.input[0]).input[1] = file.constant(np.float32(epsilon))

    return edit


def another_layer_norm_epsilon(file: File) -> None:
    norm = file.before("projector_norm", "LayerNormalization")
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 1e-6


def tanh_gelu(file: File) -> None:
    gelu = file.producer("block.1.gelu")
    x = gelu.input[0]
    nodes = [
        helper.make_node("Mul", [x, x], ["x2"]),
        helper.make_node("Mul", ["x2", x], ["x3"]),
        helper.make_node("Mul", ["x3", file.number(0.044715, BFLOAT)], ["cubic"]),
        helper.make_node("Add", ["cubic", x], ["sum"]),
        helper.make_node("Mul", ["sum", file.number(0.7978845608, BFLOAT)], ["inner"]),
        helper.make_node("Tanh", ["inner"], ["tanh"]),
        helper.make_node("Add", ["tanh", file.number(1, BFLOAT)], ["plus1"]),
        helper.make_node("Mul", [x, file.number(0.5, BFLOAT)], ["half_x"]),
        helper.make_node("Mul", ["half_x", "plus1"], ["block.1.gelu"]),
    ]
    file.instead(nodes, gelu)


NUMBERS: dict[str, tuple[Callable[[File], None], str]] = {
    "epsilon 1e-5": (another_epsilon(1e-5), "block 1: QK-norm (q): where its epsilon counts"),
    "no epsilon": (another_epsilon(0), "block 1: QK-norm (q): where its epsilon counts"),
    "Megatron's epsilon in the projector": (
        another_layer_norm_epsilon,
        "projector LayerNorm: where its epsilon counts",
    ),
    "GELU by tanh, spelt out": (tanh_gelu, "block 1: GELU: where its approximations differ"),
    "scores 2 % too large": (
        lambda file: file.between(file.before("block.1.attention", "Softmax"), 0, times(file, 1.02)),
        "block 1: attention: ",
    ),
}


@pytest.mark.parametrize(("mistake", "precision"), [(name, ("bf16", "fp8")[i % 2]) for i, name in enumerate(NUMBERS)])
def test_a_wrong_number_is_named_although_rounding_hides_it(
    short_checkpoint, export_vision, tmp_path, precision, mistake
):
    edit, named = NUMBERS[mistake]
    report = planted(export_vision, short_checkpoint, precision, tmp_path, edit)
    assert str(report.findings[0]).startswith(named)


def test_fp8_codes_of_another_block_are_named_with_what_reads_them(short_checkpoint, export_vision, tmp_path):
    names = {f"{LAYER}.{one}.mlp.fc1.weight": f"{LAYER}.{other}.mlp.fc1.weight" for one, other in [(0, 1), (1, 0)]}

    def edit(file: File) -> None:
        for node in file.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]

    report = planted(export_vision, short_checkpoint, "fp8", tmp_path, edit)
    named = f"block 0: fc1: reads {LAYER}.1.mlp.fc1.weight, not {LAYER}.0.mlp.fc1.weight"
    assert str(report.findings[0]).startswith(named)


def test_an_operation_that_leaves_a_point_out_says_which(short_checkpoint, export_vision, tmp_path):
    def edit(file: File) -> None:
        (fc1,) = (node for node in file.graph.node if node.op_type == "MatMul" and "block.1.norm2" in node.input)
        fc1.input[0] = "block.1.attention_residual"

    report = planted(export_vision, short_checkpoint, "fp32", tmp_path, edit)
    assert str(report.findings[0]).startswith("block 1: fc1: ")
    assert "it does not read block.1.norm2" in str(report.findings[0])


def test_a_value_that_is_not_finite_is_named_where_it_arises(short_checkpoint, export_vision, tmp_path):
    def edit(file: File) -> None:
        file.between(file.before("block.1.norm2", "Sqrt"), 0, times(file, -1))

    report = planted(export_vision, short_checkpoint, "bf16", tmp_path, edit)
    assert "block 1: norm2: " in report.sentence
    assert "NaN or infinite" in report.sentence


def test_half_precision_that_overflows_is_named_where_it_does(make_checkpoint, export_vision):
    def loud(weights) -> None:
        weights["vision_model.encoder.layers.1.mlp.fc2.bias"][5] = 60000.0
        weights["vision_model.encoder.layers.1.ls2"][5] = 4.0

    checkpoint = make_checkpoint(vision_layers=2, decoder_layers=1, edit=loud)
    assert check(export_vision(checkpoint, "bf16"), checkpoint).passed
    report = check(export_vision(checkpoint, "fp16"), checkpoint)
    assert str(report.findings[0]).startswith("block 1: MLP residual: ")
    assert "NaN or infinite" in str(report.findings[0])


def test_an_operation_that_cannot_run_is_named(short_checkpoint, export_vision, tmp_path):
    def edit(file: File) -> None:
        file.between(file.before("block.1.q_norm", "ReduceMean"), 0, channels(file, 0))
        file.producer("block.1.fc1").input[1] = file.constant(np.zeros(7, np.float32))

    report = planted(export_vision, short_checkpoint, "fp32", tmp_path, edit)
    assert str(report.findings[0]).startswith("block 1: fc1: on 2 tile(s) it cannot be run: ")
    assert [stage.name for stage in report.stages] == ["pixels", "patch_embedding", "block.0"]
    assert report.as_json()["end"] is None


def test_a_wrong_length_shows_in_the_scale_and_not_in_the_cosine():
    expected = torch.randn(1, 50, 128, generator=torch.Generator().manual_seed(0))
    found = difference(1.01 * expected, expected)
    assert found.cosine == pytest.approx(1)
    assert found.error == pytest.approx(0.01, rel=1e-3)
    assert found.scale > 0.05


def test_one_loud_channel_does_not_hide_the_others():
    expected = torch.randn(1, 50, 128, generator=torch.Generator().manual_seed(0))
    expected[..., 0] = 10000
    found = expected.clone()
    found[..., 1:] *= 0.5
    assert difference(found, expected).error < 1e-3
    assert difference(found, expected).channel == pytest.approx(0.5)


def test_one_loud_channel_does_not_hide_a_dead_tenth_of_the_others():
    expected = torch.randn(1, 50, 128, generator=torch.Generator().manual_seed(0))
    expected[..., 0] = 10000
    found = expected.clone()
    found[..., 20:33] = 0
    result = difference(found, expected)
    assert result.error < 1e-3
    assert result.channel == 0
    assert result.tail == pytest.approx(1)
