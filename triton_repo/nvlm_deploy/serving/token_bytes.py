"""The bytes of each token of a byte-level BPE tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nvlm_deploy.errors import NvlmError


def byte_alphabet() -> dict[str, int]:
    """Return the byte for each printable character that byte-level BPE writes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


class TokenBytes:
    """The bytes of each token; special tokens have none."""

    def __init__(self, tokenizer_file: Path) -> None:
        """Raises NvlmError for a tokenizer whose decoder is not byte-level: its tokens have no bytes of their own."""
        content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        if (content.get("decoder") or {}).get("type") != "ByteLevel":
            raise NvlmError(f"{tokenizer_file}: the decoder is not ByteLevel: not the tokenizer of NVLM-D")
        alphabet = byte_alphabet()
        vocabulary: dict[str, int] = content["model"]["vocab"]
        self._bytes = {token: bytes_of(text, alphabet) for text, token in vocabulary.items()}
        for added in content.get("added_tokens", []):
            self._bytes[added["id"]] = b"" if added["special"] else bytes_of(added["content"], alphabet)

    def __call__(self, tokens: Sequence[int]) -> bytes:
        """Return the concatenated bytes; an id without a token (a padded vocabulary has some) has no bytes."""
        return b"".join(self._bytes.get(token, b"") for token in tokens)


def bytes_of(text: str, alphabet: dict[str, int]) -> bytes:
    """Return a token's bytes as the tokenizers library decodes them: a text outside the alphabet stands for itself."""
    if all(character in alphabet for character in text):
        return bytes(alphabet[character] for character in text)
    return text.encode()
