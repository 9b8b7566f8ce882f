"""`nvlm verify`, `nvlm sign` and what `nvlm serve` refuses: one flipped byte, wherever it is, is found and named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_deploy.artifacts import SIGNATURE_NAME
from nvlm_deploy.cli import main
from nvlm_deploy.manifest import MANIFEST_NAME
from nvlm_deploy.profile import load_profile

MACHINE = Path(__file__).parents[1] / "machine"
if str(MACHINE) not in sys.path:
    sys.path.insert(0, str(MACHINE))

from built import Workspace, flip  # noqa: E402


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_spec, tokenizer_file) -> Path:
    folder = tmp_path_factory.mktemp("built")
    Workspace(folder / "work", load_profile("cpu"), tiny_spec, tokenizer_file).build()
    return folder


@pytest.fixture
def workspace(built: Path, tmp_path: Path, tiny_spec, tokenizer_file) -> Workspace:
    """A workspace of one's own; its manifests name the first one's calibration list, which nobody changes."""
    shutil.copytree(built / "work", tmp_path / "work")
    return Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by openssl, as the help says."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("owner", "stranger"):
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", folder / f"{name}.pem"], check=True)
        public = ["openssl", "pkey", "-in", folder / f"{name}.pem", "-pubout", "-out", folder / f"{name}-public.pem"]
        subprocess.run(public, check=True)
    return folder


def exit_code_of(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main.run([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def test_a_whole_workspace_a_repository_and_one_artifact_verify(workspace, capsys) -> None:
    for folder, count in ((workspace.root, 3), (workspace.repository, 1), (workspace.engines / "decoder", 1)):
        assert exit_code_of("verify", folder) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line[:4] for line in lines].count("ok  ") == count
        assert lines[-1].endswith("all as built")
    assert "(quantize-llm, cpu, measured; 2 files)" in " ".join(lines)


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")


def words(text: str) -> str:
    """Whatever the width of the terminal."""
    return " ".join(text.split())


def test_one_flipped_bit_in_any_file_is_found_by_verify(workspace, capsys) -> None:
    for path in files_of(workspace.root):
        place = path.stat().st_size - 1 if path.suffix == ".json" else path.stat().st_size // 2
        for bits in (1, 128):
            flip(path, place, bits)
            assert exit_code_of("verify", workspace.root) == 1, path
            assert path.name in capsys.readouterr().out
            flip(path, place, bits)
    assert exit_code_of("verify", workspace.root) == 0


def test_one_flipped_bit_in_any_file_of_a_repository_is_found_by_serve(workspace, capsys) -> None:
    assert exit_code_of("serve", workspace.repository, "--dry-run") == 0
    for path in files_of(workspace.repository):
        for bits in (2, 128):
            flip(path, path.stat().st_size // 2, bits)
            assert exit_code_of("serve", workspace.repository, "--dry-run") == 1, path
            flip(path, path.stat().st_size // 2, bits)
    said = words(capsys.readouterr().err)
    assert "is not what was built:" in said
    assert "vision_encoder/1/vision.onnx changed" in said
    assert "hint: " in said


@pytest.mark.slow
def test_any_value_of_a_manifest_that_was_changed_is_found_by_verify_and_by_serve(workspace, capsys) -> None:
    path = workspace.repository / MANIFEST_NAME
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        letter = next((at for at in range(len(line) - 1, 0, -1) if line[at].isalnum()), None)
        if letter is None:
            continue
        other = line[:letter] + ("a" if line[letter] != "a" else "b") + line[letter + 1 :]
        path.write_text("".join([*lines[:number], other, *lines[number + 1 :]]))
        assert exit_code_of("verify", workspace.repository) == 1, line
        assert exit_code_of("serve", workspace.repository, "--dry-run") == 1, line
    shown = capsys.readouterr()
    assert "damaged" in shown.out
    assert "this is a bug" not in shown.err


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": [{}]},
        {"outputs": [1]},
        {"outputs": None},
        {"fingerprints": {"build-vision": {}}},
        {"fingerprints": []},
        {"calibration": [{"folder": 1, "files": {}}]},
        {"profile": 3},
        {"seal": None},
        {"licence": "MIT", "evidence": "measured"},
    ],
    ids=str,
)
@pytest.mark.parametrize("seal", ["", None])
def test_a_malformed_manifest_without_a_seal_is_found_and_is_no_bug(workspace, capsys, change, seal) -> None:
    path = workspace.repository / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["seal"] = seal
    path.write_text(json.dumps({**manifest, **change}))
    assert exit_code_of("verify", workspace.repository) == 1
    assert exit_code_of("serve", workspace.repository, "--dry-run") == 1
    shown = capsys.readouterr()
    assert "damaged" in shown.out
    assert "bug" not in shown.err


def resealed(repository: Path, **changes: object) -> None:
    """As somebody would who has this tool and no key."""
    from dataclasses import replace

    from nvlm_deploy.artifacts import write_manifest
    from nvlm_deploy.manifest import read_manifest

    write_manifest(repository, replace(read_manifest(repository), **changes))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"fingerprints": {"build-vision": {"runtime": "bogus"}}}, 1),
        ({"calibration": [{"folder": "/a\0b", "files": {"../x": "0" * 64}}]}, 0),  # not on this machine
        ({"calibration": [{"folder": "/" + "x" * 9000, "files": {"x": "0" * 64}}]}, 1),
        ({"outputs": {"/dev/zero": "0" * 64, "../x": "0" * 64, "\n": "0" * 64}}, 1),
    ],
)
def test_a_manifest_with_a_right_seal_and_wrong_content_raises_nothing(workspace, capsys, changes, code) -> None:
    resealed(workspace.repository, **changes)
    assert exit_code_of("verify", workspace.repository) == code
    assert exit_code_of("serve", workspace.repository, "--dry-run") == code
    assert "bug" not in capsys.readouterr().err


def test_whatever_a_manifest_with_a_right_seal_says_is_an_answer_and_no_bug(workspace) -> None:
    """Any value of any kind in the place of any other, sealed anew by somebody who knows how."""
    from nvlm_deploy.errors import NvlmError
    from nvlm_deploy.manifest import sha256_of_json
    from nvlm_deploy.triton.servable import require_servable
    from nvlm_deploy.verification import verified

    path = workspace.repository / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    values = (None, True, -1, 10**30, 1.5, float("nan"), "", "\0", "../..", [], [1], {}, {"a": 1}, [{}])
    for key in manifest.keys() - {"seal"}:
        for value in values:
            changed = {**manifest, key: value, "seal": ""}
            path.write_text(json.dumps({**changed, "seal": sha256_of_json(changed)}, indent=2, sort_keys=True) + "\n")
            found = verified(workspace.repository)
            json.dumps(found.as_json())
            with contextlib.suppress(NvlmError):
                require_servable(workspace.repository)
                assert found.passed


def test_what_was_added_to_a_repository_is_found_by_verify_and_by_serve(workspace, capsys) -> None:
    added = workspace.repository / "vision_encoder" / "2"
    added.mkdir()
    assert exit_code_of("verify", workspace.repository) == 1
    assert "vision_encoder/2/ not in the manifest" in capsys.readouterr().out
    assert exit_code_of("serve", workspace.repository, "--dry-run") == 1
    added.rmdir()
    engine = workspace.repository / "vision_encoder" / "1" / "vision.onnx"
    engine.rename(workspace.root / "vision.onnx")
    engine.symlink_to(workspace.root / "vision.onnx")
    assert exit_code_of("serve", workspace.repository, "--dry-run") == 1
    assert "vision_encoder/1/vision.onnx changed" in words(capsys.readouterr().err)


def test_an_artifact_on_another_disk_behind_a_link_is_looked_at(workspace, capsys) -> None:
    decoder = workspace.engines / "decoder"
    decoder.rename(workspace.root / "elsewhere")
    decoder.symlink_to(workspace.root / "elsewhere", target_is_directory=True)
    (workspace.root / "triton_repo").rename(workspace.root / "repositories")
    (workspace.root / "engines" / "repositories").symlink_to(workspace.root / "repositories", target_is_directory=True)
    for name, target in (("again", workspace.root), ("large", Path("/sys")), ("nothing", Path("/none/such"))):
        (workspace.root / "engines" / name).symlink_to(target, target_is_directory=True)
    assert exit_code_of("verify", workspace.root) == 0
    assert "3 artifacts" in capsys.readouterr().out
    flip(decoder / "rank0.safetensors")
    assert exit_code_of("verify", workspace.root) == 1


def test_serve_of_a_folder_that_is_no_repository_is_wrong_input(workspace, tmp_path, capsys) -> None:
    for folder in (tmp_path, workspace.engines / "decoder"):
        assert exit_code_of("serve", folder, "--dry-run") == 2
        assert "not a repository of ours" in words(capsys.readouterr().err)
    assert exit_code_of("serve", tmp_path / "none", "--dry-run") == 2
    assert "no folder" in words(capsys.readouterr().err)


@pytest.mark.parametrize("columns", [40, 80])
def test_lines_are_as_wide_as_the_terminal(workspace, capsys, monkeypatch, columns) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    flip(workspace.repository / "nvlm" / "config.pbtxt")
    (workspace.engines / "decoder" / "rank0.safetensors").unlink()
    assert exit_code_of("verify", workspace.root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line) > columns and " " in line[4:].strip()]


@pytest.mark.parametrize("name", ["samples.jsonl", "000.jpg"])
def test_a_flipped_bit_in_the_calibration_list_is_found_by_both(
    tmp_path, tiny_spec, tokenizer_file, capsys, name
) -> None:
    workspace = Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)
    workspace.build()
    flip(workspace.calibration / name, 3)
    for verb in (("verify", workspace.root), ("verify", workspace.repository)):
        assert exit_code_of(*verb) == 1
        assert f"calibration list {workspace.calibration}: {name} changed" in words(capsys.readouterr().out)
        assert exit_code_of(*verb, "--ignore-calibration") == 0
    assert exit_code_of("serve", workspace.repository, "--dry-run") == 1
    assert f"{name} changed" in words(capsys.readouterr().err)
    assert exit_code_of("serve", workspace.repository, "--dry-run", "--ignore-calibration") == 0


def test_a_repository_that_was_carried_to_another_machine_says_what_it_could_not_look_at(
    tmp_path, tiny_spec, tokenizer_file, capsys, caplog
) -> None:
    workspace = Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)
    workspace.build()
    shutil.rmtree(workspace.calibration)
    assert exit_code_of("verify", workspace.repository) == 0
    shown = words(capsys.readouterr().out)
    assert f"not looked at: calibration list {workspace.calibration} is not on this machine" in shown
    assert shown.endswith("all as built; 1 not looked at, see above")
    assert exit_code_of("verify", workspace.root, "--json") == 0
    assert any(one["not_looked_at"] for one in json.loads(capsys.readouterr().out)["artifacts"])
    with caplog.at_level("INFO"):
        assert exit_code_of("serve", workspace.repository, "--dry-run") == 0
    assert "not looked at: calibration list" in caplog.text


def test_a_folder_whose_name_is_no_text_is_built_and_verified(tmp_path, tiny_spec, tokenizer_file, capsys) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    folder.mkdir()
    workspace = Workspace(folder / "work", load_profile("cpu"), tiny_spec, tokenizer_file)
    workspace.build()
    assert exit_code_of("verify", workspace.root) == 0
    assert "all as built" in capsys.readouterr().out


def test_python_s_caches_are_said_to_be_nobody_s(workspace, capsys) -> None:
    cache = workspace.repository / "preprocessing" / "1" / "__pycache__"
    cache.mkdir()
    (cache / "model.cpython-311.pyc").write_bytes(b"code of somebody else")
    assert exit_code_of("verify", workspace.repository) == 0
    assert "not looked at: Python's caches" in capsys.readouterr().out
    (cache / "model.py").write_bytes(b"code of somebody else")
    assert exit_code_of("verify", workspace.repository) == 1


def test_pictures_beside_the_calibration_list_are_one_note_and_no_fault(
    tmp_path, tiny_spec, tokenizer_file, capsys
) -> None:
    workspace = Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)
    workspace.build()
    for number in (1, 2, 3):
        (workspace.calibration / f"00{number}.jpg").write_bytes(b"picture")
    assert exit_code_of("verify", workspace.repository) == 0
    shown = words(capsys.readouterr().out)
    said = (
        f"not looked at: 3 of the files in {workspace.calibration}: the list does not use 001.jpg, 002.jpg and 1 more"
    )
    assert shown.count(said) == 1


def test_missing_and_added_files_and_a_lost_manifest_are_named_with_their_mend(workspace, capsys) -> None:
    (workspace.repository / "nvlm" / "config.pbtxt").unlink()
    (workspace.engines / "decoder" / "rank1.safetensors").write_bytes(b"?")
    (workspace.engines / "vision-engine" / MANIFEST_NAME).unlink()
    assert exit_code_of("verify", workspace.root, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    problems = {Path(one["folder"]).name: [p["what"] for p in one["problems"]] for one in document["artifacts"]}
    assert problems["cpu"] == ["nvlm/config.pbtxt missing"]
    assert problems["decoder"] == ["rank1.safetensors not in the manifest"]
    assert "has no manifest.json" in problems["vision-engine"][0]
    assert all(problem["mend"] for one in document["artifacts"] for problem in one["problems"])
    assert document["passed"] is False


def test_as_json_it_is_one_document_with_what_the_manifests_say(workspace, capsys) -> None:
    assert exit_code_of("verify", workspace.root, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert document["bytes"] == sum(one["bytes"] for one in document["artifacts"]) > 0
    for one in document["artifacts"]:
        assert (one["profile"], one["evidence"]) == ("cpu", "measured")
        assert "CC-BY-NC-4.0" in one["licence"]


@pytest.mark.parametrize("verb", ["verify", "sign"])
def test_a_folder_without_artifacts_is_wrong_input(tmp_path, keys, capsys, verb) -> None:
    key = ["--key", keys / "owner.pem"] if verb == "sign" else []
    assert exit_code_of(verb, tmp_path, *key) == 2
    assert "holds no artifact" in words(capsys.readouterr().err)
    assert exit_code_of(verb, tmp_path / "none", *key) == 2


def test_what_the_owner_signed_passes_with_the_owners_key_and_with_no_other(workspace, keys, capsys) -> None:
    demand = ("verify", workspace.root, "--public-key", keys / "owner-public.pem")
    assert exit_code_of(*demand) == 1
    assert "is not signed" in words(capsys.readouterr().out)
    assert exit_code_of("sign", workspace.root, "--key", keys / "owner.pem", "--dry-run") == 0
    assert capsys.readouterr().out.count(SIGNATURE_NAME) == 3
    assert not list(workspace.root.rglob(SIGNATURE_NAME))
    assert exit_code_of("sign", workspace.root, "--key", keys / "owner.pem") == 0
    assert exit_code_of(*demand) == 0
    assert exit_code_of("verify", workspace.root) == 0
    capsys.readouterr()
    assert exit_code_of("verify", workspace.root, "--public-key", keys / "stranger-public.pem") == 1
    assert "is not the signature of this manifest" in words(capsys.readouterr().out)


def test_a_manifest_made_anew_for_changed_weights_passes_unsigned_and_fails_signed(workspace, keys) -> None:
    """The attack that digests alone cannot find."""
    from nvlm_deploy.artifacts import digests

    decoder, key = workspace.engines / "decoder", keys / "owner-public.pem"
    assert exit_code_of("sign", workspace.root, "--key", keys / "owner.pem") == 0
    flip(decoder / "rank0.safetensors")
    resealed(decoder, outputs=digests(decoder))
    assert exit_code_of("verify", decoder) == 0
    assert exit_code_of("verify", decoder, "--public-key", key) == 1


def test_openssl_agrees_with_the_signature(workspace, keys, tmp_path) -> None:
    import base64

    assert exit_code_of("sign", workspace.repository, "--key", keys / "owner.pem") == 0
    raw = tmp_path / "raw.sig"
    raw.write_bytes(base64.b64decode((workspace.repository / SIGNATURE_NAME).read_bytes()))
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", keys / "owner-public.pem"]
    command += ["-in", workspace.repository / MANIFEST_NAME, "-sigfile", raw]
    assert "Success" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("place", [0, 40, 85, 87, 88])
def test_a_flipped_bit_in_a_signature_is_found(workspace, keys, place) -> None:
    assert exit_code_of("sign", workspace.repository, "--key", keys / "owner.pem") == 0
    flip(workspace.repository / SIGNATURE_NAME, place)
    assert exit_code_of("verify", workspace.repository, "--public-key", keys / "owner-public.pem") == 1


def test_serve_can_demand_a_signature(workspace, keys) -> None:
    command = ("serve", workspace.repository, "--dry-run", "--public-key", keys / "owner-public.pem")
    assert exit_code_of(*command) == 1
    assert exit_code_of("sign", workspace.repository, "--key", keys / "owner.pem") == 0
    assert exit_code_of(*command) == 0


def test_a_damaged_artifact_is_not_signed(workspace, keys, capsys) -> None:
    flip(workspace.repository / "nvlm" / "config.pbtxt")
    assert exit_code_of("sign", workspace.repository, "--key", keys / "owner.pem") == 2
    assert "config.pbtxt changed" in capsys.readouterr().err
    assert exit_code_of("sign", workspace.root, "--key", keys / "owner.pem") == 2
    assert not list(workspace.root.rglob(SIGNATURE_NAME))


def test_what_is_no_ed25519_key_is_refused_with_the_command_that_makes_one(workspace, keys, tmp_path, capsys) -> None:
    rsa = tmp_path / "rsa.pem"
    command = ["openssl", "genpkey", "-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:1024", "-out", rsa]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "text.pem").write_text("key")
    for key in (rsa, tmp_path / "text.pem", tmp_path / "none.pem", keys / "owner-public.pem"):
        assert exit_code_of("sign", workspace.repository, "--key", key) == 2
        assert "openssl genpkey -algorithm ed25519" in capsys.readouterr().err
    assert exit_code_of("verify", workspace.repository, "--public-key", keys / "owner.pem") == 2


def test_a_hugging_face_folder_without_its_manifest_is_noticed_in_a_workspace(workspace, capsys) -> None:
    folder = workspace.engines / "hf"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert exit_code_of("verify", workspace.root) == 1
    assert "has no manifest.json" in " ".join(capsys.readouterr().out.split())


def test_a_file_that_may_not_be_read_is_said_to_be_that(workspace, capsys, monkeypatch) -> None:
    def refuse(_self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "model.py")

    monkeypatch.setattr("nvlm_deploy.verification.changes", refuse)
    assert exit_code_of("verify", workspace.repository) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "model.py cannot be read: Permission denied" in shown
    assert "chmod -R a+rX" in shown
