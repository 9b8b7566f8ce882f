"""The vision half against transformers' InternVL, which NVIDIA and we did not write."""

from __future__ import annotations

import pytest
import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import (
    JointRmsNorm,
    Normalisation,
    VisionTower,
    pixel_shuffle,
    vision_tower_from_checkpoint,
)
from nvlm_deploy.vision.heads import pruned, real_chunks

NAMES = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "encoder.layers.": "encoder.layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.q_norm.": ".attention.q_norm.",
    ".attn.k_norm.": ".attention.k_norm.",
    ".attn.proj.": ".attention.projection_layer.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def spec(random_checkpoint):
    return spec_from_checkpoint(random_checkpoint)


@pytest.fixture(scope="module")
def tower(random_checkpoint, spec):
    return vision_tower_from_checkpoint(random_checkpoint, spec)


@pytest.fixture(scope="module")
def pruned_tower(random_checkpoint, spec):
    tower = VisionTower(pruned(spec.vision), spec.projector).requires_grad_(False)
    names = tower.state_dict()
    tower.load_state_dict(
        {name: torch.cat(list(real_chunks(random_checkpoint, name, spec.vision))).float() for name in names}
    )
    return tower


@pytest.fixture(scope="module")
def internvl(random_checkpoint, spec):
    """transformers' InternVLVisionModel with our weights: qkv unfused, dummy heads cut off here by hand."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    vision = spec.vision
    config = InternVLVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        intermediate_size=vision.intermediate_size,
        image_size=[vision.image_size] * 2,
        patch_size=[vision.patch_size] * 2,
        layer_norm_eps=vision.norm_epsilon,
        use_qk_norm=True,
        norm_type="rms_norm",
        attention_bias=False,
        use_mean_pooling=True,
        attn_implementation="eager",
    )
    model = InternVLVisionModel(config).eval()
    model.load_state_dict(_internvl_weights(random_checkpoint, vision.hidden_size), strict=True)
    return model.requires_grad_(False)


def _internvl_weights(checkpoint, real: int) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in checkpoint.tensors("vision_model.").items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if name.endswith(".attn.qkv.weight"):
            for letter, block in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = block[:real].float()
        elif name.endswith((".attention.q_norm.weight", ".attention.k_norm.weight", ".projection_layer.weight")):
            weights[name] = tensor[..., :real].float()
        else:
            weights[name] = tensor.float()
    return weights


@pytest.fixture(scope="module")
def pixels(spec):
    return torch.randn(3, 3, spec.vision.image_size, spec.vision.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("which", ["tower", "pruned_tower"])
def test_the_encoder_equals_transformers_internvl_with_and_without_dummy_heads(which, internvl, pixels, request):
    found = request.getfixturevalue(which).vision_model(pixels)
    error = relative_error(found, internvl(pixel_values=pixels).last_hidden_state)
    print(f"{which}: relative error {error:.1e}")
    assert error < 1e-4


def test_trap_1_zero_dummy_heads_change_nothing(tower, pruned_tower, spec):
    assert (spec.vision.heads, spec.vision.padded_heads) == (4, 11)
    tiles = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(tower(tiles), pruned_tower(tiles), rtol=1e-5, atol=1e-5)


def test_trap_2_the_qk_norm_is_joint_over_the_real_heads_and_divides_by_their_width():
    norm = JointRmsNorm(12, 0.0, real_width=8)
    x = torch.zeros(12)
    x[:8] = 3.0
    # 3 / sqrt(mean of nine) = 1; a divisor of 12 would give sqrt(12 / 8) instead
    torch.testing.assert_close(norm(x)[:8], torch.ones(8))
    x[:4] = 0.0
    # jointly over both heads of 4: 3 / sqrt(9 / 2); head by head it would be 1 again
    torch.testing.assert_close(norm(x)[4:8], torch.full((4,), 2.0**0.5))


def test_what_dummy_heads_hold_never_enters_the_norm_of_the_real_ones():
    norm = JointRmsNorm(12, 1e-6, real_width=8)
    x = torch.randn(12, generator=torch.Generator().manual_seed(3))
    noisy = x.clone()
    noisy[8:] = 1000.0
    torch.testing.assert_close(norm(x)[:8], norm(noisy)[:8])


def test_a_divisor_over_all_padded_channels_would_be_noticed(tower, internvl, pixels):
    saved = [(norm, norm.real_width) for norm in tower.modules() if isinstance(norm, JointRmsNorm)]
    try:
        for norm, _ in saved:
            norm.real_width = len(norm.weight)
        assert relative_error(tower.vision_model(pixels), internvl(pixel_values=pixels).last_hidden_state) > 1e-2
    finally:
        for norm, width in saved:
            norm.real_width = width


def test_the_block_norm_accumulates_in_float32():
    norm = JointRmsNorm(4096, 1e-6).to(torch.bfloat16)
    x = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    # summed in bfloat16, 4096 ones stop at 256
    torch.testing.assert_close(norm(x).float(), torch.ones(4096))


def test_pixel_shuffle_is_version_2_as_transformers_has_it_and_not_version_1():
    from transformers import InternVLModel

    patches = torch.arange(2 * 64 * 3, dtype=torch.float32).reshape(2, 64, 3)
    reference = InternVLModel.pixel_shuffle(None, patches.reshape(2, 8, 8, 3), scale_factor=0.5)
    found = pixel_shuffle(patches, grid=8)
    assert torch.equal(found, reference.reshape(2, 16, 12))
    version_1 = found.reshape(2, 4, 4, 12).transpose(1, 2).reshape(2, 16, 12)
    assert not torch.equal(found, version_1)


def test_a_visual_token_holds_its_four_patches_in_reading_order():
    patches = torch.arange(16.0).reshape(1, 16, 1)
    assert pixel_shuffle(patches, grid=4).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


def test_trap_3_the_projector_is_as_wide_as_the_decoder_mlp_and_has_no_linear_biases(tower, spec):
    hidden, wide = spec.decoder.hidden_size, spec.decoder.intermediate_size
    shapes = {name: tuple(weight.shape) for name, weight in tower.mlp1.state_dict().items()}
    assert shapes == {"0.weight": (512,), "0.bias": (512,), "1.weight": (wide, 512), "3.weight": (hidden, wide)}


def test_the_projector_is_layernorm_with_epsilon_1e_5_then_an_exact_gelu_between_two_products(random_checkpoint, tower):
    # a spread of 1e-3 around zero, so that the epsilon decides: 1e-6 would give values three times as large
    x = 1e-3 * torch.randn(1, 3, 512, generator=torch.Generator().manual_seed(4))
    weights = {name: tensor.double() for name, tensor in random_checkpoint.tensors("mlp1.").items()}
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    first = (normed * weights["0.weight"] + weights["0.bias"]) @ weights["1.weight"].T
    expected = (first * 0.5 * (1 + torch.erf(first / 2**0.5))) @ weights["3.weight"].T
    assert relative_error(tower.mlp1(x).double(), expected) < 1e-5


def test_pixels_are_scaled_to_one_and_normalised_per_channel():
    tiles = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(Normalisation()(tiles).flatten(), torch.tensor(expected))


def test_the_tower_maps_tiles_to_tokens_in_the_decoders_width(tower, spec):
    tiles = torch.zeros(3, 56, 56, 3, dtype=torch.uint8)
    assert tower(tiles).shape == (3, spec.tiling.tokens_per_tile, spec.decoder.hidden_size)


def test_the_class_token_is_dropped_and_the_last_block_used_without_a_final_norm(tower, internvl):
    tiles = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    states = internvl(pixel_values=tower.normalisation(tiles)).last_hidden_state
    expected = tower.mlp1(pixel_shuffle(states[:, 1:], grid=4))
    assert relative_error(tower(tiles), expected) < 1e-4


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(make_checkpoint):
    def cut(weights) -> None:
        weights["mlp1.1.weight"] = weights["mlp1.1.weight"][:-1]

    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=cut)
    with pytest.raises(NvlmError, match=r"mlp1\.1\.weight .*\[383, 512\], expected \[384, 512\]"):
        vision_tower_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint))


def test_a_missing_tensor_is_named(make_checkpoint):
    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=lambda weights: weights.pop("mlp1.3.weight"))
    with pytest.raises(NvlmError, match=r"no tensor 'mlp1\.3\.weight'"):
        vision_tower_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint))
