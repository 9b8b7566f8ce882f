"""Border tensors: names and types that Triton and the C++ backend know."""

from __future__ import annotations

import numpy as np
import pytest

from nvlm_deploy import tensors
from nvlm_deploy.tensors import EMBEDDINGS, PROMPT_EMBEDDING_TABLE, TILES, TensorSpec

ALL = [value for value in vars(tensors).values() if isinstance(value, TensorSpec)]


def test_a_named_axis_is_minus_one_in_triton_and_a_bound_one_its_size():
    assert TILES.triton_dims == [-1, -1, -1, 3]
    assert TILES.with_axes(height=448, width=448).triton_dims == [-1, 448, 448, 3]


def test_binding_an_axis_leaves_the_original_as_it_was():
    TILES.with_axes(height=56)
    assert TILES.axes == ("tiles", "height", "width", 3)


def test_an_axis_that_does_not_exist_is_simply_not_bound():
    assert TILES.with_axes(depth=3) == TILES


def test_required_drops_the_optional_mark_only():
    required = PROMPT_EMBEDDING_TABLE.required()
    assert (required.optional, required.name, required.axes) == (
        False,
        PROMPT_EMBEDDING_TABLE.name,
        PROMPT_EMBEDDING_TABLE.axes,
    )


def test_an_unknown_element_type_is_refused():
    with pytest.raises(ValueError, match="x: no element type 'fp8'"):
        TensorSpec("x", "fp8", (1,))


@pytest.mark.parametrize("tensor", ALL, ids=[tensor.name for tensor in ALL])
def test_every_type_is_one_of_tritons_own(tensor):
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    assert model_config.DataType.Value(tensor.triton_type) > 0


@pytest.mark.parametrize("tensor", ALL, ids=[tensor.name for tensor in ALL])
def test_every_type_is_one_numpy_holds_but_for_bfloat16_and_text(tensor):
    assert tensor.dtype in ("bfloat16", "string") or np.dtype(tensor.dtype).name == tensor.dtype


def test_no_two_inputs_of_a_request_share_a_name():
    for group in (tensors.REQUEST_INPUTS, tensors.RESPONSE_OUTPUTS):
        assert len({tensor.name for tensor in group}) == len(group)


def test_the_vision_tensors_carry_tiles_first():
    assert TILES.axes[0] == EMBEDDINGS.axes[0] == "tiles"
