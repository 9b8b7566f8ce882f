"""FP8 of the encoder: codes, scales, the graph, and what it computes in ONNX Runtime.

That TensorRT-RTX builds the graph is test_tensorrt.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch.nn import functional

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.opening import open_image
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.tiling import tiles_from_image
from nvlm_deploy.model.vision import VisionTower, vision_tower_from_checkpoint
from nvlm_deploy.progress import silent
from nvlm_deploy.samples import read_samples
from nvlm_deploy.vision.calibrate import VisionCalibration, calibrate_vision
from nvlm_deploy.vision.engine import OnnxRuntimeEngine
from nvlm_deploy.vision.export import CALIBRATION_NAME, ONNX_NAME, Fp8Source, VisionExport
from nvlm_deploy.vision.external_data import Weight, weight_of_tensor
from nvlm_deploy.vision.heads import pruned, real_chunks
from nvlm_deploy.vision.numerics.compare import cosines
from nvlm_deploy.vision.qdq import LINEAR_INPUTS, SOFTMAX_SCALE, ZERO_POINT, Fp8Choice
from nvlm_deploy.vision.quantize import bf16_scale, quantised_weights
from nvlm_deploy.vision.stages import stages

pytestmark = pytest.mark.slow

LAYER = "vision_model.encoder.layers.0"
CHOICES = [Fp8Choice(scales, attention) for attention in (False, True) for scales in ("per_tensor", "per_channel")]


def choice_name(choice: Fp8Choice) -> str:
    return f"{choice.weight_scales}{'-attention' if choice.attention else ''}"


@dataclasses.dataclass(frozen=True)
class Trained:
    """The small model, calibrated."""

    checkpoint: Checkpoint
    spec: Any
    pictures: list[Any]
    calibration: VisionCalibration

    def export(self, folder: Path, choice: Fp8Choice, base: str) -> Path:
        """FP8 over a base of float32, which ONNX Runtime executes as it is, or bf16."""
        vision = pruned(self.spec.vision)
        folder.mkdir()
        self.calibration.save(folder / CALIBRATION_NAME)
        source = Fp8Source(choice, self.pictures)
        VisionExport(self.checkpoint, self.spec, vision, base, source).write(folder, silent)
        return folder / ONNX_NAME


@pytest.fixture(scope="module", autouse=True)
def _traced_once(traced_once) -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def trained(tiny_folder) -> Trained:
    checkpoint = Checkpoint.open(tiny_folder)
    spec = spec_from_checkpoint(checkpoint)
    pictures = list(tiles_of(tiny_folder.parent / "calibration", spec))
    return Trained(checkpoint, spec, pictures, calibrate_vision(checkpoint, spec, pictures))


@pytest.fixture(scope="module")
def unseen(tiny_folder, trained) -> Any:
    """Tiles of a third of the held-out pictures."""
    return np.concatenate(list(tiles_of(tiny_folder.parent / "heldout", trained.spec))[::3])


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Callable[..., Path]:
    """vision.onnx of a choice, made once."""
    made: dict[Any, Path] = {}

    def of(choice: Fp8Choice, base: str = "fp32") -> Path:
        if (choice, base) not in made:
            made[choice, base] = trained.export(tmp_path_factory.mktemp("fp8") / "vision", choice, base)
        return made[choice, base]

    return of


def tiles_of(folder: Path, spec: Any) -> Iterator[Any]:
    for image in sorted({image for sample in read_samples(folder) for image in sample.images}):
        yield tiles_from_image(open_image(image.read_bytes()), spec.tiling)


def tower_embeddings(trained: Trained, tiles: Any) -> Any:
    with torch.inference_mode():
        return vision_tower_from_checkpoint(trained.checkpoint, trained.spec)(torch.from_numpy(tiles)).numpy()


# what is computed


@pytest.mark.parametrize("choice", CHOICES, ids=choice_name)
def test_every_tile_of_unseen_pictures_has_cosine_above_0_99_against_float32(trained, unseen, exported, choice):
    found = cosines(OnnxRuntimeEngine(exported(choice))(unseen), tower_embeddings(trained, unseen))
    print(f"{choice_name(choice)}, {len(unseen)} tiles: cosine at least {found.min():.5f}, mean {found.mean():.5f}")
    assert found.min() > 0.99
    assert found.min() < 0.99999, "nothing was quantised"


def states_in_onnx(path: Path, tiles: Any, names: list[str]) -> list[Any]:
    """Values of the graph by name."""
    model = onnx_ir.load(path)
    values = {output.name: output for node in model.graph for output in node.outputs}
    model.graph.outputs.extend(values[name] for name in names)
    onnx_ir.save(model, path.with_name("watched.onnx"))
    session = onnxruntime.InferenceSession(path.with_name("watched.onnx"), providers=["CPUExecutionProvider"])
    return session.run(names, {"tiles": tiles})


def scales_of(path: Path) -> dict[str, Any]:
    """Every scale of the graph as float32, by the name of its weight or activation."""
    tensors = onnx.load(path).graph.initializer
    return {
        tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor).astype(np.float32))
        for tensor in tensors
        if tensor.name.endswith("_scale")
    }


@contextlib.contextmanager
def quiet() -> Any:
    """ModelOpt prints its progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def modelopt_tower(trained: Trained, scales: str) -> Any:
    """The torch tower calibrated and fake-quantised by ModelOpt, the linears of the blocks only."""
    import modelopt.torch.quantization as mtq

    def run_all(tower: Any) -> None:
        for tiles in trained.pictures:
            tower(torch.tensor(tiles))

    e4m3 = {"num_bits": (4, 3), "axis": None}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*layers*input_quantizer", "cfg": e4m3},
            {
                "quantizer_name": "*layers*weight_quantizer",
                "cfg": {**e4m3, "axis": 0 if scales == "per_channel" else None},
            },
        ],
        "algorithm": "max",
    }
    with quiet(), torch.no_grad():
        return mtq.quantize(tower_of_real_heads(trained), config, run_all)


def tower_of_real_heads(trained: Trained) -> VisionTower:
    """The torch tower with the rows and columns that the graph has."""
    vision = pruned(trained.spec.vision)
    tower = VisionTower(vision, trained.spec.projector).requires_grad_(False).eval()
    names = list(tower.state_dict())
    weights = {name: torch.cat(list(real_chunks(trained.checkpoint, name, trained.spec.vision))) for name in names}
    tower.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return tower


@pytest.mark.parametrize("choice", CHOICES, ids=choice_name)
def test_every_block_equals_modelopts_fake_quantised_tower(trained, unseen, exported, choice, monkeypatch):
    """Calibrated by ModelOpt itself; then it gets our scales, which are its own rounded up to bf16.

    Each block gets what the ONNX graph's gets: ModelOpt multiplies by 448 / amax where ONNX divides by the scale, so a
    tie may round the other way, and four blocks in a row would make that larger.
    """
    tower = modelopt_tower(trained, choice.weight_scales)
    scales = scales_of(exported(choice))
    for index, block in enumerate(tower.vision_model.blocks):
        for linear, point in LINEAR_INPUTS.items():
            module, name = block.get_submodule(linear), f"vision_model.encoder.layers.{index}.{linear}"
            theirs = module.input_quantizer.amax.item()
            assert theirs == pytest.approx(trained.calibration.amax[f"block.{index}.{point}"], rel=1e-4)
            assert theirs <= 448 * scales[f"{name}.input_scale"].item() <= theirs * 1.0079
            module.input_quantizer.amax = 448 * scales[f"{name}.input_scale"]
            module.weight_quantizer.amax = (448 * scales[f"{name}.weight_scale"]).view_as(module.weight_quantizer.amax)
    if choice.attention:
        quantise_torch_attention(monkeypatch, scales, len(tower.vision_model.blocks))
    names = ["patch_embedding", *(f"block.{index}" for index in range(len(tower.vision_model.blocks)))]
    states = states_in_onnx(exported(choice), unseen, names)
    with torch.inference_mode():
        found = [block(torch.tensor(x)).numpy() for block, x in zip(tower.vision_model.blocks, states, strict=False)]
    lowest = [cosines(ours, theirs).min() for ours, theirs in zip(states[1:], found, strict=True)]
    print(f"{choice_name(choice)}, blocks: cosine at least {', '.join(f'{value:.7f}' for value in lowest)}")
    assert min(lowest) > 0.9999


def quantise_torch_attention(monkeypatch, scales: dict[str, Any], layers: int) -> None:
    """Attention of the torch tower with ModelOpt's own fake quantiser where the ViT recipe has one."""
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    layer = iter(range(layers))

    def attention(q, k, v):
        prefix = f"vision_model.encoder.layers.{next(layer)}.attn"
        fake = {name: lambda x, s=scales[f"{prefix}.{name}_scale"]: fp8_eager(x, 448 * s) for name in "qkv"}
        weights = fake["q"](q * q.shape[-1] ** -0.5) @ fake["k"](k).transpose(-1, -2)
        return fp8_eager(weights.softmax(-1), 448 * scales[f"block/{SOFTMAX_SCALE}"]) @ fake["v"](v)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)


# the graph


@pytest.mark.parametrize("choice", CHOICES, ids=choice_name)
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_each_quantised_activation_is_quantised_once_and_each_weight_is_stored_as_codes(exported, choice, base):
    graph = onnx.load(exported(choice, base), load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    activations = 4 * (len(LINEAR_INPUTS) + 4 * choice.attention)
    assert operators.count("QuantizeLinear") == activations
    assert operators.count("DequantizeLinear") == activations + 4 * len(LINEAR_INPUTS)
    codes = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    expected = {f"vision_model.encoder.layers.{n}.{linear}.weight" for n in range(4) for linear in LINEAR_INPUTS}
    assert {tensor.name for tensor in codes} == expected | {f"block/{ZERO_POINT}"}


@pytest.mark.parametrize("choice", CHOICES, ids=choice_name)
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_scales_have_the_type_of_the_side_that_is_not_quantised(exported, choice, base):
    graph = onnx.load(exported(choice, base), load_external_data=False).graph
    scales = [tensor for tensor in graph.initializer if tensor.name.endswith("_scale")]
    assert {tensor.data_type for tensor in scales} == {
        onnx.TensorProto.FLOAT if base == "fp32" else onnx.TensorProto.BFLOAT16
    }
    weight_dims = {tuple(tensor.dims) for tensor in scales if tensor.name.endswith("weight_scale")}
    assert weight_dims == ({(384,), (128,), (512,)} if choice.weight_scales == "per_channel" else {()})
    assert {tuple(tensor.dims) for tensor in scales if not tensor.name.endswith("weight_scale")} == {()}


@pytest.mark.parametrize("choice", CHOICES, ids=choice_name)
def test_scales_and_codes_are_equal_in_float32_and_bf16(exported, choice):
    """So that ONNX Runtime, which executes float32, and TensorRT compute with the same numbers."""
    float32, bf16 = (
        {
            tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float32)
            for tensor in onnx.load(exported(choice, base)).graph.initializer
            if tensor.name.endswith("_scale") or tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN
        }
        for base in ("fp32", "bf16")
    )
    assert float32.keys() == bf16.keys()
    assert [name for name in float32 if not np.array_equal(float32[name], bf16[name])] == []


def test_a_quantised_linear_reads_dequantised_codes_on_both_sides(exported):
    model = onnx_ir.load(exported(Fp8Choice("per_channel"), "bf16"))
    values = {output.name: output for node in model.graph for output in node.outputs}
    product = values["block.2.qkv"].producer()
    activation, weight = (value.producer() for value in product.inputs)
    assert (activation.op_type, activation.inputs[0].producer().op_type) == ("DequantizeLinear", "QuantizeLinear")
    assert activation.inputs[0].producer().inputs[0].name == "block.2.norm1"
    dequantised = weight.inputs[0].producer()
    assert (weight.op_type, dequantised.op_type) == ("Transpose", "DequantizeLinear")
    assert dequantised.inputs[0].name == "vision_model.encoder.layers.2.attn.qkv.weight"
    assert dequantised.attributes["axis"].as_int() == 0


def test_attention_is_quantised_behind_the_scaling_of_q_and_before_any_cast(exported):
    graph = onnx_ir.load(exported(Fp8Choice("per_tensor", attention=True), "bf16")).graph
    nodes = {node.outputs[0].name: node for node in graph}
    before = {name: nodes[f"block.1/attn.{name}_codes"].inputs[0].producer().op_type for name in ("q", "k", "v")}
    assert before == {"q": "Mul", "k": "Transpose", "v": "Transpose"}
    assert nodes["block.1/attn.softmax_codes"].inputs[0].producer().inputs[0].producer().op_type == "Softmax"


def test_the_patch_convolution_and_the_projector_stay_in_the_base_type(exported):
    tensors = {tensor.name: tensor.data_type for tensor in onnx.load(exported(CHOICES[3], "bf16")).graph.initializer}
    for name in ("vision_model.embeddings.patch_embedding.weight", "mlp1.1.weight", "mlp1.3.weight"):
        assert tensors[name] == onnx.TensorProto.BFLOAT16


# codes and scales


@pytest.fixture
def matrix() -> torch.Tensor:
    """bf16 rows of very different size."""
    noise = torch.randn(12, 40, generator=torch.Generator().manual_seed(3))
    return (noise * torch.logspace(-6, 3, 12)[:, None]).to(torch.bfloat16)


def weight_of(matrix: torch.Tensor, *, linear: str = "mlp.fc2", rows: int = 5) -> Weight:
    return Weight(f"{LAYER}.{linear}.weight", matrix.dtype, tuple(matrix.shape), lambda: iter(matrix.split(rows)))


def calibration_of(matrix: torch.Tensor, **amax: float) -> VisionCalibration:
    points = {f"block.0.{point}": 3.0 for point in (*LINEAR_INPUTS.values(), "q_norm", "k_norm", "v")}
    weights = {f"{LAYER}.{linear}.weight": matrix.abs().max().item() for linear in LINEAR_INPUTS}
    return VisionCalibration(points | weights | amax, 1, 1)


def tensors_of(weights: list[Weight]) -> dict[str, torch.Tensor]:
    return {
        weight.name.removeprefix(f"{LAYER}."): torch.cat([*map(torch.atleast_1d, weight.chunks())])
        for weight in weights
    }


@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize("scales", ["per_tensor", "per_channel"])
def test_codes_are_torchs_own_cast_of_the_scaled_weight(matrix, scales, rows):
    found = tensors_of(
        quantised_weights([weight_of(matrix, rows=rows)], calibration_of(matrix), Fp8Choice(scales), head_size=32)
    )
    scale = found["mlp.fc2.weight_scale"].float()
    amax = matrix.float().abs().amax(1) if scales == "per_channel" else matrix.float().abs().max()[None]
    assert torch.equal(scale, bf16_scale(amax))
    expected = (matrix.float() / scale[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(found["mlp.fc2.weight"].view(torch.uint8), expected.view(torch.uint8))
    assert found["mlp.fc2.weight"].float().isfinite().all()
    assert found["mlp.fc2.weight"].float().abs().max() >= 440, "the range of e4m3 is used"


def test_a_row_of_zeros_gets_scale_one_and_codes_of_zero(matrix):
    matrix[4] = 0
    found = tensors_of(
        quantised_weights([weight_of(matrix)], calibration_of(matrix), Fp8Choice("per_channel"), head_size=32)
    )
    assert found["mlp.fc2.weight_scale"][4] == 1
    assert (found["mlp.fc2.weight"].float()[4] == 0).all()


def test_a_row_of_the_smallest_numbers_has_a_scale_that_is_not_zero_on_a_gpu(matrix):
    matrix[4] = 1e-40  # subnormal
    found = tensors_of(
        quantised_weights([weight_of(matrix)], calibration_of(matrix), Fp8Choice("per_channel"), head_size=32)
    )
    assert found["mlp.fc2.weight_scale"][4] >= torch.finfo(torch.bfloat16).smallest_normal
    assert found["mlp.fc2.weight"].float()[4].isfinite().all()


def test_a_scale_is_the_next_bf16_above_amax_over_448():
    amax = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-8, 8, 100_000)
    scale, exact = bf16_scale(amax), amax / 448
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    assert (scale >= exact).all()
    below = (scale.to(torch.bfloat16).view(torch.int16) - 1).view(torch.bfloat16).float()
    assert (below < exact).all()


def test_a_scale_that_is_a_bf16_number_stays():
    assert bf16_scale(torch.tensor([448.0, 0.875])).tolist() == [1.0, 0.875 / 448]


def test_input_scales_come_from_the_points_and_qs_from_behind_its_scaling(matrix):
    calibration = calibration_of(matrix, **{"block.0.q_norm": 64.0, "block.0.v": 5.0, "block.0.norm1": 7.0})
    weights = [weight_of(matrix, linear="attn.qkv")]
    found = tensors_of(quantised_weights(weights, calibration, Fp8Choice("per_tensor", attention=True), head_size=16))
    expected = {"attn.qkv.input_scale": 7.0, "attn.q_scale": 16.0, "attn.k_scale": 3.0, "attn.v_scale": 5.0}
    for name, amax in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].float() == bf16_scale(torch.tensor([amax])), name


def test_every_initialiser_of_the_graph_has_its_weight_and_only_those(trained):
    for choice in CHOICES:
        export = VisionExport(
            trained.checkpoint, trained.spec, pruned(trained.spec.vision), "fp8", Fp8Source(choice, trained.pictures)
        )
        in_graph = {
            value.name: (value.dtype.name, tuple(value.shape))
            for value in export.graph().graph.initializers.values()
            if value.const_value is None
        }
        names = {torch.bfloat16: "BFLOAT16", torch.float8_e4m3fn: "FLOAT8E4M3FN"}
        weights = export.weights(trained.calibration)
        assert {weight.name: (names[weight.dtype], weight.shape) for weight in weights} == in_graph


def test_a_weight_that_is_not_quantised_passes_as_it_is():
    for name in ("mlp1.1.weight", f"{LAYER}.mlp.fc1.bias", f"{LAYER}.norm1.weight", f"{LAYER}.ls1"):
        weight = weight_of_tensor(name, torch.ones(3, 3))
        assert quantised_weights([weight], calibration_of(torch.ones(1)), CHOICES[3], head_size=32) == [weight]


def test_nothing_is_read_before_it_is_asked_for(matrix):
    def must_not() -> Iterator[torch.Tensor]:
        raise AssertionError("read")

    weight = dataclasses.replace(weight_of(matrix), chunks=must_not)
    names = [part.name for part in quantised_weights([weight], calibration_of(matrix), CHOICES[0], head_size=32)]
    assert names == [f"{LAYER}.mlp.fc2.{part}" for part in ("weight", "weight_scale", "input_scale")]


@pytest.mark.parametrize("missing", ["block.0.gelu", f"{LAYER}.mlp.fc2.weight"])
def test_a_calibration_without_an_amax_is_refused_by_its_name(matrix, missing):
    calibration = calibration_of(matrix)
    amax = {name: value for name, value in calibration.amax.items() if name != missing}
    with pytest.raises(NvlmError, match=rf"no amax of {missing}"):
        quantised_weights([weight_of(matrix)], VisionCalibration(amax, 1, 1), CHOICES[0], head_size=32)


@pytest.mark.parametrize("amax", [0.0, -1.0, float("nan"), float("inf")])
def test_an_amax_that_cannot_be_is_refused(matrix, amax):
    calibration = calibration_of(matrix, **{"block.0.gelu": amax})
    with pytest.raises(NvlmError, match=r"amax of block\.0\.gelu is"):
        quantised_weights([weight_of(matrix)], calibration, CHOICES[0], head_size=32)


@pytest.mark.parametrize("scales", ["per_tensor", "per_channel"])
def test_weights_that_were_not_the_calibrated_ones_are_refused(matrix, scales):
    weights = quantised_weights([weight_of(matrix)], calibration_of(2 * matrix), Fp8Choice(scales), head_size=32)
    with pytest.raises(NvlmError, match=r"mlp\.fc2\.weight has amax .* calibration is of another checkpoint"):
        list(weights[0].chunks())


def test_a_float32_checkpoint_rounded_to_bf16_on_its_way_is_still_the_calibrated_one(matrix):
    fine = matrix.float() * 1.001
    (codes, *_) = quantised_weights(
        [weight_of(fine.to(torch.bfloat16))], calibration_of(fine), CHOICES[0], head_size=32
    )
    assert len(list(codes.chunks())) == 3


def test_the_points_that_feed_the_linears_are_points_of_a_block(tiny_spec):
    block = stages(tiny_spec.vision)[1]
    assert {f"block.0.{point}" for point in LINEAR_INPUTS.values()} <= set(block.points)
