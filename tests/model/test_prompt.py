"""The prompt as the released model's `chat()` writes it."""

from __future__ import annotations

import re

import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.prompt import PromptBuilder, image_span, with_images, with_prompt_table_ids

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
        ("<image>?", [], r"1 <image> placeholder\(s\), the request 0 image"),
        ("<image>?", [1, 3, 1], r"1 <image> placeholder\(s\), the request 3 image"),
    ],
)
def test_placeholders_and_images_must_match_in_number(builder, question, tiles, counts):
    with pytest.raises(NvlmError, match=counts):
        builder.ids(question, tiles)


def test_a_span_that_contains_a_placeholder_like_text_is_not_replaced_again():
    assert with_images("<image>", ["<image>"]) == "<image>"


def test_a_users_own_visual_pad_is_refused(builder):
    with pytest.raises(NvlmError, match="reserved token"):
        builder.ids(f"What is {PAD}?", [1])


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
