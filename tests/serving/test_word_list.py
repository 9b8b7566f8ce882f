"""TensorRT-LLM's packed word lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving.word_list import ends_with, packed_words, unpacked_words

words = st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple), max_size=6)


@given(words)
def test_words_come_back(some) -> None:
    packed = packed_words(some)
    assert packed.dtype == np.int32
    assert unpacked_words(packed, name="stop_words_list") == tuple(some)


def test_the_layout_is_tensorrt_llms() -> None:
    assert packed_words([(5, 6), (7,)]).tolist() == [[5, 6, 7], [2, 3, -1]]


@pytest.mark.parametrize("ends", [[2, 1, -1], [4, -1, -1], [0, -1, -1]])
def test_ends_that_do_not_ascend_are_refused_by_name(ends) -> None:
    with pytest.raises(NvlmError, match="bad_words_list"):
        unpacked_words(np.array([[1, 2, 3], ends], dtype=np.int32), name="bad_words_list")


def test_another_shape_is_refused() -> None:
    with pytest.raises(NvlmError, match=r"expected \[2, n\]"):
        unpacked_words(np.zeros((3, 1), dtype=np.int32), name="x")


def test_a_word_longer_than_the_text_is_not_its_tail() -> None:
    assert ends_with([1, 2], (2,))
    assert not ends_with([2], (1, 2))
