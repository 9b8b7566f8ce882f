"""What a question becomes before the models get it, and what is refused before any work; without a server."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import ImageLimits
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.serving.options import Ask, Sampling
from nvlm_deploy.serving.request import Limits, RequestPreparer
from nvlm_deploy.serving.word_list import unpacked_words

LIMITS = Limits(max_seq_len=512, max_images=4, default_max_tokens=32, max_request_bytes=100_000)
READING = ImageReading(limits=ImageLimits(max_image_pixels=10_000))


@pytest.fixture(scope="module")
def preparer(tokenizer_file, tiny_spec) -> RequestPreparer:
    return preparer_of(tokenizer_file, tiny_spec)


def preparer_of(tokenizer_file, spec, *, digest: str = "encoder", threads: int = 1) -> RequestPreparer:
    tiler = ImageTiler(spec.tiling, threads=threads, reading=READING)
    return RequestPreparer(PromptBuilder(tokenizer_file, spec), tiler, spec, LIMITS, vision_digest=digest)


def inputs(preparer: RequestPreparer, ask: Ask) -> dict:
    return preparer.prepared(ask)


def test_every_input_of_the_decoder_is_made_in_its_type_and_shape(preparer, picture) -> None:
    made = inputs(preparer, Ask(b"What?", (picture(),), stop_words=("y",), bad_words=("x",)))
    size = 56
    specs = {s.name: s for s in (tensors.TILES.with_axes(height=size, width=size), *tensors.PREPARED_FOR_DECODER)}
    assert made.keys() == specs.keys()
    for name, array in made.items():
        assert str(array.dtype) == {"string": "object"}.get(specs[name].dtype, specs[name].dtype)
        assert array.ndim == len(specs[name].axes)
        assert all(axis in (-1, size) for axis, size in zip(specs[name].triton_dims, array.shape, strict=True))


def test_text_alone_has_no_visual_ids(preparer, tiny_spec) -> None:
    assert inputs(preparer, Ask(b"What?"))["input_ids"].max() < tiny_spec.decoder.vocab_size


def test_visual_ids_count_through_all_images(preparer, picture, tiny_spec) -> None:
    made = inputs(preparer, Ask(b"<image>, then <image>", (picture(56, 56), picture(112, 56))))
    ids = made["input_ids"][0]
    assert (ids[ids >= 512] - 512).tolist() == list(range(4 * tiny_spec.tiling.tokens_per_tile))


def test_text_alone_has_no_tiles(preparer) -> None:
    made = inputs(preparer, Ask(b"What?"))
    assert made["tiles"].shape == (0, 56, 56, 3)
    assert not made["prompt_table_extra_ids"].any()


def test_extra_ids_name_the_pixels_and_the_encoder(preparer, tokenizer_file, tiny_spec, picture) -> None:
    def extra(seed: int, digest: str = "encoder") -> np.ndarray:
        one = preparer_of(tokenizer_file, tiny_spec, digest=digest)
        made = one.prepared(Ask(b"What?", (picture(56, 56, seed=seed),)))
        is_visual = made["input_ids"][0] >= 512
        assert ((made["prompt_table_extra_ids"][0] > 0) == is_visual).all()
        return made["prompt_table_extra_ids"][0][is_visual]

    assert (extra(1) == extra(1)).all()
    assert (extra(1) != extra(2)).all()
    assert (extra(1) != extra(1, digest="another encoder")).all()


def test_an_extra_id_is_the_first_8_bytes_of_the_digest_of_encoder_and_pixels(preparer, picture, tiny_spec) -> None:
    made = preparer.prepared(Ask(b"What?", (picture(112, 56),)))
    digests = [hashlib.sha256(b"encoder" + tile.tobytes()).digest()[:8] for tile in made["tiles"]]
    keys = [int.from_bytes(digest, "little") for digest in digests]
    extra = made["prompt_table_extra_ids"][0]
    assert extra[extra > 0].tolist() == np.repeat(np.array(keys, np.uint64), tiny_spec.tiling.tokens_per_tile).tolist()


@pytest.mark.parametrize("threads", [2, 8])
def test_more_threads_make_the_same_tensors(preparer, tokenizer_file, tiny_spec, picture, threads) -> None:
    ask = Ask(b"What?", (picture(56, 56), picture(99, 33), picture(20, 80)), sampling=Sampling(seed=1))
    made, expected = preparer_of(tokenizer_file, tiny_spec, threads=threads).prepared(ask), preparer.prepared(ask)
    assert made.keys() == expected.keys()
    assert all(np.array_equal(made[name], expected[name]) for name in made)


def test_silence_about_sampling_is_greedy(preparer) -> None:
    for sampling in (Sampling(), Sampling(temperature=0.0, top_p=0.5), Sampling(seed=4)):
        made = inputs(preparer, Ask(b"What?", sampling=sampling))
        assert (made["runtime_top_k"].item(), made["temperature"].item()) == (1, 1.0)


def test_top_p_alone_samples_at_temperature_1(preparer) -> None:
    made = inputs(preparer, Ask(b"What?", sampling=Sampling(top_p=0.5)))
    assert made["temperature"].item() == 1.0
    assert made["runtime_top_k"].item() == 0
    assert made["runtime_top_p"].item() == 0.5


def test_a_seed_is_kept_and_a_missing_one_drawn(preparer) -> None:
    assert inputs(preparer, Ask(b"What?", sampling=Sampling(seed=2**64 - 1)))["seed"].item() == 2**64 - 1
    assert len({inputs(preparer, Ask(b"What?"))["seed"].item() for _ in range(3)}) == 3


def test_bad_words_are_given_alone_and_after_a_space(preparer) -> None:
    made = inputs(preparer, Ask(b"What?", bad_words=("digits",)))
    encode = preparer.prompts.tokenizer.encode
    words = unpacked_words(made["bad_words_list"][0], name="bad")
    assert set(words) == {tuple(encode(word, add_special_tokens=False).ids) for word in ("digits", " digits")}


def test_a_control_token_as_a_bad_word_is_plain_text(preparer) -> None:
    made = inputs(preparer, Ask(b"What?", bad_words=("<|im_end|>",)))
    assert 364 not in made["bad_words_list"][0, 0]


def test_penalties_and_the_least_number_of_tokens_are_handed_on(preparer) -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=-1.5, min_tokens=7)
    made = inputs(preparer, Ask(b"What?", sampling=sampling))
    assert [made[name].item() for name in ("presence_penalty", "frequency_penalty", "min_tokens")] == [0.5, -1.5, 7]


def test_further_end_ids_become_words_of_one_id(tokenizer_file, tiny_spec) -> None:
    from dataclasses import replace

    spec = replace(tiny_spec, prompt=replace(tiny_spec.prompt, eos_token_id=364, eos_token_ids=(364, 362)))
    made = preparer_of(tokenizer_file, spec).prepared(Ask(b"What?"))
    assert made["end_id"].item() == 364
    assert unpacked_words(made["stop_words_list"][0], name="stop") == ((362,),)


def test_max_tokens_left_out_is_the_default_or_what_fits(preparer) -> None:
    assert inputs(preparer, Ask(b"What?"))["request_output_len"].item() == 32
    made = inputs(preparer, Ask(b"in " * 475))
    assert made["request_output_len"].item() == 512 - made["input_lengths"].item() < 32


@pytest.mark.parametrize(
    ("ask", "word"),
    [
        (Ask(b""), "the question is empty"),
        (Ask(b"  "), "the question is empty"),
        (Ask(b"\xff\xfe"), "not UTF-8"),
        (Ask(b"What?", images=(b"nonsense",)), "image 1 of 1: not an image"),
        (Ask(b"What?", max_tokens=10**9), "max_tokens is 1000000000, at most"),
        (Ask(b"What?", max_tokens=4, sampling=Sampling(min_tokens=5)), "min_tokens is 5, expected at most max_tokens"),
        (Ask(b"in " * 600), "with the answer at most 512"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(preparer, ask, word) -> None:
    with pytest.raises(NvlmError) as failure:
        preparer.prepared(ask)
    assert word in str(failure.value)


def test_a_question_of_placeholders_alone_is_empty_only_with_images(preparer, picture) -> None:
    with pytest.raises(NvlmError, match="the question is empty"):
        preparer.prepared(Ask(b"<image>", (picture(),)))
    preparer.prepared(Ask(b"<image>"))


def test_the_failing_image_is_numbered(preparer, picture) -> None:
    with pytest.raises(NvlmError, match="image 2 of 3: the image has 200 x 200 pixels"):
        preparer.prepared(Ask(b"What?", (picture(), picture(200, 200), b"")))


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (Ask(b"x" * 5_000_000), ["the text has 5,000,000 bytes", "512 tokens"]),
        (Ask(b"What?", images=(b"",) * 5), ["5 images, at most 4"]),
        (Ask(b"What?", images=(bytes(60_000),) * 2), ["120,005 bytes, at most 100,000"]),
    ],
)
def test_what_is_too_much_is_refused_with_number_and_limit_before_it_is_looked_at(preparer, ask, words) -> None:
    started = time.perf_counter()
    with pytest.raises(NvlmError) as failure:
        preparer.require_within_limits(ask)
    assert time.perf_counter() - started < 0.05
    assert all(word in str(failure.value) for word in words)


def test_no_text_that_fits_is_too_long_to_be_looked_at(preparer) -> None:
    """The longest text of all tokens' longest is as long as the limit."""
    longest = max(preparer.prompts.plain.get_vocab(), key=len)
    assert preparer.max_text_bytes == len(longest) * LIMITS.max_seq_len
    preparer.require_within_limits(Ask(b"x" * preparer.max_text_bytes))


def test_stop_words_are_handed_on_as_texts(preparer) -> None:
    made = inputs(preparer, Ask(b"What?", stop_words=("x y", "ü")))
    assert made["stop_texts"].tolist() == [[b"x y", "ü".encode()]]
    assert inputs(preparer, Ask(b"What?"))["stop_texts"].shape == (1, 0)
