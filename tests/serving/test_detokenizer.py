"""Pieces of text that never end inside a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving.detokenizer import Detokenizer, TokenBytes
from nvlm_deploy.serving.postprocessing import has_stopped


@pytest.fixture(scope="module")
def token_bytes(tokenizer_file) -> TokenBytes:
    return TokenBytes(tokenizer_file)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file))


def pieces(detokenizer: Detokenizer, tokens: list[int], *, request_id: str = "a") -> list[bytes]:
    last = len(tokens) - 1
    return [detokenizer.piece(request_id, [token], is_last=index == last) for index, token in enumerate(tokens)]


TEXTS = ["plain text", "größer", "日本語 text", "🙂🙃", "a\n\n b", "<tile_1>", "e\u0301"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_tokenizers_own_decoding(token_bytes, tokenizer, text) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    found = pieces(Detokenizer(token_bytes), ids)
    assert b"".join(found).decode() == tokenizer.decode(ids)
    for piece in found:
        piece.decode()


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 380), max_size=40))
def test_any_ids_join_to_the_tokenizers_own_decoding(token_bytes, tokenizer, ids) -> None:
    assert b"".join(pieces(Detokenizer(token_bytes), ids)).decode() == tokenizer.decode(ids)


def test_special_tokens_have_no_text(token_bytes, tokenizer) -> None:
    assert token_bytes([tokenizer.token_to_id("<|im_end|>")]) == b""
    assert token_bytes([tokenizer.token_to_id("<tool_call>")]) == b"<tool_call>"
    assert token_bytes([511, 100_000]) == b""


def test_two_requests_do_not_mix_their_bytes(token_bytes, tokenizer) -> None:
    detokenizer = Detokenizer(token_bytes)
    one, two = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("🙂", "日"))
    assert detokenizer.piece("one", one[:-1], is_last=False) == b""
    assert detokenizer.piece("two", two, is_last=False).decode() == "日"
    assert detokenizer.piece("one", one[-1:], is_last=False).decode() == "🙂"


def test_a_finished_request_leaves_nothing_and_a_cut_one_is_flushed(token_bytes, tokenizer) -> None:
    detokenizer = Detokenizer(token_bytes)
    ids = tokenizer.encode("🙂", add_special_tokens=False).ids
    detokenizer.piece("a", ids[:1], is_last=False)
    assert len(detokenizer) == 1
    assert detokenizer.piece("a", [], is_last=True).decode() == "\ufffd"
    assert len(detokenizer) == 0


def test_abandoned_requests_are_bounded(token_bytes, tokenizer) -> None:
    detokenizer = Detokenizer(token_bytes, max_requests=10)
    first = tokenizer.encode("🙂", add_special_tokens=False).ids[:1]
    for number in range(100):
        detokenizer.piece(str(number), first, is_last=False)
    assert len(detokenizer) == 10


def test_without_an_id_bytes_pass_through(token_bytes, tokenizer) -> None:
    detokenizer = Detokenizer(token_bytes)
    ids = tokenizer.encode("🙂", add_special_tokens=False).ids
    assert b"".join(pieces(detokenizer, ids, request_id="")).decode() == "🙂"
    assert len(detokenizer) == 0


def test_another_kind_of_tokenizer_is_refused(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"decoder": {"type": "Metaspace"}, "model": {"vocab": {}}}')
    with pytest.raises(NvlmError, match="not ByteLevel"):
        TokenBytes(path)


def test_an_end_id_or_an_empty_response_means_stopped() -> None:
    """The reference decoder sends the first, TensorRT-LLM the second."""
    assert has_stopped([4, 9], end_id=9)
    assert has_stopped([], end_id=9)
    assert not has_stopped([9, 4], end_id=9)
