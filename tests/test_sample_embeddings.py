"""Embeddings of pictures are made once and found again, whatever happened in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nvlm_deploy.sample_embeddings import CachedEncoder

TILES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


class CountingEncoder:
    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, tiles):
        self.calls += 1
        if self.calls == self.fails_at:
            raise MemoryError
        return tiles.reshape(len(tiles), 4, -1).astype(np.float32) / 3


def test_a_picture_is_encoded_once_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    encode, expected = CountingEncoder(), CountingEncoder()(TILES)
    for _ in range(2):
        np.testing.assert_array_equal(CachedEncoder(encode, tmp_path)(TILES), expected, strict=True)
    assert encode.calls == 1
    CachedEncoder(encode, tmp_path)(TILES[:1])
    CachedEncoder(encode, tmp_path)(TILES.reshape(1, 8, 4, 3)[:, :4])
    assert encode.calls == 2, "the first tile is the same picture, however it was cut out"


@pytest.mark.parametrize("damage", ["zeros", "cut", "empty", "one bit", "no array"])
def test_embeddings_that_are_not_as_they_were_written_are_made_again(tmp_path: Path, damage: str) -> None:
    encode, expected = CountingEncoder(), CountingEncoder()(TILES)
    CachedEncoder(encode, tmp_path)(TILES)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= damage == "one bit"
    damaged = {
        "zeros": bytes(len(content)),
        "cut": content[:middle],
        "empty": b"",
        "no array": b"PK\x05\x06" + bytes(18),
    }
    path.write_bytes(damaged.get(damage, content))
    np.testing.assert_array_equal(CachedEncoder(encode, tmp_path)(TILES), expected, strict=True)
    assert encode.calls == 2
    np.testing.assert_array_equal(CachedEncoder(encode, tmp_path)(TILES), expected, strict=True)
    assert encode.calls == 2


def test_an_encoder_that_fails_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        CachedEncoder(CountingEncoder(fails_at=1), tmp_path)(TILES)
    assert not list(tmp_path.iterdir())
    assert CachedEncoder(CountingEncoder(), tmp_path)(TILES).shape == (2, 4, 12)
