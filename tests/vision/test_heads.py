"""Dummy heads: cut off where they are zero, told where they are not."""

from __future__ import annotations

import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.spec import VisionSpec, spec_from_checkpoint
from nvlm_deploy.vision.heads import nonzero_dummy_tensors, pruned, split_heads, without_dummy_heads

RELEASED = VisionSpec(
    hidden_size=3200,
    intermediate_size=12800,
    layers=45,
    heads=25,
    padded_heads=32,
    image_size=448,
    patch_size=14,
    norm_epsilon=1e-6,
)
BLOCK = "vision_model.encoder.layers.0.attn."


def test_exactly_the_rows_of_the_facts_are_kept_of_qkv():
    rows = torch.arange(12288)[:, None]
    kept, dropped = split_heads(f"{BLOCK}qkv.weight", rows, RELEASED)
    assert kept.flatten().tolist() == [*range(3200), *range(4096, 7296), *range(8192, 11392)]
    assert sorted(kept.flatten().tolist() + dropped.flatten().tolist()) == list(range(12288))


@pytest.mark.parametrize("name", ["q_norm.weight", "k_norm.weight"])
def test_the_first_3200_channels_are_kept_of_the_norms(name):
    kept, dropped = split_heads(BLOCK + name, torch.arange(4096), RELEASED)
    assert kept.tolist() == list(range(3200))
    assert len(dropped) == 896


def test_the_first_3200_columns_are_kept_of_the_output_projection():
    kept = without_dummy_heads(f"{BLOCK}proj.weight", torch.arange(4096).expand(3, -1), RELEASED)
    assert kept.tolist() == [list(range(3200))] * 3
    assert kept.is_contiguous()


@pytest.mark.parametrize("name", [f"{BLOCK}proj.bias", "vision_model.encoder.layers.0.mlp.fc1.weight", "mlp1.1.weight"])
def test_a_tensor_without_heads_is_left_as_it_is(name):
    tensor = torch.arange(4096)
    kept, dropped = split_heads(name, tensor, RELEASED)
    assert torch.equal(kept, tensor)
    assert dropped.numel() == 0


def test_pruned_shapes_are_those_of_the_pruned_spec():
    assert pruned(RELEASED).attention_width == 3200
    assert without_dummy_heads(f"{BLOCK}qkv.weight", torch.zeros(12288, 2), RELEASED).shape == (9600, 2)


def test_a_checkpoint_of_zero_dummy_heads_has_none_that_count(random_checkpoint):
    assert nonzero_dummy_tensors(random_checkpoint, spec_from_checkpoint(random_checkpoint).vision) == []


def test_the_trained_model_has_seven_zero_dummy_heads_in_at_least_three_shards(tiny_folder):
    checkpoint = Checkpoint.open(tiny_folder)
    vision = spec_from_checkpoint(checkpoint).vision
    assert (vision.heads, vision.padded_heads) == (4, 11)
    assert nonzero_dummy_tensors(checkpoint, vision) == []
    assert len(checkpoint.shards) >= 3


@pytest.mark.parametrize("name", ["qkv.weight", "q_norm.weight", "k_norm.weight", "proj.weight"])
def test_one_value_in_one_dummy_head_is_found_wherever_it_is(make_checkpoint, name):
    def disturb(weights) -> None:
        weights[BLOCK + name][..., -1] = 2.0**-100

    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=disturb)
    assert nonzero_dummy_tensors(checkpoint, spec_from_checkpoint(checkpoint).vision) == [BLOCK + name]
