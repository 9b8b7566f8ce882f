"""Checks and tensors of the first ensemble step, without a server."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import ImageLimits
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.serving.request import Ask, Limits, RequestPreparer, Sampling
from nvlm_deploy.serving.word_list import unpacked_words

LIMITS = Limits(
    max_seq_len=512,
    max_images=4,
    default_max_tokens=32,
    images=ImageReading(limits=ImageLimits(max_image_pixels=10_000)),
)


@pytest.fixture(scope="module")
def preparer(tokenizer_file, tiny_spec) -> RequestPreparer:
    return RequestPreparer(PromptBuilder(tokenizer_file, tiny_spec), tiny_spec, LIMITS, vision_digest="encoder")


def test_every_output_of_preprocessing_is_made_in_its_type_and_shape(preparer, picture, tiny_spec) -> None:
    made = preparer.prepared(Ask(b"What?", (picture(),), stop_words=(b"x",)))
    size = tiny_spec.tiling.tile_size
    specs = {s.name: s for s in (tensors.TILES.with_axes(height=size, width=size), *tensors.PREPARED_FOR_DECODER)}
    assert made.keys() == specs.keys()
    for name, array in made.items():
        assert str(array.dtype) == specs[name].dtype
        assert array.ndim == len(specs[name].axes)
        assert all(axis in (-1, size_) for axis, size_ in zip(specs[name].triton_dims, array.shape, strict=True))


def test_text_alone_has_no_tiles_and_no_visual_ids(preparer, tiny_spec) -> None:
    made = preparer.prepared(Ask(b"What?"))
    assert made["tiles"].shape == (0, 56, 56, 3)
    assert made["input_ids"].max() < tiny_spec.decoder.vocab_size
    assert not made["prompt_table_extra_ids"].any()


def test_visual_ids_count_through_all_images(preparer, picture, tiny_spec) -> None:
    made = preparer.prepared(Ask(b"<image>, then <image>", (picture(56, 56), picture(112, 56))))
    ids = made["input_ids"][0]
    visual = ids[ids >= 512] - 512
    assert visual.tolist() == list(range(4 * tiny_spec.tiling.tokens_per_tile))
    assert made["tiles"].shape[0] == 4


def test_extra_ids_name_the_pixels_and_the_encoder(preparer, tokenizer_file, tiny_spec, picture) -> None:
    def extra(seed: int, digest: str = "encoder") -> np.ndarray:
        prompts = PromptBuilder(tokenizer_file, tiny_spec)
        one = RequestPreparer(prompts, tiny_spec, LIMITS, vision_digest=digest)
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
    prompts = PromptBuilder(tokenizer_file, tiny_spec)
    other = RequestPreparer(prompts, tiny_spec, LIMITS, vision_digest="encoder", threads=threads)
    made, expected = other.prepared(ask), preparer.prepared(ask)
    other.close()
    assert made.keys() == expected.keys()
    assert all(np.array_equal(made[name], expected[name]) for name in made)


def test_silence_about_sampling_is_greedy(preparer) -> None:
    for sampling in (Sampling(), Sampling(temperature=0.0, top_p=0.5), Sampling(seed=4)):
        made = preparer.prepared(Ask(b"What?", sampling=sampling))
        assert (made["runtime_top_k"].item(), made["temperature"].item()) == (1, 1.0)


def test_top_p_alone_samples_at_temperature_1(preparer) -> None:
    made = preparer.prepared(Ask(b"What?", sampling=Sampling(top_p=0.5)))
    assert made["temperature"].item() == 1.0
    assert made["runtime_top_k"].item() == 0
    assert made["runtime_top_p"].item() == 0.5


def test_a_seed_is_kept_and_a_missing_one_drawn(preparer) -> None:
    assert preparer.prepared(Ask(b"What?", sampling=Sampling(seed=2**64 - 1)))["seed"].item() == 2**64 - 1
    assert len({preparer.prepared(Ask(b"What?"))["seed"].item() for _ in range(3)}) == 3


def test_stop_words_are_given_alone_and_after_a_space(preparer) -> None:
    made = preparer.prepared(Ask(b"What?", stop_words=(b"digits",)))
    encode = preparer.prompts.tokenizer.encode
    words = unpacked_words(made["stop_words_list"][0], name="stop")
    assert set(words) == {tuple(encode(word, add_special_tokens=False).ids) for word in ("digits", " digits")}


def test_max_tokens_left_out_is_the_default_or_what_fits(preparer) -> None:
    assert preparer.prepared(Ask(b"What?"))["request_output_len"].item() == 32
    long = b"in " * 475
    made = preparer.prepared(Ask(long))
    assert made["request_output_len"].item() == 512 - made["input_lengths"].item() < 32


@pytest.mark.parametrize(
    ("ask", "word"),
    [
        (Ask(b"  "), "the question is empty"),
        (Ask(b"<image>"), "the question is empty"),
        (Ask(b"\xff\xfe"), "not UTF-8"),
        (Ask(b"What?", images=(b"",) * 5), "5 images, at most 4"),
        (Ask(b"What?", images=(b"nonsense",)), "image 1 of 1: not an image"),
        (Ask(b"What <|vision_pad|>?"), "reserved token"),
        (Ask(b"What?", max_tokens=0), "max_tokens is 0"),
        (Ask(b"What?", max_tokens=-4), "max_tokens is -4"),
        (Ask(b"What?", max_tokens=10**9), "max_tokens is 1000000000, at most"),
        (Ask(b"in " * 600), "with the answer at most 512"),
        (Ask(b"What?", stop_words=(b"",)), "a stop word is empty"),
        (Ask(b"What?", stop_words=(b"x",) * 65), "65 stop words"),
        (Ask(b"What?", sampling=Sampling(temperature=float("inf"))), "temperature is inf"),
        (Ask(b"What?", sampling=Sampling(top_k=1025)), "top_k is 1025, expected 0 to 1024"),
        (Ask(b"What?", sampling=Sampling(top_p=-0.5)), "top_p is -0.5"),
        (Ask(b"What?", sampling=Sampling(repetition_penalty=float("nan"))), "repetition_penalty is nan"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(preparer, ask, word) -> None:
    with pytest.raises(NvlmError) as failure:
        preparer.prepared(ask)
    assert word in str(failure.value)


def test_the_failing_image_is_numbered(preparer, picture) -> None:
    with pytest.raises(NvlmError, match="image 2 of 3: the image has 200 x 200 pixels"):
        preparer.prepared(Ask(b"What?", (picture(), picture(200, 200), b"")))
