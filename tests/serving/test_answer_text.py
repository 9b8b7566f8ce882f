"""Token ids become text: whole characters, nothing of a stop word, and the reason of the end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving.answer_text import AnswerText, Ending
from nvlm_deploy.serving.token_bytes import TokenBytes

END, OTHER_END = 364, 362
MANY = 10**6
TEXTS = ["plain text", "größer", "日本語 text", "🙂🙃", "a\n\n b", "<tile_1>", "e\u0301"]


@pytest.fixture(scope="module")
def token_bytes(tokenizer_file) -> TokenBytes:
    return TokenBytes(tokenizer_file)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file))


def ending(max_tokens: int = MANY, *stop_words: str, min_tokens: int = 0) -> Ending:
    return Ending(frozenset({END, OTHER_END}), max_tokens, stop_words, min_tokens)


def chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """The ids in pieces of these sizes, over and over; of one where all sizes are used up."""
    found, rest = [], list(ids)
    for size in itertools.cycle(sizes or [1]):
        if not rest:
            return found
        found.append(rest[:size])
        rest = rest[size:]
    return found


def told(answer: AnswerText, pieces: list[list[int]]) -> str:
    """The text of an answer that TensorRT-LLM ends by a response without ids."""
    text = "".join(answer.piece(ids).text for ids in pieces if not answer.finish_reason)
    return text if answer.finish_reason else text + answer.piece([]).text


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_tokenizers_own_decoding(token_bytes, tokenizer, text) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert told(AnswerText(token_bytes, ending()), chunks(ids, [1])) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 380).filter(lambda token: token not in (END, OTHER_END)), max_size=40),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    limit=st.integers(1, 50),
)
def test_any_ids_in_any_pieces_join_to_the_tokenizers_own_decoding(token_bytes, tokenizer, ids, sizes, limit) -> None:
    answer = AnswerText(token_bytes, ending(limit))
    assert told(answer, chunks(ids, sizes)) == tokenizer.decode(ids[:limit])
    assert answer.finish_reason == ("length" if len(ids) >= limit else "stop")
    assert answer.tokens == min(limit, len(ids))


def test_special_tokens_have_no_text_and_other_added_ones_have_theirs(token_bytes, tokenizer) -> None:
    assert token_bytes([tokenizer.token_to_id("<|im_end|>")]) == b""
    assert token_bytes([tokenizer.token_to_id("<tool_call>")]) == b"<tool_call>"
    assert token_bytes([511, 100_000]) == b""


@pytest.mark.parametrize("content", ["two words", "é", "Ġ", "漢字", "a\nb"])
def test_an_added_token_is_spelled_as_the_tokenizers_library_spells_it(tokenizer_file, tmp_path, content) -> None:
    from tokenizers import AddedToken

    added = Tokenizer.from_file(str(tokenizer_file))
    added.add_tokens([AddedToken(content, normalized=False)])
    added.save(str(tmp_path / "tokenizer.json"))
    token = added.token_to_id(content)
    spelled = TokenBytes(tmp_path / "tokenizer.json")([token])
    assert spelled.decode(errors="replace") == added.decode([token])


def test_a_piece_never_ends_inside_a_character_and_a_cut_character_is_replaced(token_bytes, tokenizer) -> None:
    ids = tokenizer.encode("🙂", add_special_tokens=False).ids
    assert len(ids) > 1
    answer = AnswerText(token_bytes, ending(len(ids) - 1))
    pieces = [answer.piece([token]) for token in ids[:-1]]
    assert [piece.text for piece in pieces] == [""] * (len(ids) - 2) + ["\ufffd"]
    assert [piece.finish_reason for piece in pieces] == [""] * (len(ids) - 2) + ["length"]


@pytest.mark.parametrize("end", [END, OTHER_END])
def test_any_end_id_ends_the_answer_and_is_not_counted(token_bytes, tokenizer, end) -> None:
    ids = tokenizer.encode("one", add_special_tokens=False).ids
    answer = AnswerText(token_bytes, ending())
    piece = answer.piece([*ids, end, *ids])
    assert (piece.text, piece.tokens, piece.finish_reason) == ("one", len(ids), "stop")
    assert answer.piece(ids).text == ""


def test_a_stop_word_inside_a_token_ends_the_text_before_it(token_bytes, tokenizer) -> None:
    (token,) = tokenizer.encode(" tiles", add_special_tokens=False).ids
    answer = AnswerText(token_bytes, ending(MANY, "ile"))
    piece = answer.piece([token])
    assert (piece.text, piece.finish_reason, answer.is_cut) == (" t", "stop", True)


def test_what_may_become_a_stop_word_is_held_back_until_it_cannot(token_bytes, tokenizer) -> None:
    answer = AnswerText(token_bytes, ending(MANY, "abad"))
    letters = [tokenizer.token_to_id(letter) for letter in "ababa"]
    assert [answer.piece([letter]).text for letter in letters] == ["", "", "", "ab", ""]
    assert answer.piece([END]).text == "aba"


def test_a_stop_word_counts_only_after_the_least_number_of_tokens(token_bytes, tokenizer) -> None:
    letters = [tokenizer.token_to_id(letter) for letter in "xaxax"]
    answer = AnswerText(token_bytes, ending(MANY, "a", min_tokens=3))
    assert told(answer, chunks(letters, [1])) == "xax"
    assert answer.finish_reason == "stop"


def test_the_limit_is_told_unless_the_last_token_brings_a_stop_word(token_bytes, tokenizer) -> None:
    letters = [tokenizer.token_to_id(letter) for letter in "abc"]
    for word, text, reason in (("z", "abc", "length"), ("c", "ab", "stop")):
        answer = AnswerText(token_bytes, ending(3, word))
        assert (told(answer, chunks(letters, [1])), answer.finish_reason) == (text, reason)


def expected_text(text: str, words: list[str]) -> tuple[str, bool]:
    """The text before the stop word that is complete first; of two that end together the longer."""
    for end in range(1, len(text) + 1):
        found = [len(word) for word in words if text[:end].endswith(word)]
        if found:
            return text[: end - max(found)], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab é🙂", min_size=1, max_size=40),
    words=st.lists(st.text(alphabet="ab é🙂", min_size=1, max_size=5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
@example(text="aab", words=["ab"], sizes=[1])
@example(text="aaab", words=["aab", "ab"], sizes=[1])
def test_any_stop_words_in_any_pieces_end_the_text_as_a_plain_search_does(
    token_bytes, tokenizer, text, words, sizes
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    text = tokenizer.decode(ids)
    answer = AnswerText(token_bytes, ending(MANY, *words))
    before, is_cut = expected_text(text, words)
    assert told(answer, chunks(ids, sizes)) == before
    assert answer.is_cut == is_cut


def test_another_kind_of_tokenizer_is_refused(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"decoder": {"type": "Metaspace"}, "model": {"vocab": {}}}')
    with pytest.raises(NvlmError, match="not ByteLevel"):
        TokenBytes(path)
