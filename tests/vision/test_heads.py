"""Dummy heads: cut off where they are zero, told where they are not."""

from __future__ import annotations

import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.writer import write_shards
from nvlm_deploy.model.spec import VisionSpec, spec_from_checkpoint
from nvlm_deploy.vision.heads import nonzero_dummy_tensors, pruned, real_chunks

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


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """One block's tensors of the released shapes that number their own rows or columns (small in the other axis)."""
    folder = tmp_path_factory.mktemp("numbered")
    tensors = {
        f"{BLOCK}qkv.weight": torch.arange(12288.0)[:, None],
        f"{BLOCK}q_norm.weight": torch.arange(4096.0),
        f"{BLOCK}k_norm.weight": torch.arange(4096.0),
        f"{BLOCK}proj.weight": torch.arange(4096.0).repeat(3, 1),
        f"{BLOCK}proj.bias": torch.arange(5.0),
        "mlp1.1.weight": torch.arange(4096.0),
    }
    write_shards(folder, tensors.items(), max_shard_bytes=10**9)
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def kept_of(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.cat(list(real_chunks(checkpoint, name, RELEASED)))


def test_exactly_the_rows_of_the_facts_are_kept_of_qkv(numbered):
    kept = kept_of(numbered, f"{BLOCK}qkv.weight")
    assert kept.flatten().tolist() == [*range(3200), *range(4096, 7296), *range(8192, 11392)]


@pytest.mark.parametrize("name", ["q_norm.weight", "k_norm.weight"])
def test_the_first_3200_channels_are_kept_of_the_norms(numbered, name):
    assert kept_of(numbered, BLOCK + name).tolist() == list(range(3200))


def test_the_first_3200_columns_are_kept_of_the_output_projection(numbered):
    assert kept_of(numbered, f"{BLOCK}proj.weight").tolist() == [list(range(3200))] * 3


@pytest.mark.parametrize("name", [f"{BLOCK}proj.bias", "mlp1.1.weight"])
def test_a_tensor_without_heads_is_left_as_it_is(numbered, name):
    assert torch.equal(kept_of(numbered, name), numbered.tensor(name))


def test_every_channel_that_is_not_kept_is_looked_at(numbered):
    assert set(nonzero_dummy_tensors(numbered, RELEASED)) == {
        BLOCK + name for name in ("qkv.weight", "q_norm.weight", "k_norm.weight", "proj.weight")
    }


def test_pruned_shapes_are_those_of_the_pruned_spec():
    assert pruned(RELEASED).attention_width == 3200
    assert pruned(RELEASED).head_size == RELEASED.head_size == 128


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
