"""Whatever is wrong with a path, the error names it and its cause, and a hint is about that cause."""

from __future__ import annotations

import errno
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from nvlm_deploy.cli.main import app, run
from nvlm_deploy.cli.os_errors import machine_error
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.signature import private_key, public_key

pytestmark = [pytest.mark.slow, pytest.mark.needs("build")]

# the folders that each verb reads: its first argument, or an option
FOLDERS = [
    *([verb, "{}"] for verb in ("inspect", "verify", "serve", "build", "export-vision", "build-vision")),
    *([verb, "{}"] for verb in ("calibrate-llm", "quantize-llm", "export-hf", "build-llm", "assemble")),
    ["plan", "{}", "-p", "cpu"],
    ["profiles", "{}"],
    ["sign", "{}", "--key", "{key}"],
    ["doctor", "--repository", "{}"],
    ["doctor", "-p", "cpu", "--checkpoint", "{}"],
    ["doctor", "--container", "--checkpoint", "{}"],
    ["build", "{model}", "--calibration", "{}"],
    ["validate", "numerics", "{}"],
    ["validate", "accuracy", "{}", "--samples", "{samples}"],
    ["validate", "accuracy", "{model}", "--samples", "{}"],
]
FILES = [
    ["verify", "{repository}", "--public-key", "{}"],
    ["serve", "{repository}", "--dry-run", "--public-key", "{}"],
    ["sign", "{repository}", "--key", "{}"],
    ["plan", "--spec", "nvlm-d-72b", "-p", "{}"],
]


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for kind, options in {
        "ed25519": ["-algorithm", "ed25519"],
        "rsa": ["-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:2048"],
        "ec": ["-algorithm", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"],
        "ed448": ["-algorithm", "ed448"],
    }.items():
        openssl("genpkey", *options, "-out", f"{folder}/{kind}.pem")
        openssl("pkey", "-in", f"{folder}/{kind}.pem", "-pubout", "-out", f"{folder}/{kind}-public.pem")
    openssl("pkey", "-in", f"{folder}/ed25519.pem", "-aes256", "-passout", "pass:x", "-out", f"{folder}/locked.pem")
    (folder / "text.pem").write_text("no key")
    return folder


@pytest.fixture
def error_of(
    tmp_path: Path, tiny_folder: Path, built_repository: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> object:
    """The error document of a command; `{}` in it is the given path."""
    known = {"key": keys / "ed25519.pem", "model": tiny_folder, "repository": built_repository}
    known["samples"] = tiny_folder.parent / "heldout"

    def error(command: list[str], path: Path) -> dict[str, object]:
        words = [word.format(path, **known) for word in command]
        workspace = ["--workspace", str(tmp_path / "work")] if command[0] in ("build", "validate") else []
        with pytest.raises(SystemExit) as ended:
            run([*words, *workspace, "--json"])
        assert ended.value.code == 2
        found: dict[str, object] = json.loads(capsys.readouterr().out)["error"]
        return found

    return error


def shown(command: list[str]) -> str:
    return " ".join(command)


@pytest.mark.parametrize("command", FOLDERS, ids=shown)
def test_a_file_in_place_of_a_folder_is_called_one(command, error_of, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    assert f"{tmp_path / 'a.md'} is a file, not a folder" in error_of(command, tmp_path / "a.md")["message"]


@pytest.mark.parametrize("command", FOLDERS, ids=shown)
def test_a_folder_that_is_not_there_is_missing_and_not_unfinished(command, error_of, tmp_path: Path) -> None:
    error = error_of(command, tmp_path / "none")
    assert error["message"].startswith("no ")
    assert str(tmp_path / "none") in error["message"]
    assert "again" not in (error["hint"] or "")


@pytest.mark.parametrize("command", [*FOLDERS, *FILES], ids=shown)
def test_a_broken_link_is_called_one(command, error_of, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to("gone")
    assert f"{link} is a link to gone, which does not exist" in error_of(command, link)["message"]


@pytest.mark.parametrize("command", FILES, ids=shown)
def test_a_folder_in_place_of_a_file_is_called_one(command, error_of, tmp_path: Path) -> None:
    (tmp_path / "a.toml").mkdir()
    assert f"{tmp_path / 'a.toml'} is a folder, not a file" in error_of(command, tmp_path / "a.toml")["message"]


def path_parameters() -> Iterator[str]:
    """Each `VERB PARAMETER` that takes a path, but those that are made where they are missing."""
    pending = [((), typer.main.get_command(app))]
    while pending:
        words, command = pending.pop()
        pending += [((*words, name), inner) for name, inner in getattr(command, "commands", {}).items()]
        for parameter in command.params:
            if "Path" in str(getattr(parameter, "type_descriptor", "")).partition(", parameter_info")[0]:
                yield " ".join((*words, parameter.name))


def test_no_verb_that_reads_a_path_is_left_out() -> None:
    """Its first argument by its verb, an option by its name; ask's images have tests of their own."""
    written = {"workspace", "log_file", "onnx", "image"}
    seen: list[str] = []
    tested = {shown(command) for command in [*FOLDERS, *FILES]}
    for place in path_parameters():
        *words, name = place.split()
        if name in written or words == ["ask"]:
            continue
        seen.append(place)
        option = f"--{name.replace('_', '-')} {{}}"
        assert any(command.startswith(" ".join((*words, "{}"))) or option in command for command in tested), place
    assert {"inspect checkpoint", "sign key", "validate accuracy samples", "doctor repository"} <= set(seen)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"<html>not found</html>", b"\xff" * 1000, random.Random(0).randbytes(900)]
)
def test_a_shard_that_is_something_else_is_called_so(content, error_of, tiny_folder: Path, tmp_path: Path) -> None:
    for path in tiny_folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tiny_folder.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(content)
    message = error_of(["inspect", "{}"], tmp_path)["message"]
    expected = "not a safetensors file" if len(content) > 8 else "is truncated"
    assert expected in message


@pytest.mark.parametrize(
    ("name", "kind", "hint"),
    [
        ("ed25519", "an Ed25519 private key", "-pubout"),
        ("locked", "a private key with a password", "-pubout"),
        ("rsa", "an RSA private key", "ask who signed it"),
        ("rsa-public", "an RSA public key", "ask who signed it"),
        ("ec-public", "an EC public key", "ask who signed it"),
        ("ed448-public", "an Ed448 public key", "ask who signed it"),
        ("text", "no key in PEM", "ask who signed it"),
    ],
)
def test_a_wrong_public_key_is_called_what_it_is(name: str, kind: str, hint: str, keys: Path) -> None:
    path = keys / f"{name}.pem"
    with pytest.raises(NvlmError) as failure:
        public_key(path)
    assert failure.value.message == f"{path} is {kind}, expected an Ed25519 public key"
    assert hint in (failure.value.hint or "")


@pytest.mark.parametrize(
    ("name", "kind", "hint"),
    [
        ("ed25519-public", "an Ed25519 public key", "genpkey"),
        ("locked", "a private key with a password", "-out key.pem"),
        ("rsa", "an RSA private key", "genpkey"),
        ("text", "no key in PEM", "genpkey"),
    ],
)
def test_a_wrong_private_key_is_called_what_it_is(name: str, kind: str, hint: str, keys: Path) -> None:
    path = keys / f"{name}.pem"
    with pytest.raises(NvlmError) as failure:
        private_key(path)
    assert failure.value.message == f"{path} is {kind}, expected an Ed25519 private key"
    assert hint in (failure.value.hint or "")


@pytest.mark.parametrize(
    ("problem", "message", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left", "source", None, "target"), "target: No space left", "`df -h target`"),
        (OSError(errno.EROFS, "Read-only", "source", None, "target"), "target: Read-only", "choose another place"),
        (OSError(errno.EACCES, "Permission denied", "secret"), "secret: Permission denied", "`ls -ld secret`"),
        (OSError(errno.EACCES, "Permission denied", "a", None, "b"), "a: Permission denied", "`ls -ld a`"),
        (OSError(errno.ENOSPC, "No space left"), "No space left", None),
        (OSError(errno.EIO, "Input/output error", "disk"), "disk: Input/output error", None),
        (OSError(errno.EMFILE, "Too many open files", "x"), "x: Too many open files", "ulimit -n"),
    ],
)
def test_a_refusal_of_the_system_names_the_place_that_it_is_about(problem, message, hint) -> None:
    found = machine_error(problem)
    assert (found.message, found.exit_code) == (message, 3)
    assert (hint in found.hint) if hint and found.hint else found.hint is hint
