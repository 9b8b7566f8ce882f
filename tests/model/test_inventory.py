"""A checkpoint holds what its config.json says: no less, and in the model's own parts no more."""

from __future__ import annotations

import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.inventory import require_tensors
from nvlm_deploy.model.spec import spec_from_checkpoint


def inventory(make_checkpoint, edit) -> list[str]:
    checkpoint: Checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=edit)
    return require_tensors(checkpoint, spec_from_checkpoint(checkpoint))


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.encoder.layers.1.norm1.weight",
        "vision_model.encoder.layers.0.attn.qkv.bias",
        "vision_model.encoder.final_norm.weight",
        "mlp1.1.bias",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.model.layers.0.self_attn.o_proj.bias",
    ],
)
def test_a_layer_or_a_bias_more_than_the_config_knows_is_refused_by_name(make_checkpoint, name):
    with pytest.raises(NvlmError) as refusal:
        inventory(make_checkpoint, lambda weights: weights.update({name: torch.ones(4, dtype=torch.bfloat16)}))
    assert f"holds 1 tensors that its config.json does not know, first {name}" in refusal.value.message
    assert "config.json" in refusal.value.hint


def test_a_renamed_tensor_is_said_with_the_name_it_may_have_now(make_checkpoint):
    old, new = "vision_model.encoder.layers.0.mlp.fc2.weight", "vision_model.encoder.layers.0.mlp.fc2.gamma"
    with pytest.raises(NvlmError, match=f"first {old}; unknown there: {new}"):
        inventory(make_checkpoint, lambda weights: weights.update({new: weights.pop(old)}))


def test_what_is_of_no_part_or_made_from_the_config_again_is_let_be(make_checkpoint):
    extra = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq", "optimizer.step"}
    added = {name: torch.ones(4, dtype=torch.bfloat16) for name in extra}
    assert set(inventory(make_checkpoint, lambda weights: weights.update(added))) == extra
