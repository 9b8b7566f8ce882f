"""The prompt as the released model's `chat()` writes it."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.prompt import PromptBuilder, image_span, question_pieces, with_prompt_table_ids

PAD = "<|vision_pad|>"


@pytest.fixture(scope="module")
def builder(tokenizer_file, tiny_spec) -> PromptBuilder:
    return PromptBuilder(tokenizer_file, tiny_spec)


def without_pads(text: str) -> str:
    return re.sub(rf"(?:{re.escape(PAD)})+", "_", text)


def test_trap_6_one_tile_is_tagged_as_the_thumbnail_alone():
    assert image_span(1, 2) == f"<Image><tile_global_thumbnail>{PAD}{PAD}</Image>"


def test_several_tiles_are_numbered_from_one_and_the_thumbnail_comes_last():
    expected = "<Image><tile_1>_<tile_2>_<tile_global_thumbnail>_</Image>"
    assert without_pads(image_span(3, 4)) == expected
    assert image_span(7, 256).count(PAD) == 7 * 256


@pytest.mark.parametrize("tiles", range(1, 8))
def test_trap_5_a_span_of_n_tiles_takes_five_ids_a_tag_and_four_around_with_one_seam(builder, tiles):
    per_tile = builder.tokens_per_tile
    ids = builder.tokenizer.encode(image_span(tiles, per_tile), add_special_tokens=False).ids
    assert len(ids) == (per_tile + 5) * tiles + 4
    assert ids.count(builder.pad_token_id) == per_tile * tiles


def test_trap_5_tile_tags_are_plain_text_of_five_tokens_each(builder):
    tags = [f"<tile_{number}>" for number in range(1, 7)] + ["<tile_global_thumbnail>"]
    for tag in tags:
        assert len(builder.tokenizer.encode(PAD + tag + PAD).ids) == 2 + 5
        assert builder.tokenizer.token_to_id(tag) is None


def test_trap_5_the_seam_between_image_and_first_tag_is_one_token(builder):
    assert builder.tokenizer.encode("<Image><tile_1>").tokens == ["<Image", "><", "tile", "_", "1", ">"]
    separate = builder.tokenizer.encode("<Image>").ids + builder.tokenizer.encode("<tile_1>").ids
    assert len(separate) == len(builder.tokenizer.encode("<Image><tile_1>").ids) + 1


def test_trap_7_the_chat_wrapper_has_its_own_system_sentence_and_no_newline_after_a_turn(builder):
    assert builder.text("Hello?") == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHello?<|im_end|><|im_start|>assistant\n"
    )


def test_trap_7_the_chat_template_wrapper_is_qwens_with_newlines(tokenizer_file, tiny_spec):
    builder = PromptBuilder(tokenizer_file, tiny_spec, wrapper="chat_template")
    assert builder.text("Hello?") == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_raw_wrapper_adds_nothing(tokenizer_file, tiny_spec):
    assert PromptBuilder(tokenizer_file, tiny_spec, wrapper="raw").text("Hello?") == "Hello?"


def test_another_system_sentence_can_be_given_or_the_turn_left_out(tokenizer_file, tiny_spec):
    other = PromptBuilder(tokenizer_file, tiny_spec, system="You are a math expert.")
    assert other.text("2 + 2?").startswith("<|im_start|>system\nYou are a math expert.<|im_end|>")
    none = PromptBuilder(tokenizer_file, tiny_spec, system=None)
    assert none.text("2 + 2?") == "<|im_start|>user\n2 + 2?<|im_end|><|im_start|>assistant\n"


def test_an_unknown_wrapper_is_refused_with_those_there_are(tokenizer_file, tiny_spec):
    with pytest.raises(NvlmError, match=r"'llama'.*chat, chat_template, raw"):
        PromptBuilder(tokenizer_file, tiny_spec, wrapper="llama")


def test_a_question_without_placeholder_gets_its_images_in_front_each_with_a_newline(builder):
    span = image_span(1, builder.tokens_per_tile)
    assert f"user\n{span}\nWhich digit?<|im_end|>" in builder.text("Which digit?", [1])
    assert f"user\n{span}\n{span}\nWhich digit?<|im_end|>" in builder.text("Which digit?", [1, 1])


def test_placeholders_are_replaced_in_order_each_by_its_own_tiles(builder):
    text = without_pads(builder.text("Image-1: <image>\nImage-2: <image>\nSame?", [1, 3]))
    assert "Image-1: <Image><tile_global_thumbnail>_</Image>\n" in text
    assert "Image-2: <Image><tile_1>_<tile_2>_<tile_global_thumbnail>_</Image>\nSame?" in text


def test_a_text_only_prompt_has_no_visual_positions(builder):
    ids = builder.ids("What is 12 plus 7?")
    assert builder.pad_token_id not in ids
    assert builder.prompt_table_ids("What is 12 plus 7?") == ids


@pytest.mark.parametrize(
    ("question", "tiles", "counts"),
    [
        ("<image> <image> same?", [1], r"2 <image> placeholder\(s\), the request 1 image"),
        ("<image>?", [1, 3, 1], r"1 <image> placeholder\(s\), the request 3 image"),
    ],
)
def test_placeholders_and_images_must_match_in_number(builder, question, tiles, counts):
    with pytest.raises(NvlmError, match=counts):
        builder.ids(question, tiles)


@pytest.mark.parametrize(
    ("question", "images", "pieces"),
    [
        ("<image>?", 0, ["<image>?"]),
        (r"\<image>?", 0, [r"\<image>?"]),
        ("a<image>b", 1, ["a", "b"]),
        (r"<image>: what does \<image> mean?", 1, ["", ": what does <image> mean?"]),
        (r"the \<image> tag", 1, ["", "\nthe <image> tag"]),
        ("what?", 2, ["", "\n", "\nwhat?"]),
        (r"\\<image>", 1, ["", "\n\\<image>"]),
        ("<<image>image>", 1, ["<", "image>"]),
    ],
)
def test_a_placeholder_counts_only_with_images_and_an_escaped_one_never(question, images, pieces):
    assert question_pieces(question, images) == pieces


CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|box_start|>", "<tool_call>"]
TAGS = ["<Image>", "</Image>", "<tile_1>", "<tile_12>", "<tile_global_thumbnail>", "<image>", r"\<image>"]
MIXTURES = st.lists(st.sampled_from([*CONTROL, *TAGS]) | st.text(max_size=4) | st.sampled_from([" ", "\n", "<", ">"]))


def control_ids(builder: PromptBuilder, ids: list[int]) -> list[int]:
    controls = {token for token, added in builder.tokenizer.get_added_tokens_decoder().items()}
    return [token for token in ids if token in controls]


def occurrences(of: list[int], ids: list[int]) -> int:
    return sum(ids[start : start + len(of)] == of for start in range(len(ids)))


@settings(max_examples=300, deadline=None)
@given(parts=MIXTURES, wrapper=st.sampled_from(["chat", "chat_template"]))
def test_no_text_makes_a_control_token(tokenizer_file, tiny_spec, parts, wrapper):
    builder = builders(tokenizer_file, tiny_spec, wrapper)
    question = "".join(parts)
    ids = builder.ids(question)
    assert control_ids(builder, ids) == control_ids(builder, builder.ids("What?"))
    assert unicodedata.normalize("NFC", question) in builder.tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(parts=MIXTURES, tiles=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_no_text_beside_images_makes_a_control_token_or_a_tag(tokenizer_file, tiny_spec, parts, tiles):
    builder = builders(tokenizer_file, tiny_spec, "chat")
    question = "".join(part for part in parts if part != "<image>").replace("<image>", r"\<image>")
    ids, honest = builder.ids(question, tiles), builder.ids("What?", tiles)
    assert control_ids(builder, ids) == control_ids(builder, honest)
    for tag in ("<tile_1>", "<tile_12>", "<tile_global_thumbnail>"):
        # without its outer signs, which may be one token with what stands beside them
        inner = builder.tokenizer.encode(tag, add_special_tokens=False).ids[1:-1]
        assert occurrences(inner, ids) == occurrences(inner, honest)


@cache
def builders(tokenizer_file, tiny_spec, wrapper) -> PromptBuilder:
    return PromptBuilder(tokenizer_file, tiny_spec, wrapper=wrapper)


@pytest.mark.parametrize("text", ["What is 12 plus 7?", "  two  spaces\n\nand lines ", "漢字 🙂 e\u0301", "a<b>c", ""])
@pytest.mark.parametrize("wrapper", ["chat", "chat_template"])
def test_honest_text_has_the_ids_that_the_whole_prompt_has_in_one_piece(tokenizer_file, tiny_spec, text, wrapper):
    builder = PromptBuilder(tokenizer_file, tiny_spec, wrapper=wrapper)
    for tiles in ([], [1], [3, 1]):
        whole = builder.tokenizer.encode(builder.text(text, tiles), add_special_tokens=False).ids
        assert builder.ids(text, tiles) == whole


def test_the_raw_wrapper_takes_a_trusted_callers_control_tokens(tokenizer_file, tiny_spec):
    builder = PromptBuilder(tokenizer_file, tiny_spec, wrapper="raw")
    text = "<|im_start|>user\nHi<|im_end|>"
    assert builder.ids(text) == builder.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(control_ids(builder, builder.ids(text))) == 2
    with pytest.raises(NvlmError, match="reserved token"):
        builder.ids(f"What is {PAD}?")


def test_visual_positions_are_numbered_from_the_vocabulary_size_on_across_images(builder, tiny_spec):
    plain = builder.ids("<image> and <image>?", [1, 3])
    fake = builder.prompt_table_ids("<image> and <image>?", [1, 3])
    rows = [token - tiny_spec.decoder.vocab_size for token in fake if token >= tiny_spec.decoder.vocab_size]
    assert rows == list(range(4 * tiny_spec.tiling.tokens_per_tile))
    assert [a for a, b in zip(plain, fake, strict=True) if a == b] == [
        id_ for id_ in plain if id_ != builder.pad_token_id
    ]


def test_numbering_starts_anew_with_every_prompt():
    assert with_prompt_table_ids([5, 9, 9, 5, 9], pad_token_id=9, vocab_size=100) == [5, 100, 101, 5, 102]


def test_the_turn_marks_are_single_special_tokens(builder, tiny_spec):
    ids = builder.ids("Hello?")
    assert ids[0] == builder.tokenizer.token_to_id("<|im_start|>")
    assert ids.count(builder.tokenizer.token_to_id("<|im_start|>")) == 3
    assert ids.count(tiny_spec.prompt.eos_token_id) == 2


def test_a_missing_tokenizer_is_named(tmp_path, tiny_spec):
    with pytest.raises(NvlmError, match=r"no tokenizer\.json"):
        PromptBuilder(tmp_path / "tokenizer.json", tiny_spec)


def test_a_damaged_tokenizer_is_named(tmp_path, tiny_spec):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(NvlmError, match=r"not a readable tokenizer\.json"):
        PromptBuilder(tmp_path / "tokenizer.json", tiny_spec)


def test_a_tokenizer_of_another_model_lacks_the_visual_pad(tmp_path, tiny_spec):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(NvlmError, match=r"no token <\|vision_pad\|>"):
        PromptBuilder(tmp_path / "tokenizer.json", tiny_spec)


def test_the_trained_models_tokenizer_is_the_one_tested_here(tiny_folder, builder, tiny_spec):
    shipped = PromptBuilder(tiny_folder / "tokenizer.json", tiny_spec)
    question = "Which digit is in tile 3? Ünïcödé 漢字 🙂 <tile_1>"
    assert shipped.ids(question, [7, 1]) == builder.ids(question, [7, 1])
