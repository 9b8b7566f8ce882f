"""Values that no checkpoint's tensor has are found as the tensor is read."""

from __future__ import annotations

import pytest
import torch

from nvlm_deploy.checkpoint.soundness import SoundChunks, magnitude
from nvlm_deploy.errors import NvlmError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_magnitude_is_the_largest_absolute_value(dtype: torch.dtype) -> None:
    assert magnitude(torch.tensor([[1.0, -3.0], [2.0, 0.5]], dtype=dtype)).item() == 3
    assert magnitude(torch.tensor([1.0, float("nan")], dtype=dtype)).isnan()


def test_chunks_come_as_they_are_and_their_amax_is_the_tensors() -> None:
    rows = torch.tensor([[1.0, -3.0], [0.0, 0.0], [2.0, 0.5]], dtype=torch.bfloat16)
    chunks = SoundChunks("mlp1.1.weight", iter(rows.split(1)))
    assert torch.equal(torch.cat([*chunks]), rows)
    assert chunks.amax.item() == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_in_its_chunk(value: float) -> None:
    rows = torch.ones(3, 2)
    rows[1, 1] = value
    chunks = iter(SoundChunks("mlp1.0.bias", iter(rows.split(1))))
    next(chunks)
    with pytest.raises(NvlmError, match=r"tensor mlp1\.0\.bias holds NaN or infinity"):
        next(chunks)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("language_model.lm_head.weight", True),
        ("vision_model.encoder.layers.0.norm1.weight", True),
        ("vision_model.embeddings.position_embedding", True),
        ("vision_model.encoder.layers.0.ls1", False),
        ("mlp1.0.bias", False),
    ],
)
def test_zeros_are_refused_where_a_model_has_none(name: str, refused: bool) -> None:
    chunks = SoundChunks(name, iter(torch.zeros(4, 2).split(2)))
    if refused:
        with pytest.raises(NvlmError, match=f"tensor {name} is all zeros"):
            list(chunks)
    else:
        assert len(list(chunks)) == 2
