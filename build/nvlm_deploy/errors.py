"""The errors a user can act on, each with the exit code of DESIGN section 6."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

_MOST_FAULTS = 3


class NvlmError(Exception):
    """The input is wrong: says what was found, what was expected, where; `hint` is a mend to paste."""

    exit_code = 2
    # the text that had come of an answer whose stream then failed; empty for every other error
    partial = ""

    def __init__(self, message: str, *, hint: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        """`details` are for programs: they stand beside the error in the document that --json prints."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details or {}

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class RejectedError(NvlmError):
    """It ran, and the answer is no: a candidate fails its gate."""

    exit_code = 1


class MachineError(NvlmError):
    """A tool or the machine failed, although the input may be right: full disk, port in use, a dead server."""

    exit_code = 3


def unknown_name(what: str, name: str, known: Sequence[str]) -> NvlmError:
    """Of a name that is none of `known`: the nearest of them in the message, all in the hint."""
    beginning = [other for other in known if name and other.startswith(name)]
    close = difflib.get_close_matches(name, beginning or known, n=1, cutoff=0.0 if beginning else 0.5)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return NvlmError(f"no {what} {name!r}{meant}", hint=f"there are: {', '.join(known)}")


def faults_of(problem: ValidationError) -> str:
    """What is wrong with a file's content, in the words of the file: its keys, and JSON's kinds of values."""
    found = problem.errors(include_url=False)
    more = f" and {len(found) - _MOST_FAULTS} more" if len(found) > _MOST_FAULTS else ""
    return "; ".join(_fault(dict(error)) for error in found[:_MOST_FAULTS]) + more


def _fault(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the whole"
    kind, said = error["type"], error["msg"][:1].lower() + error["msg"][1:]
    if kind == "json_invalid":
        return f"not JSON: {error['ctx']['error']}"
    if kind == "missing":
        return f"key {place} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {place}"
    value = repr(error["input"])
    return f"{place} is {value if len(value) < 60 else value[:56] + '...'}: {said}"
