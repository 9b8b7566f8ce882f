"""Weights in the external-data file: page-aligned, read back, and kept over a kill."""

from __future__ import annotations

import json
import os

import pytest
import torch

from nvlm_deploy import digest
from nvlm_deploy.artifacts import JOURNAL_NAME
from nvlm_deploy.digest import sha256_of
from nvlm_deploy.errors import MachineError
from nvlm_deploy.vision.external_data import PAGE_BYTES, Weight, slots_of, stream_weights, weight_of_tensor

TENSORS = {"a": torch.arange(3.0), "empty": torch.zeros(0), "b": torch.randn(50, 40), "scalar": torch.tensor(2.5)}


def weights(tensors=TENSORS) -> list[Weight]:
    return [weight_of_tensor(name, tensor) for name, tensor in tensors.items()]


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def killing(tensors, last: str) -> list[Weight]:
    """Weights whose reading ends the process at one of them, in the middle of it."""

    def chunks():
        yield tensors[last][:1]
        raise Killed

    made = {weight.name: weight for weight in weights(tensors)}
    return [*(made[name] for name in tensors if name != last), Weight(last, torch.float32, tensors[last].shape, chunks)]


def content_of(path, slot) -> bytes:
    return path.read_bytes()[slot.offset : slot.offset + slot.size_bytes]


def bytes_of(tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_tensors_start_on_pages_and_do_not_overlap():
    slots = slots_of(weights())
    assert all(slot.offset % PAGE_BYTES == 0 for slot in slots.values())
    assert (slots["a"].size_bytes, slots["b"].offset, slots["scalar"].offset) == (12, 4096, 4096 + 8192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_file_holds_every_tensors_bytes_at_its_place(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    slots = stream_weights(tmp_path / "data", weights(tensors), identity="x")
    assert all(content_of(tmp_path / "data", slots[name]) == bytes_of(tensor) for name, tensor in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL_NAME, "data"], "the journal stays for a kill"


def test_chunks_are_written_one_behind_the_other(tmp_path):
    rows = TENSORS["b"]
    weight = Weight("b", torch.float32, (50, 40), lambda: iter(rows.split(7)))
    slots = stream_weights(tmp_path / "data", [weight], identity="x")
    assert content_of(tmp_path / "data", slots["b"]) == bytes_of(rows)


@pytest.mark.parametrize(
    "chunks", [[torch.zeros(2)], [torch.zeros(4)], [torch.zeros(3, dtype=torch.float64)], [torch.zeros(2)] * 2]
)
def test_chunks_that_do_not_fill_their_place_are_a_mistake_of_ours(tmp_path, chunks):
    with pytest.raises(ValueError, match="a: "):
        stream_weights(tmp_path / "data", [Weight("a", torch.float32, (3,), lambda: iter(chunks))], identity="x")


def test_a_file_that_reads_back_differently_is_the_machines_fault(tmp_path, monkeypatch):
    def flip_a_bit(descriptor: int) -> None:
        os.pwrite(descriptor, b"\x01", 4096 + 17)

    monkeypatch.setattr("os.fsync", flip_a_bit)
    with pytest.raises(MachineError, match=r"b read back from .* differs"):
        stream_weights(tmp_path / "data", weights(), identity="x")


def test_a_killed_run_is_gone_on_with_and_its_finished_weights_are_not_read_again(tmp_path):
    with pytest.raises(Killed):
        stream_weights(tmp_path / "data", killing(TENSORS, "b"), identity="x")

    def never():
        raise AssertionError("read again")

    resumed = [
        weight if weight.name == "b" else Weight(weight.name, weight.dtype, weight.shape, never)
        for weight in killing(TENSORS, "b")
    ]
    resumed[-1] = weight_of_tensor("b", TENSORS["b"])
    slots = stream_weights(tmp_path / "data", resumed, identity="x")
    assert all(content_of(tmp_path / "data", slots[name]) == bytes_of(tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("damage", ["bytes", "journal", "cut journal", "identity"])
def test_what_a_killed_run_left_is_trusted_only_as_far_as_it_is_right(tmp_path, damage):
    path, journal = tmp_path / "data", tmp_path / JOURNAL_NAME
    with pytest.raises(Killed):
        stream_weights(path, killing(TENSORS, "b"), identity="x")
    if damage == "bytes":
        with path.open("r+b") as file:
            file.write(b"\xff")
    elif damage == "journal":
        journal.write_text(json.dumps(["identity", "x"]) + "\n" + json.dumps(["data", "a", 7]) + "\n")
    elif damage == "cut journal":
        journal.write_text(journal.read_text()[:-3])
    order = [*(name for name in TENSORS if name != "b"), "b"]
    slots = stream_weights(
        path, weights({name: TENSORS[name] for name in order}), identity="y" if damage == "identity" else "x"
    )
    assert all(content_of(path, slots[name]) == bytes_of(tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("killed", [False, True], ids=["at once", "after a kill"])
def test_the_pass_that_reads_back_gives_the_digest_of_the_whole_file(tmp_path, monkeypatch, killed):
    path = tmp_path / "data"
    if killed:
        with pytest.raises(Killed):
            stream_weights(path, killing(TENSORS, "b"), identity="x")
    stream_weights(path, weights(), identity="x")
    expected = sha256_of(path)
    monkeypatch.setattr(digest, "sha256_of", None)
    assert digest.KNOWN_DIGESTS.of([path]) == {path: expected}


def test_after_a_kill_behind_the_last_byte_nothing_is_written_again(tmp_path, monkeypatch):
    stream_weights(tmp_path / "data", weights(), identity="x")
    monkeypatch.setattr("nvlm_deploy.vision.external_data._write", None)
    stream_weights(tmp_path / "data", weights(), identity="x")


def test_progress_counts_bytes_written_and_read_back_up_to_the_whole(tmp_path):
    heard = []
    stream_weights(
        tmp_path / "data", weights(), identity="x", on_progress=lambda _, done, total: heard.append((done, total))
    )
    total = 2 * sum(tensor.nbytes for tensor in TENSORS.values())
    assert heard[-1] == (total, total)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
