"""What a gRPC status means to the user: wrong input, or a machine that fails."""

from __future__ import annotations

import re

from nvlm_deploy.errors import MachineError, NvlmError

# The status codes by name, so that grpc is not needed to judge one.
_WRONG_INPUT = ("INVALID_ARGUMENT", "OUT_OF_RANGE")
_WRAPPING = re.compile(r"^in ensemble '[^']*', ")


def error_from_status(url: str, code: str, details: str) -> NvlmError:
    """The error for status `code` (its name, as `INVALID_ARGUMENT`) with the server's text.

    INVALID_ARGUMENT is the request's fault; a connection that fails, a lack that passes or a fault of the server is a
    MachineError.
    """
    message, hint = _message_and_hint(details)
    if code in _WRONG_INPUT:
        return NvlmError(message, hint=hint)
    if code == "NOT_FOUND":
        return NvlmError(f"the server at {url} has no model nvlm: {message}", hint="serve a repository of ours")
    if code == "DEADLINE_EXCEEDED":
        return MachineError(f"the server at {url} gave no whole answer in time", hint="allow more time (--timeout)")
    if code == "UNAVAILABLE" and _is_connection_failure(message):
        return MachineError(
            f"no server answers at {url}: {message}",
            hint="start one with `nvlm serve REPOSITORY`, or give its gRPC address with --url HOST:PORT",
        )
    return MachineError(f"the server at {url} failed ({code}): {message}", hint=hint)


def _message_and_hint(details: str) -> tuple[str, str | None]:
    """The server sends `str(NvlmError)`; an ensemble puts its own name before it."""
    message, _, hint = _WRAPPING.sub("", details).partition("\n  hint: ")
    return message, hint or None


def _is_connection_failure(message: str) -> bool:
    return any(sign in message for sign in ("connect", "Socket", "DNS", "resolve", "GOAWAY", "Broken pipe"))
