"""Token ids become the text of an answer while they arrive: whole characters, nothing of a stop word, and the end."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nvlm_deploy.serving.token_bytes import TokenBytes

FinishReason = Literal["", "stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one response of the decoder adds; `finish_reason` is empty until the last piece."""

    text: str = ""
    tokens: int = 0
    finish_reason: FinishReason = ""

    def joined(self, later: Piece) -> Piece:
        """Return this piece and the one after it as one."""
        return Piece(self.text + later.text, self.tokens + later.tokens, later.finish_reason)


@dataclass(frozen=True)
class Ending:
    """What ends an answer: the end ids, a stop word in the text, or `max_tokens`.

    A stop word counts when it is complete after more than `min_tokens` tokens.
    """

    end_ids: frozenset[int]
    max_tokens: int
    stop_words: tuple[str, ...] = ()
    min_tokens: int = 0


class AnswerText:
    """The text of one answer. All that is kept of an answer between two responses is in here."""

    def __init__(self, token_bytes: TokenBytes, ending: Ending) -> None:
        self.ending = ending
        self.tokens = 0
        self.finish_reason: FinishReason = ""
        # whether a stop word ended it: the decoder does not know and goes on
        self.is_cut = False
        self._token_bytes = token_bytes
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop_words = [_StopWord(word) for word in ending.stop_words]
        self._held = ""

    def piece(self, ids: Sequence[int]) -> Piece:
        """Return what the decoder's next ids add. Ids after the end are passed over.

        A response without ids says the end: TensorRT-LLM does not count the end id as output.
        """
        before, text = self.tokens, ""
        if not ids and not self.finish_reason:
            text = self._ended("stop")
        for token in ids:
            if self.finish_reason:
                break
            text += self._after(token)
        return Piece(text, self.tokens - before, self.finish_reason)

    def _after(self, token: int) -> str:
        if token in self.ending.end_ids:
            return self._ended("stop")
        self.tokens += 1
        text = self._sendable(self._characters.decode(self._token_bytes([token])))
        if not self.finish_reason and self.tokens >= self.ending.max_tokens:
            text += self._ended("length")
        return text

    def _ended(self, reason: FinishReason) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD, as in the tokenizer's own decode."""
        text = self._sendable(self._characters.decode(b"", final=True))
        if not self.finish_reason:
            text, self._held = text + self._held, ""
            self.finish_reason = reason
        return text

    def _sendable(self, characters: str) -> str:
        """Return the text that can no longer become part of a stop word; sets the reason when one is complete."""
        if not self._stop_words:
            return characters
        self._held += characters
        for position in range(len(self._held) - len(characters), len(self._held)):
            complete = [word.length for word in self._stop_words if word.completed_by(self._held[position])]
            if complete and self.tokens > self.ending.min_tokens:
                text, self._held = self._held[: position + 1 - max(complete)], ""
                self.finish_reason, self.is_cut = "stop", True
                return text
        keep = max(word.matched for word in self._stop_words)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


class _StopWord:
    """Finds a word in a text that comes character by character (Knuth, Morris and Pratt 1977)."""

    def __init__(self, word: str) -> None:
        self.length = len(word)
        self.matched = 0
        self._word = word
        self._shorter = _shorter_matches(word)

    def completed_by(self, character: str) -> bool:
        """Take the next character; whether the word ends with it. `matched` characters are a beginning of the word."""
        while self.matched and self._word[self.matched] != character:
            self.matched = self._shorter[self.matched]
        if self._word[self.matched] == character:
            self.matched += 1
        if self.matched < self.length:
            return False
        self.matched = self._shorter[self.length]
        return True


def _shorter_matches(word: str) -> list[int]:
    """Return for each length the longest shorter beginning of `word` that ends there too."""
    table = [0, 0]
    for position in range(1, len(word)):
        length = table[position]
        while length and word[length] != word[position]:
            length = table[length]
        table.append(length + 1 if word[length] == word[position] else 0)
    return table
