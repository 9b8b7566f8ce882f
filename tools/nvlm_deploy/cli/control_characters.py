"""Text of others on a terminal: what would move the cursor, ring, hide or reorder is shown, not done."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO

# controls, invisible formats (those that reorder text are among them), surrogates, line and paragraph separators
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
# these shape text and do no more: joiners of scripts and emoji, the soft hyphen
_HARMLESS = "\n\t\u200c\u200d\u00ad"


def visible(text: str) -> str:
    r"""The text with every control character as Python writes it, `\x1b`; newlines and tabs stay."""
    return "".join(map(_shown, text))


def for_output(text: str, stream: TextIO | None = None) -> str:
    """As `visible` when the stream (stdout) is a terminal; into a pipe or file the text as it is."""
    stream = sys.stdout if stream is None else stream
    return visible(text) if stream.isatty() else text


def _shown(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape").decode()
