"""What is written is what was meant, whole or not at all."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nvlm_deploy.checkpoint.reader import INDEX_NAME, Checkpoint
from nvlm_deploy.checkpoint.writer import write_safetensors, write_shards
from nvlm_deploy.errors import MachineError


def tensors(count: int = 5) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {f"t{n}": torch.randn(10, 10, generator=random).to(torch.bfloat16) for n in range(count)}


def test_a_file_reads_back_bit_for_bit_in_every_type(tmp_path):
    meant = {
        "bf16": torch.tensor([float("nan"), -0.0, 1.5], dtype=torch.bfloat16),
        "e4m3": torch.tensor([448.0, -0.0]).to(torch.float8_e4m3fn),
        "f32": torch.tensor([[1.0, float("inf")]]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    write_safetensors(tmp_path / "x.safetensors", meant)
    found = load_file(tmp_path / "x.safetensors")
    for name, tensor in meant.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_shards_hold_at_most_what_was_asked_and_every_tensor_once(tmp_path):
    write_shards(tmp_path, tensors().items(), max_shard_bytes=400)
    (tmp_path / "config.json").write_text("{}")
    weight_map = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    assert sorted(set(weight_map.values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors().items())


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    write_shards(tmp_path, tensors(2).items(), max_shard_bytes=10)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 2


def test_a_file_is_readable_by_a_server_under_another_user(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", tensors(1))
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o644


def test_what_reads_back_differently_is_never_left_in_place(tmp_path, monkeypatch):
    class LyingFile:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.file = safe_open(*arguments, **options)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *problem: object) -> None:
            self.file.__exit__(*problem)

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor = self.opened.get_tensor(name)
            tensor.view(torch.uint8)[0, 0] ^= 1
            return tensor

    monkeypatch.setattr("safetensors.safe_open", LyingFile)
    with pytest.raises(MachineError, match=r"t0 read back .* differs"):
        write_safetensors(tmp_path / "x.safetensors", tensors(1))
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_survives_a_failed_write(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "x.safetensors", tensors(1))
    before = (tmp_path / "x.safetensors").read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(MachineError, match="disk is full"):
        write_safetensors(tmp_path / "x.safetensors", tensors(2))
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
