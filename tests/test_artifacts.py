"""Artifacts are written whole or not at all, and a changed byte is found."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_deploy import digest
from nvlm_deploy.artifacts import (
    clear_partial,
    digests,
    replace_file,
    replace_folder,
    tool_versions,
    verify,
    write_manifest,
    write_text,
)
from nvlm_deploy.digest import KnownDigests, sha256_of
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.manifest import MANIFEST_NAME, Manifest, read_manifest, sha256_of_json


def manifest_of(folder: Path, **changes: object) -> Manifest:
    facts = {"kind": "test", "key": "k", "inputs": {}, "settings": {"precision": "fp32"}, "tools": {}}
    return Manifest(**{**facts, "outputs": digests(folder), "evidence": "measured", **changes})


@pytest.fixture
def artifact(tmp_path) -> Path:
    folder = tmp_path / "vision"
    with replace_folder(folder) as filling:
        (filling / "weights.bin").write_bytes(bytes(range(256)) * 16)
        (filling / "sub").mkdir()
        (filling / "sub" / "graph.onnx").write_bytes(b"graph")
        write_manifest(filling, manifest_of(filling))
    return folder


def test_a_finished_artifact_verifies_and_tells_what_it_is(artifact):
    found = verify(artifact)
    assert sorted(found.manifest.outputs) == ["sub/graph.onnx", "weights.bin"]
    assert found.manifest.settings == {"precision": "fp32"}
    assert "CC-BY-NC-4.0" in found.manifest.licence
    assert found.manifest.created.endswith("+00:00")


def test_what_python_caches_beside_a_module_is_not_a_change(artifact):
    (artifact / "sub" / "__pycache__").mkdir()
    (artifact / "sub" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"code")
    assert sorted(verify(artifact).manifest.outputs) == ["sub/graph.onnx", "weights.bin"]


@pytest.mark.parametrize("place", [0, 2000, 4095])
def test_one_flipped_bit_is_found_and_named(artifact, place):
    content = bytearray((artifact / "weights.bin").read_bytes())
    content[place] ^= 1
    (artifact / "weights.bin").write_bytes(content)
    with pytest.raises(NvlmError, match=r"weights\.bin changed"):
        verify(artifact)


def test_one_flipped_bit_anywhere_in_a_manifest_is_found(artifact):
    path = artifact / MANIFEST_NAME
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        with pytest.raises(NvlmError, match="damaged"):
            read_manifest(artifact)
    path.write_bytes(content)
    verify(artifact)


def test_a_manifest_that_says_the_same_in_other_words_is_not_the_one_that_was_written(artifact):
    path = artifact / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(NvlmError, match="changed after it was written"):
        verify(artifact)


def rewritten(artifact: Path, edit) -> None:
    """As who changes a manifest with an editor, or makes it anew without our seal."""
    manifest = json.loads((artifact / MANIFEST_NAME).read_text())
    edit(manifest)
    (artifact / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize("drop", [lambda manifest: manifest.pop("seal"), lambda manifest: manifest.update(seal="")])
def test_a_manifest_without_a_seal_counts_for_nothing(artifact, drop):
    rewritten(artifact, lambda manifest: (drop(manifest), manifest.update(evidence="measured", licence="MIT")))
    with pytest.raises(NvlmError, match="its seal is missing") as refusal:
        read_manifest(artifact)
    assert "build it again" in (refusal.value.hint or "")


def test_what_json_cannot_hold_as_it_is_does_not_break_the_seal(artifact):
    write_manifest(artifact, manifest_of(artifact, notes={1: (2, 3), "two": {10: "x", 9: "y"}, "none": float("nan")}))
    assert verify(artifact).manifest.notes["1"] == [2, 3]


def test_a_link_to_a_folder_that_nobody_looked_at_is_found(artifact, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (artifact / "2").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(NvlmError, match="2 not in the manifest"):
        verify(artifact)


def with_empty_folder(artifact: Path) -> None:
    (artifact / "2").mkdir()


def with_pipe(artifact: Path) -> None:
    os.mkfifo(artifact / "pipe")


def with_socket(artifact: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(artifact)  # the whole path may be too long for a socket's name
        server.bind("socket")


def with_link_for_a_file(artifact: Path) -> None:
    path = artifact / "weights.bin"
    path.rename(artifact.parent / "weights.bin")
    path.symlink_to(artifact.parent / "weights.bin")


def with_pipe_for_a_file(artifact: Path) -> None:
    (artifact / "weights.bin").unlink()
    os.mkfifo(artifact / "weights.bin")


def with_folder_for_a_file(artifact: Path) -> None:
    (artifact / "weights.bin").unlink()
    (artifact / "weights.bin").mkdir()


def with_link_for_a_folder(artifact: Path) -> None:
    (artifact / "sub").rename(artifact.parent / "sub")
    (artifact / "sub").symlink_to(artifact.parent / "sub", target_is_directory=True)


def with_link_for_the_manifest(artifact: Path) -> None:
    (artifact / MANIFEST_NAME).rename(artifact.parent / "m.json")
    (artifact / MANIFEST_NAME).symlink_to(artifact.parent / "m.json")


def with_a_model_called_like_a_cache(artifact: Path) -> None:
    (artifact / "__pycache__" / "1").mkdir(parents=True)
    (artifact / "__pycache__" / "config.pbtxt").touch()


def with_a_name_in_no_encoding(artifact: Path) -> None:
    Path(os.fsdecode(bytes(artifact) + b"/\xff")).touch()


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (with_empty_folder, "2/ not in the manifest"),
        (with_pipe, "pipe not in the manifest"),
        (with_socket, "socket not in the manifest"),
        (with_link_for_a_file, "weights.bin changed"),
        (with_pipe_for_a_file, "weights.bin changed"),
        (with_folder_for_a_file, "weights.bin missing"),
        (with_link_for_a_folder, "sub/graph.onnx missing"),
        (with_link_for_the_manifest, "manifest.json not in the manifest"),
        (with_a_model_called_like_a_cache, "__pycache__/1/, __pycache__/config.pbtxt not in the manifest"),
        (with_a_name_in_no_encoding, "\\udcff' not in the manifest"),
    ],
)
def test_whatever_is_not_the_file_that_was_written_is_found(artifact, monkeypatch, tamper, words):
    monkeypatch.chdir(artifact)
    tamper(artifact)
    with pytest.raises(NvlmError) as refusal:
        verify(artifact)
    assert words in refusal.value.message


def test_an_empty_folder_that_was_built_belongs_to_the_artifact(artifact):
    (artifact / "1").mkdir()
    write_manifest(artifact, manifest_of(artifact))
    assert "1/" in verify(artifact).manifest.outputs
    (artifact / "1").rmdir()
    with pytest.raises(NvlmError, match="1/ missing"):
        verify(artifact)


def test_no_manifest_is_written_over_a_pipe(artifact):
    os.mkfifo(artifact / "pipe")
    with pytest.raises(NvlmError, match="pipe is neither a file nor a folder"):
        digests(artifact)


def test_digests_are_those_of_sha256sum(artifact):
    listed = subprocess.run(["sha256sum", *digests(artifact)], cwd=artifact, capture_output=True, text=True, check=True)
    assert dict(reversed(line.split()) for line in listed.stdout.splitlines()) == digests(artifact)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_digest_does_not_depend_on_how_a_file_is_cut_into_pieces(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_for_all_its_links_and_again_when_it_changes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(digest, "sha256_of", lambda path: read.append(path.name) or "d" * 64)
    known = KnownDigests()
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "link").hardlink_to(tmp_path / "one")
    assert known.of([tmp_path / "one", tmp_path / "link"]) == dict.fromkeys(
        [tmp_path / "one", tmp_path / "link"], "d" * 64
    )
    known.of([tmp_path / "one"])
    assert len(read) == 1
    (tmp_path / "one").write_bytes(b"longer")
    known.of([tmp_path / "link"])
    assert len(read) == 2


def test_what_a_writer_hands_over_is_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"1")
    known = KnownDigests()
    known.remember(tmp_path / "file", "handed over")
    monkeypatch.setattr(digest, "sha256_of", None)
    assert known.of([tmp_path / "file"]) == {tmp_path / "file": "handed over"}


def test_a_missing_and_an_added_file_are_named(artifact):
    (artifact / "extra.txt").write_text("?")
    with pytest.raises(NvlmError, match=r"extra\.txt not in the manifest"):
        verify(artifact)
    (artifact / "sub" / "graph.onnx").unlink()
    with pytest.raises(NvlmError, match=r"sub/graph\.onnx missing"):
        verify(artifact)


def test_a_folder_without_a_manifest_is_not_a_finished_artifact(tmp_path):
    with pytest.raises(NvlmError, match=f"has no {MANIFEST_NAME}: not a finished artifact"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON: EOF"),
        ("{", "not JSON: EOF"),
        ("[]", "the whole is []: input should be an object"),
        ("3", "the whole is 3: input should be an object"),
        ('{"kind": "test"}', "key key is missing"),
        ('{"surprise": 1}', "and 5 more"),
        ('{"notes": ' + "[" * 5000 + "]" * 5000 + "}", "not JSON: recursion limit exceeded"),
        ('{"notes": ' + "9" * 5000 + "}", "not JSON: number out of range"),
        (b'"\xff"', "not JSON: "),
    ],
)
def test_a_damaged_manifest_is_refused_in_the_words_of_its_keys(artifact, text, words):
    (artifact / MANIFEST_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(NvlmError, match="damaged") as refusal:
        verify(artifact)
    assert words in refusal.value.message
    assert "Manifest" not in refusal.value.message
    assert "argument" not in refusal.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outputs": [1]}, "outputs is [1]: input should be an object"),
        ({"outputs": {"x": "1"}}, "outputs.x is '1': string should match"),
        ({"calibration": [{}]}, "key calibration.0.folder is missing; key calibration.0.files is missing"),
        ({"calibration": [{"folder": "x", "files": {}, "more": 1}]}, "unknown key calibration.0.more"),
        ({"calibration": "x"}, "calibration is 'x'"),
        ({"kind": None}, "kind is None: input should be a valid string"),
        ({"evidence": "sure"}, "evidence is 'sure'"),
        ({"profile": "cpu"}, "profile is 'cpu'"),
        ({"fingerprints": {"build-vision": 3}}, "fingerprints.build-vision is 3"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"seal": 7}, "seal is 7"),
    ],
)
def test_a_key_of_another_kind_is_named_even_where_no_seal_is(artifact, change, words):
    rewritten(artifact, lambda manifest: manifest.update({"seal": "", **change}))
    with pytest.raises(NvlmError, match="damaged") as refusal:
        read_manifest(artifact)
    assert words in refusal.value.message


def test_an_evidence_level_that_does_not_exist_is_a_mistake_of_ours(tmp_path):
    with pytest.raises(ValueError, match="no evidence level 'sure'"):
        write_manifest(tmp_path, manifest_of(tmp_path, evidence="sure"))


def test_the_key_of_settings_does_not_depend_on_their_order():
    assert (
        sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1}) != sha256_of_json({"a": 1, "b": [3]})
    )


def test_a_tool_that_is_not_installed_is_recorded_as_absent():
    versions = tool_versions(["pytest", "no-such-distribution"])
    assert versions["pytest"] == pytest.__version__
    assert versions["no-such-distribution"] == "absent"


def test_a_failure_while_filling_leaves_the_old_folder_and_no_leftover(artifact):
    before = digests(artifact)
    with pytest.raises(RuntimeError, match="half way"), replace_folder(artifact) as filling:
        (filling / "weights.bin").write_bytes(b"new")
        raise RuntimeError("half way")
    assert digests(artifact) == before
    assert [path.name for path in artifact.parent.iterdir()] == ["vision"]


def test_a_replaced_folder_holds_only_the_new_files(artifact):
    with replace_folder(artifact) as filling:
        (filling / "other.bin").write_bytes(b"new")
    assert list(digests(artifact)) == ["other.bin"]
    assert [path.name for path in artifact.parent.iterdir()] == ["vision"]


def test_a_swap_inside_a_swap_works_and_leaves_nothing_behind(tmp_path):
    with replace_folder(tmp_path / "outer") as outer, replace_folder(outer) as inner:
        (inner / "file").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["outer", "outer/file"]


KILLED = """
import sys, time
from pathlib import Path
from nvlm_deploy.artifacts import replace_folder
with replace_folder(Path(sys.argv[1])) as outer, replace_folder(outer) as inner:
    (inner / "half").write_bytes(b"x" * 100)
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_is_cleared_by_the_next_and_the_old_folder_is_untouched(artifact):
    before = digests(artifact)
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(artifact)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(list(artifact.parent.iterdir())) > 1
    assert digests(artifact) == before
    clear_partial(artifact)
    assert [path.name for path in artifact.parent.iterdir()] == ["vision"]


def test_a_swap_cut_between_its_two_renames_is_put_back(artifact):
    before = digests(artifact)
    artifact.rename(artifact.with_name(f".partial-old-{os.getpid()}-vision"))
    clear_partial(artifact)
    assert digests(artifact) == before


def test_leftovers_of_a_folder_with_a_longer_name_are_none_of_ours(tmp_path):
    others = [tmp_path / name for name in (".partial-7-cpu-bf16", ".partial-old-7-cpu-bf16", ".partial-7-my-cpu")]
    for other in others:
        other.mkdir()
    clear_partial(tmp_path / "cpu")
    assert all(other.is_dir() for other in others)
    assert not (tmp_path / "cpu").exists()


def test_clearing_beside_a_folder_whose_parent_does_not_exist_is_no_error(tmp_path):
    clear_partial(tmp_path / "not" / "there")


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replace_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), replace_file(path) as temporary:
        temporary.write_text("newer")
        raise RuntimeError
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of 64 KiB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_the_machines_fault_and_changes_nothing(small_disk):
    target = small_disk / "artifact"
    with replace_folder(target) as filling:
        (filling / "old.bin").write_bytes(b"old")
    with (
        pytest.raises(MachineError, match=r"disk is full: writing .*artifact") as refusal,
        replace_folder(target) as filling,
    ):
        (filling / "new.bin").write_bytes(bytes(1_000_000))
    assert refusal.value.exit_code == 3
    assert "df -h" in (refusal.value.hint or "")
    assert [path.relative_to(small_disk).as_posix() for path in small_disk.rglob("*")] == [
        "artifact",
        "artifact/old.bin",
    ]


@pytest.mark.needs("build")
def test_a_full_disk_while_writing_safetensors_is_the_machines_fault_too(small_disk):
    import torch

    from nvlm_deploy.checkpoint.writer import write_safetensors

    with pytest.raises(MachineError, match="disk is full"):
        write_safetensors(small_disk / "x.safetensors", {"weight": torch.ones(1_000_000)})
    assert list(small_disk.iterdir()) == []


def test_another_failure_of_the_operating_system_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), replace_folder(tmp_path / "x"):
        raise PermissionError("no")


def test_text_is_written_through_a_temporary_name(tmp_path):
    write_text(tmp_path / "a.json", json.dumps({"ü": 1}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": 1}
