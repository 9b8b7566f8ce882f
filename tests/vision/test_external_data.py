"""Weights in the external-data file: page-aligned, finite, read back."""

from __future__ import annotations

import pytest
import torch

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.vision.external_data import PAGE_BYTES, slots_of, stream_tensors

WEIGHTS = {"a": torch.arange(3.0), "empty": torch.zeros(0), "b": torch.randn(50, 40), "scalar": torch.tensor(2.5)}


def test_tensors_start_on_pages_and_do_not_overlap():
    slots = slots_of(WEIGHTS)
    assert all(slot.offset % PAGE_BYTES == 0 for slot in slots.values())
    assert (slots["a"].size_bytes, slots["b"].offset, slots["scalar"].offset) == (12, 4096, 4096 + 8192)


def test_places_are_known_before_there_are_weights():
    meta = {name: tensor.to("meta") for name, tensor in WEIGHTS.items()}
    assert slots_of(meta) == slots_of(WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_holds_every_tensors_bytes_at_its_place(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    path = tmp_path / "data"
    content_of = stream_tensors(path, weights, weights.__getitem__)
    content = path.read_bytes()
    for name, slot in content_of.items():
        found = content[slot.offset : slot.offset + slot.size_bytes]
        assert found == bytes(weights[name].reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_the_tensors_name(tmp_path, value):
    weights = {**WEIGHTS, "b": WEIGHTS["b"].clone()}
    weights["b"][7, 3] = value
    with pytest.raises(NvlmError, match="tensor b holds 1 value"):
        stream_tensors(tmp_path / "data", weights, weights.__getitem__)


def test_a_file_that_reads_back_differently_is_the_machines_fault(tmp_path):
    readings = iter([torch.zeros(3), torch.tensor([0.0, 0.0, -0.0])])
    with pytest.raises(MachineError, match=r"a read back from .* differs"):
        stream_tensors(tmp_path / "data", {"a": torch.zeros(3)}, lambda _: next(readings))


def test_a_tensor_that_is_not_what_the_graph_says_is_a_mistake_of_ours(tmp_path):
    with pytest.raises(ValueError, match=r"a is torch\.float32 \[4\], the graph has torch\.float32 \[3\]"):
        stream_tensors(tmp_path / "data", {"a": torch.zeros(3)}, lambda _: torch.zeros(4))
