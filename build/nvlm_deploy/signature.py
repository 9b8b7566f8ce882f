"""An Ed25519 signature of an artifact's manifest, and so of every file it lists; in a file beside it, as base64.

Keys are PEM files as `openssl genpkey -algorithm ed25519` makes them; the same signature can be checked with `openssl
pkeyutl -verify -rawin`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import SIGNATURE_NAME, verify, write_text
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.manifest import MANIFEST_NAME, read_manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_MAKE_KEY = "`openssl genpkey -algorithm ed25519 -out key.pem`, `openssl pkey -in key.pem -pubout -out public.pem`"


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
    """An Ed25519 key without a password. Raises NvlmError for anything else."""
    from_pem = _serialization().load_pem_private_key
    key = _loaded(path, lambda pem: from_pem(pem, password=None))
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not isinstance(key, Ed25519PrivateKey):
        raise NvlmError(f"{path} is no Ed25519 key", hint=_MAKE_KEY)
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """Raises NvlmError for anything but an Ed25519 public key."""
    key = _loaded(path, _serialization().load_pem_public_key)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not isinstance(key, Ed25519PublicKey):
        raise NvlmError(f"{path} is no Ed25519 public key", hint=_MAKE_KEY)
    return key


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise MachineError("signatures need cryptography", hint="pip install 'nvlm-deploy[sign]'") from None
    return serialization


def _loaded(path: Path, load: Any) -> object:
    from cryptography.exceptions import UnsupportedAlgorithm

    if not path.is_file():
        raise NvlmError(f"no key {path}", hint=_MAKE_KEY)
    try:
        return load(path.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise NvlmError(f"{path} holds no such key in PEM, or one with a password", hint=_MAKE_KEY) from None
