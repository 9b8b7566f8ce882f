"""Lines for people: 80 columns at most, on a terminal and in a pipe; what is to be pasted stays in one piece."""

from __future__ import annotations

import re
import shutil
import textwrap

_MOST_COLUMNS, _LEAST_COLUMNS = 80, 30
# what textwrap takes for a letter: stands for a space that must not become the end of a line
_NO_BREAK = "\0"


def wrapped(text: str, *, first: int, rest: int) -> str:
    """Cut between words, never within `backticks`, a path or an option; a word that is too long has its own line.

    The first line begins at column `first`, where the caller has printed something; all others at `rest`, further in
    where the text itself has them so.
    """
    filled = [_filled(line, rest, first if number == 0 else None) for number, line in enumerate(text.splitlines())]
    return "\n".join(filled)[first if text.strip() else 0 :]


def _filled(line: str, rest: int, first: int | None) -> str:
    within = " " * (rest + min(8, len(line) - len(line.lstrip())))
    found = textwrap.fill(
        re.sub("`[^`]*`", lambda command: command[0].replace(" ", _NO_BREAK), line.strip()),
        _columns(),
        initial_indent=within if first is None else " " * first,
        subsequent_indent=within,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return found.replace(_NO_BREAK, " ")


def _columns() -> int:
    return min(_MOST_COLUMNS, max(_LEAST_COLUMNS, shutil.get_terminal_size((_MOST_COLUMNS, 24)).columns))
