"""The errors a user can act on, each with the exit code of DESIGN section 6."""

from __future__ import annotations


class NvlmError(Exception):
    """The input is wrong: says what was found, what was expected, where; `hint` is a mend to paste."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class RejectedError(NvlmError):
    """It ran, and the answer is no: a candidate fails its gate."""

    exit_code = 1


class MachineError(NvlmError):
    """A tool or the machine failed, although the input may be right: full disk, port in use, a dead server."""

    exit_code = 3
