"""`nvlm verify`, `nvlm sign` and what `nvlm serve` refuses: one flipped byte, wherever it is, is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from nvlm_deploy.artifacts import MANIFEST_NAME, SIGNATURE_NAME
from nvlm_deploy.cli import main, serve, verify
from nvlm_deploy.profile import load_profile

MACHINE = Path(__file__).parents[1] / "machine"
if str(MACHINE) not in sys.path:
    sys.path.insert(0, str(MACHINE))

from built import Workspace, flip  # noqa: E402


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs on an app of their own, under the entry point's handling of errors."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    for verb in (verify, serve):
        verb.register(app)
    monkeypatch.setattr(main, "app", app)


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
        assert len(lines) == count + 1
        assert lines[-1].endswith("all as built")
    assert "(quantize-llm, cpu, measured; 2 files)" in lines[0]


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")


def test_one_flipped_bit_in_any_file_is_found_by_verify(workspace, capsys) -> None:
    for path in files_of(workspace.root):
        place = path.stat().st_size - 1 if path.suffix == ".json" else path.stat().st_size // 2
        flip(path, place)
        assert exit_code_of("verify", workspace.root) == 1, path
        assert path.name in capsys.readouterr().out
        flip(path, place)
    assert exit_code_of("verify", workspace.root) == 0


def test_one_flipped_bit_in_any_file_of_a_repository_is_found_by_serve(workspace, capsys) -> None:
    assert exit_code_of("serve", workspace.repository, "--dry-run") == 0
    for path in files_of(workspace.repository):
        flip(path, path.stat().st_size // 2, 2)
        assert exit_code_of("serve", workspace.repository, "--dry-run") == 2, path
        flip(path, path.stat().st_size // 2, 2)
    said = capsys.readouterr().err
    assert "is not what was built:" in said
    assert "vision_encoder/1/vision.onnx changed" in said
    assert "hint: " in said


@pytest.mark.parametrize("name", ["samples.jsonl", "000.jpg"])
def test_a_flipped_bit_in_the_calibration_list_is_found_by_both(
    tmp_path, tiny_spec, tokenizer_file, capsys, name
) -> None:
    workspace = Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)
    workspace.build()
    flip(workspace.calibration / name, 3)
    for verb in (("verify", workspace.root), ("verify", workspace.repository)):
        assert exit_code_of(*verb) == 1
        assert f"calibration list {workspace.calibration}: {name} changed" in capsys.readouterr().out
        assert exit_code_of(*verb, "--ignore-calibration") == 0
    assert exit_code_of("serve", workspace.repository, "--dry-run") == 2
    assert f"{name} changed" in capsys.readouterr().err
    assert exit_code_of("serve", workspace.repository, "--dry-run", "--ignore-calibration") == 0


def test_a_repository_that_was_carried_to_another_machine_says_what_it_could_not_look_at(
    tmp_path, tiny_spec, tokenizer_file, capsys
) -> None:
    workspace = Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)
    workspace.build()
    shutil.rmtree(workspace.calibration)
    assert exit_code_of("verify", workspace.repository) == 0
    assert f"not looked at: calibration list {workspace.calibration}" in capsys.readouterr().out
    assert exit_code_of("serve", workspace.repository, "--dry-run") == 0


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
    assert "holds no artifact" in capsys.readouterr().err
    assert exit_code_of(verb, tmp_path / "none", *key) == 2


def test_what_the_owner_signed_passes_with_the_owners_key_and_with_no_other(workspace, keys, capsys) -> None:
    demand = ("verify", workspace.root, "--public-key", keys / "owner-public.pem")
    assert exit_code_of(*demand) == 1
    assert "is not signed" in capsys.readouterr().out
    assert exit_code_of("sign", workspace.root, "--key", keys / "owner.pem") == 0
    assert exit_code_of(*demand) == 0
    assert exit_code_of("verify", workspace.root) == 0
    capsys.readouterr()
    assert exit_code_of("verify", workspace.root, "--public-key", keys / "stranger-public.pem") == 1
    assert "is not the signature of this manifest" in capsys.readouterr().out


def test_a_manifest_made_anew_for_changed_weights_passes_unsigned_and_fails_signed(workspace, keys) -> None:
    """The attack that digests alone cannot find."""
    from nvlm_deploy.artifacts import digests, read_manifest, write_manifest

    decoder, key = workspace.engines / "decoder", keys / "owner-public.pem"
    assert exit_code_of("sign", workspace.root, "--key", keys / "owner.pem") == 0
    flip(decoder / "rank0.safetensors")
    write_manifest(decoder, replace_outputs(read_manifest(decoder), digests(decoder)))
    assert exit_code_of("verify", decoder) == 0
    assert exit_code_of("verify", decoder, "--public-key", key) == 1


def replace_outputs(manifest, outputs):
    from dataclasses import replace

    return replace(manifest, outputs=outputs)


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
    assert exit_code_of(*command) == 2
    assert exit_code_of("sign", workspace.repository, "--key", keys / "owner.pem") == 0
    assert exit_code_of(*command) == 0


def test_a_damaged_artifact_is_not_signed(workspace, keys, capsys) -> None:
    flip(workspace.repository / "nvlm" / "config.pbtxt")
    assert exit_code_of("sign", workspace.repository, "--key", keys / "owner.pem") == 2
    assert "config.pbtxt changed" in capsys.readouterr().err
    assert not (workspace.repository / SIGNATURE_NAME).exists()


def test_what_is_no_ed25519_key_is_refused_with_the_command_that_makes_one(workspace, keys, tmp_path, capsys) -> None:
    rsa = tmp_path / "rsa.pem"
    command = ["openssl", "genpkey", "-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:1024", "-out", rsa]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "text.pem").write_text("key")
    for key in (rsa, tmp_path / "text.pem", tmp_path / "none.pem", keys / "owner-public.pem"):
        assert exit_code_of("sign", workspace.repository, "--key", key) == 2
        assert "openssl genpkey -algorithm ed25519" in capsys.readouterr().err
    assert exit_code_of("verify", workspace.repository, "--public-key", keys / "owner.pem") == 2
