"""What a failure of the server means to the user: wrong input, or a machine that fails."""

from __future__ import annotations

import re

from nvlm_deploy.errors import MachineError, NvlmError

# Statuses by name, so that grpc is not needed to judge one.
_WRONG_INPUT = ("INVALID_ARGUMENT", "OUT_OF_RANGE")
_WRAPPING = re.compile(r"^(\[request id: [^\]]*\] )?(in ensemble '[^']*', )?")
_CODE = re.compile(r"^([A-Z_]{5,}): ")
# What gRPC itself says when there is no connection, or no longer one.
_CONNECTION = re.compile(r"connect|resolv|socket|GOAWAY|broken pipe|end of tcp stream", re.IGNORECASE)
# Triton's own texts for what is not the request's fault; those of our models begin with a code.
_FAULT = re.compile(r"^failed to |stub process|queue size|shutting down|exiting|stopp(ing|ed accepting)", re.IGNORECASE)


def error_from_text(url: str, text: str) -> NvlmError:
    """The error for a message in the stream, which has no status code.

    Our own models begin the text with the code's name (serving/backend.py). A text without one is Triton's, and taken
    for the request's fault unless it is known to be another.
    """
    text = _WRAPPING.sub("", text)
    if code := _CODE.match(text):
        return error_from_status(url, code[1], text[code.end() :])
    if "unknown model" in text:
        return error_from_status(url, "NOT_FOUND", text)
    return error_from_status(url, "INTERNAL" if _FAULT.search(text) else "INVALID_ARGUMENT", text)


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
    if code == "UNAVAILABLE" and _CONNECTION.search(message):
        return MachineError(
            f"no server answers at {url}: {message}",
            hint="start one with `nvlm serve REPOSITORY`, or give its gRPC address with --url HOST:PORT",
        )
    return MachineError(f"the server at {url} failed ({code}): {message}", hint=hint)


def _message_and_hint(details: str) -> tuple[str, str | None]:
    """The server sends `str(NvlmError)`."""
    message, _, hint = details.partition("\n  hint: ")
    return message, hint or None
