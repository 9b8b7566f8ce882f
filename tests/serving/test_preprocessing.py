"""Ids of a tile's content, so that two pictures never share a place in the KV cache."""

from __future__ import annotations

import hashlib

import numpy as np

from nvlm_deploy.serving.preprocessing import extra_ids, tile_key

TILE = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)


def test_a_tiles_key_is_the_first_8_bytes_of_the_digest_of_encoder_and_pixels() -> None:
    digest = hashlib.sha256(b"encoder" + TILE.tobytes()).digest()
    assert tile_key(TILE, "encoder") == int.from_bytes(digest[:8], "little")


def test_other_pixels_and_another_encoder_have_other_keys() -> None:
    keys = {tile_key(TILE, "encoder"), tile_key(TILE + 1, "encoder"), tile_key(TILE, "another encoder")}
    assert len(keys) == 3


def test_each_visual_position_has_its_tiles_key_and_any_other_has_none() -> None:
    extra = extra_ids([7, 100, 101, 8, 102, 103, 9], [5, 2**64 - 1], vocab_size=100, tokens_per_tile=2)
    assert extra.dtype == np.uint64
    assert extra.tolist() == [[0, 5, 5, 0, 2**64 - 1, 2**64 - 1, 0]]
