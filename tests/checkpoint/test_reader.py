"""What is wrong with a checkpoint folder is said before a tensor is loaded."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_deploy.checkpoint.reader import INDEX_NAME, Checkpoint
from nvlm_deploy.errors import NvlmError

FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def folder(random_checkpoint, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(random_checkpoint.folder, tmp_path / "checkpoint"))


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX_NAME).read_text())


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_every_tensor_reads_as_safetensors_itself_reads_it(random_checkpoint):
    assert len(random_checkpoint.shards) == 3
    whole = {name: tensor for shard in random_checkpoint.shards for name, tensor in load_file(shard).items()}
    assert sorted(random_checkpoint.names) == sorted(whole)
    for name, tensor in whole.items():
        assert torch.equal(random_checkpoint.tensor(name), tensor)
        assert random_checkpoint.shape(name) == tuple(tensor.shape)


def test_offsets_point_at_the_bytes_of_the_tensor(random_checkpoint):
    info = random_checkpoint.info("mlp1.0.weight")
    with info.shard.open("rb") as file:
        file.seek(info.offset)
        found = torch.frombuffer(bytearray(file.read(info.size_bytes)), dtype=torch.bfloat16)
    assert info.dtype == "BF16"
    assert torch.equal(found, random_checkpoint.tensor("mlp1.0.weight"))


def test_a_prefix_is_stripped(random_checkpoint):
    assert set(random_checkpoint.tensors("mlp1.")) == {"0.weight", "0.bias", "1.weight", "3.weight"}


def test_the_size_is_the_sum_of_the_tensors(random_checkpoint):
    assert random_checkpoint.size_bytes == index_of(random_checkpoint.folder)["metadata"]["total_size"]


def test_a_single_file_checkpoint_needs_no_index(folder, random_checkpoint):
    whole = {name: random_checkpoint.tensor(name) for name in random_checkpoint.names}
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    (folder / INDEX_NAME).unlink()
    save_file(whole, folder / "model.safetensors")
    assert sorted(Checkpoint.open(folder).names) == sorted(whole)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NvlmError, match=r"no checkpoint folder .*nowhere"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_missing_shard_is_named_with_how_many_there_should_be(folder):
    (folder / FIRST).unlink()
    with pytest.raises(NvlmError, match=rf"1 of 3 shards missing in .*: {FIRST}") as refusal:
        Checkpoint.open(folder)
    assert "nvlm inspect" in (refusal.value.hint or "")


def test_many_missing_shards_are_counted_and_only_the_first_listed(folder):
    names = {f"tensor{n}": f"model-{n:05d}-of-00046.safetensors" for n in range(1, 47)}
    write_index(folder, names)
    with pytest.raises(NvlmError, match=r"46 of 46 shards missing .* and 41 more"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_shard_is_named_with_its_size(folder, kept):
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(NvlmError, match=rf"shard {FIRST} .* truncated: [\d,]+ bytes, expected [\d,]+"):
        Checkpoint.open(folder)


def test_a_shard_with_bytes_after_its_tensors_is_refused(folder):
    with (folder / FIRST).open("ab") as file:
        file.write(b"more")
    with pytest.raises(NvlmError, match="longer than its header says"):
        Checkpoint.open(folder)


def test_a_git_lfs_pointer_in_place_of_a_shard_is_recognised(folder):
    (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n")
    with pytest.raises(NvlmError, match=rf"{FIRST} .*Git LFS pointer") as refusal:
        Checkpoint.open(folder)
    assert "git lfs pull" in (refusal.value.hint or "")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "NOT A TYPE", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_damaged_header_is_our_error_whatever_is_in_it(folder, header):
    write_raw(folder / FIRST, header, b"\0" * 8)
    with pytest.raises(NvlmError, match=rf"{FIRST} .*damaged header"):
        Checkpoint.open(folder)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(folder):
    weight_map = index_of(folder)["weight_map"]
    write_index(folder, {**weight_map, "mlp1.9.weight": FIRST})
    with pytest.raises(NvlmError, match=rf"1 tensor\(s\) .* first mlp1\.9\.weight \({FIRST}"):
        Checkpoint.open(folder)


def test_an_index_that_names_the_wrong_shard_for_a_tensor_is_refused(folder):
    weight_map = index_of(folder)["weight_map"]
    name = next(name for name, shard in weight_map.items() if shard != FIRST)
    write_index(folder, {**weight_map, name: FIRST})
    with pytest.raises(NvlmError, match="not in their shard"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/hostname", "sub/model.safetensors", ".."])
def test_an_index_cannot_lead_out_of_the_folder(folder, shard):
    weight_map = index_of(folder)["weight_map"]
    write_index(folder, {**weight_map, "mlp1.0.weight": shard})
    with pytest.raises(NvlmError, match=r"outside the folder|missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("weight_map", [{}, [], None, "model.safetensors"])
def test_an_index_without_a_map_is_refused(folder, weight_map):
    write_index(folder, weight_map)
    with pytest.raises(NvlmError, match="no weight_map"):
        Checkpoint.open(folder)


def test_a_checkpoint_in_pickles_is_refused_and_never_unpickled(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink()
    (folder / "pytorch_model-00001-of-00046.bin").write_bytes(b"pickle")
    with pytest.raises(NvlmError, match=f"no {INDEX_NAME}") as refusal:
        Checkpoint.open(folder)
    assert "never unpickled" in (refusal.value.hint or "")


@pytest.mark.parametrize(
    ("name", "text", "telling"),
    [
        ("config.json", None, "no file config.json"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[1]", "holds a JSON list"),
        (INDEX_NAME, "{", "is not JSON"),
    ],
)
def test_a_missing_or_damaged_json_file_is_named(folder, name, text, telling):
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(NvlmError, match=telling):
        Checkpoint.open(folder)


def test_an_unknown_tensor_is_named(random_checkpoint):
    with pytest.raises(NvlmError, match=r"no tensor 'mlp1\.7\.weight'"):
        random_checkpoint.tensor("mlp1.7.weight")
