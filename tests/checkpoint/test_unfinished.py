"""What a killed run left is trusted only where it is as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvlm_deploy.checkpoint.unfinished import (
    DamagedStatesError,
    checksum_of,
    read_sealed_json,
    read_states,
    write_sealed_json,
)
from nvlm_deploy.checkpoint.writer import write_safetensors

DOCUMENT = {"layers": 3, "amax": {"keys": 0.1}, "checksums": {10: 7, 9: 8}}


def test_sealed_json_comes_back_with_its_keys_as_text(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "progress.json", DOCUMENT)
    assert read_sealed_json(tmp_path / "progress.json") == DOCUMENT | {"checksums": {"10": 7, "9": 8}}


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"layers": 3}', "\0" * 40, "\udcff"])
def test_what_was_not_written_here_counts_as_nothing(tmp_path: Path, content: str) -> None:
    assert read_sealed_json(tmp_path / "progress.json") is None
    (tmp_path / "progress.json").write_text(content, errors="surrogateescape")
    assert read_sealed_json(tmp_path / "progress.json") is None


def test_no_byte_of_sealed_json_can_change_its_meaning(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    write_sealed_json(path, DOCUMENT)
    whole, expected = path.read_bytes(), read_sealed_json(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_sealed_json(path) in (None, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_come_back_bit_for_bit_or_not_at_all(tmp_path: Path, dtype: torch.dtype) -> None:
    path, states = tmp_path / "run.safetensors", torch.randn(5, 8).to(dtype)
    write_safetensors(path, {"states": states})
    assert torch.equal(read_states(path, "states", checksum_of(states)), states)
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", bytes(len(whole)), whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedStatesError, match=r"run\.safetensors is not what was written there"):
            read_states(path, "states", checksum_of(states))
    path.unlink()
    with pytest.raises(DamagedStatesError, match=r"run\.safetensors is not what was written there"):
        read_states(path, "states", checksum_of(states))
