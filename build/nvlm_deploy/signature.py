"""An Ed25519 signature of an artifact's manifest, and so of every file it lists; in a file beside it, as base64.

Keys are PEM files as `openssl genpkey -algorithm ed25519` makes them; the same signature can be checked with `openssl
pkeyutl -verify -rawin`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nvlm_deploy.artifacts import SIGNATURE_NAME, verify, write_text
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.manifest import MANIFEST_NAME, read_manifest
from nvlm_deploy.places import require_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_LOCKED = "a private key with a password"
_ORIGIN = {
    "private": "`openssl genpkey -algorithm ed25519 -out key.pem` makes one",
    "public": "ask who signed it: `openssl pkey -in key.pem -pubout -out public.pem` writes the public half of the key",
}


def sign(folders: Iterable[Path], key: Ed25519PrivateKey, *, dry_run: bool = False) -> list[Path]:
    """Sign finished artifacts; the files that hold the signatures.

    Raises NvlmError when one is damaged, before any is signed.
    """
    texts = {folder: _signature_of(folder, key) for folder in folders}
    for folder, text in texts.items() if not dry_run else ():
        write_text(folder / SIGNATURE_NAME, text)
        require_signature(folder, key.public_key())
    return [folder / SIGNATURE_NAME for folder in texts]


def _signature_of(folder: Path, key: Ed25519PrivateKey) -> str:
    verify(folder)
    return base64.b64encode(key.sign((folder / MANIFEST_NAME).read_bytes())).decode() + "\n"


def require_signature(folder: Path, key: Ed25519PublicKey) -> None:
    """Raises NvlmError when the manifest is not signed by the key's owner. Of the files only `verify` speaks."""
    from cryptography.exceptions import InvalidSignature

    read_manifest(folder)
    path = folder / SIGNATURE_NAME
    if not path.is_file():
        raise NvlmError(f"{folder} is not signed: no {SIGNATURE_NAME}", hint=f"`nvlm sign {folder} --key key.pem`")
    try:
        text = path.read_bytes()
        signature = base64.b64decode(text.removesuffix(b"\n"), validate=True)
        if base64.b64encode(signature) + b"\n" != text:  # several texts stand for the same bytes: one is ours
            raise InvalidSignature
        key.verify(signature, (folder / MANIFEST_NAME).read_bytes())
    except (binascii.Error, InvalidSignature):
        raise NvlmError(
            f"{path} is not the signature of this manifest by the owner of the key",
            hint="take the public key of who built it, or fetch the artifact again from them",
        ) from None


def private_key(path: Path) -> Ed25519PrivateKey:
    """An Ed25519 key without a password. Raises NvlmError for anything else, saying what it is."""
    return cast("Ed25519PrivateKey", _key(path, "private", {_LOCKED: f"`openssl pkey -in {path} -out key.pem`"}))


def public_key(path: Path) -> Ed25519PublicKey:
    """Raises NvlmError for anything but an Ed25519 public key, saying what it is."""
    half = f"`openssl pkey -in {path} -pubout -out public.pem`"
    return cast("Ed25519PublicKey", _key(path, "public", {_LOCKED: half, "an Ed25519 private key": half}))


def _key(path: Path, wanted: str, hints: Mapping[str, str]) -> object:
    """`hints` say how to get the wanted key from what was found; else they say where such keys come from."""
    require_file(path, f"{wanted} key", hint=_ORIGIN[wanted])
    found, key = _kind_and_key(path)
    if found != f"an Ed25519 {wanted} key":
        hint = hints.get(found, _ORIGIN[wanted])
        raise NvlmError(f"{path} is {found}, expected an Ed25519 {wanted} key", hint=hint)
    return key


def _kind_and_key(path: Path) -> tuple[str, object]:
    """What a file holds, in words, and the key where it can be read."""
    from cryptography.exceptions import UnsupportedAlgorithm

    serialization, pem = _serialization(), path.read_bytes()
    loaders: dict[str, Callable[[], object]] = {
        "private": lambda: serialization.load_pem_private_key(pem, password=None),
        "public": lambda: serialization.load_pem_public_key(pem),
    }
    for kind, load in loaders.items():
        try:
            key = load()
        except TypeError:
            return _LOCKED, None
        except (ValueError, UnsupportedAlgorithm):
            continue
        algorithm = type(key).__name__.removeprefix("_").partition(kind.capitalize())[0]
        return f"{'an' if algorithm[0] in 'AEIOUR' else 'a'} {algorithm} {kind} key", key
    return "no key in PEM", None


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise MachineError("signatures need cryptography", hint="pip install 'nvlm-deploy[sign]'") from None
    return serialization
