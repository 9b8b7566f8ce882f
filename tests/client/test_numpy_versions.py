"""Numbers go to the server as `struct` packs them, or are refused: numpy 1 would wrap some around, numpy 2 raise."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_deploy.client.wire import infer_request
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.tensors import TensorSpec

WHOLE = {"int32": "i", "uint64": "Q", "int64": "q"}


@pytest.mark.parametrize("dtype", WHOLE)
@settings(deadline=None)  # the first loads the client library
@given(value=st.integers(-(2**65), 2**65))
def test_a_whole_number_is_packed_or_refused(dtype: str, value: int) -> None:
    spec = TensorSpec("number", dtype, (1,))
    limits = np.iinfo(dtype)
    if int(limits.min) <= value <= int(limits.max):
        (packed,) = infer_request([(spec, [value])]).raw_input_contents
        assert packed == struct.pack("<" + WHOLE[dtype], value)
    else:
        with pytest.raises(NvlmError) as refused:
            infer_request([(spec, [value])])
        message = f"number is {value}, expected {int(limits.min)} to {int(limits.max)}"
        assert refused.value.message == message


@settings(deadline=None)
@given(value=st.floats(width=32, allow_nan=False))
def test_a_float_is_packed_as_it_is(value: float) -> None:
    (packed,) = infer_request([(TensorSpec("number", "float32", (1,)), [value])]).raw_input_contents
    assert packed == struct.pack("<f", value)


@settings(deadline=None)
@given(value=st.booleans())
def test_a_truth_value_is_one_byte(value: bool) -> None:
    (packed,) = infer_request([(TensorSpec("flag", "bool", (1,)), [value])]).raw_input_contents
    assert packed == struct.pack("<?", value)
