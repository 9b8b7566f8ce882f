"""Token ids become text while they arrive: no piece ever ends inside a UTF-8 character."""

from __future__ import annotations

import codecs
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from nvlm_deploy.errors import NvlmError


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


class TokenBytes:
    """The bytes of each token of a byte-level BPE tokenizer; special tokens have none."""

    def __init__(self, tokenizer_file: Path) -> None:
        """Raises NvlmError for a tokenizer whose decoder is not byte-level: its tokens have no bytes of their own."""
        content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        if (content.get("decoder") or {}).get("type") != "ByteLevel":
            raise NvlmError(f"{tokenizer_file}: the decoder is not ByteLevel: not the tokenizer of NVLM-D")
        alphabet = byte_alphabet()
        vocabulary: dict[str, int] = content["model"]["vocab"]
        self._bytes = {token: bytes(alphabet[sign] for sign in text) for text, token in vocabulary.items()}
        for added in content.get("added_tokens", []):
            self._bytes[added["id"]] = b"" if added["special"] else added["content"].encode()

    def __call__(self, tokens: Sequence[int]) -> bytes:
        """Concatenated bytes; an id without a token (a padded vocabulary has some) has no bytes."""
        return b"".join(self._bytes.get(token, b"") for token in tokens)


class Detokenizer:
    """The unfinished character of each running request, by request id; bounded."""

    def __init__(self, token_bytes: TokenBytes, *, max_requests: int = 4096) -> None:
        self._token_bytes = token_bytes
        self._max_requests = max_requests
        self._unfinished: OrderedDict[str, codecs.IncrementalDecoder] = OrderedDict()

    def piece(self, request_id: str, tokens: Sequence[int], *, is_last: bool) -> bytes:
        """The text that `tokens` add, as UTF-8; up to three bytes are held back until their character is whole.

        A request that ends without `is_last` (its limit was reached, it was cancelled) within a character is forgotten
        when `max_requests` newer ones have: which response is a request's first nobody says. Without an id the bytes
        pass through as they are: a client that joins the pieces still gets the right text.
        """
        data = self._token_bytes(tokens)
        if not request_id:
            return data
        decoder = self._unfinished.pop(request_id, None) or codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(data, final=is_last)
        if not is_last and decoder.getstate()[0]:
            self._remember(request_id, decoder)
        return text.encode()

    def _remember(self, request_id: str, decoder: codecs.IncrementalDecoder) -> None:
        self._unfinished[request_id] = decoder
        while len(self._unfinished) > self._max_requests:
            self._unfinished.popitem(last=False)

    def __len__(self) -> int:
        """Requests with an unfinished character."""
        return len(self._unfinished)
