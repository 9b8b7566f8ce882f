"""What a failure of the server means to the user: wrong input, or a machine that fails."""

from __future__ import annotations

import re

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.machine.address import Route

# Statuses by name, so that grpc is not needed to judge one.
_WRONG_INPUT = ("INVALID_ARGUMENT", "OUT_OF_RANGE")
_WRAPPING = re.compile(r"^(\[request id: [^\]]*\] )?(in ensemble '[^']*', )?")
_CODE = re.compile(r"^([A-Z_]{5,}): ")
# What gRPC itself says when there is no connection, or no longer one.
_CONNECTION = re.compile(
    r"connect|resolv|resolution|socket|GOAWAY|broken pipe|end of tcp stream|recvmsg|sendmsg|transport", re.IGNORECASE
)
# What it says of a server that speaks no gRPC: another service, or Triton's HTTP port.
_NOT_GRPC = re.compile(r"http1|http/1|parsing http/2|http2 header|content-type", re.IGNORECASE)
_WITHOUT_GRPC = ("UNAVAILABLE", "UNKNOWN", "INTERNAL", "UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED")
# Triton's own texts for what is not the request's fault; those of our models begin with a code.
_FAULT = re.compile(r"^failed to |stub process|queue size|shutting down|exiting|stopp(ing|ed accepting)", re.IGNORECASE)
_PORT = "the port of its gRPC service: Triton's is 8001, 8000 is HTTP"
_START = f"start one with `nvlm serve REPOSITORY`, or give --url HOST:PORT with {_PORT}"


def error_from_text(route: Route, text: str) -> NvlmError:
    """The error for a message in the stream, which has no status code.

    Our own models begin the text with the code's name (serving/backend.py). A text without one is Triton's, and taken
    for the request's fault unless it is known to be another.
    """
    text = _WRAPPING.sub("", text)
    if code := _CODE.match(text):
        return error_from_status(route, code[1], text[code.end() :])
    if "unknown model" in text:
        return error_from_status(route, "NOT_FOUND", text)
    return error_from_status(route, "INTERNAL" if _FAULT.search(text) else "INVALID_ARGUMENT", text)


def error_from_status(route: Route, code: str, details: str, *, has_begun: bool = False) -> NvlmError:
    """The error for status `code` (its name, as `INVALID_ARGUMENT`) with the server's text.

    INVALID_ARGUMENT is the request's fault; a connection that fails, a lack that passes or a fault of the server is a
    MachineError. `has_begun` tells that some of the answer had come.
    """
    message, hint = _message_and_hint(details)
    if code in _WRONG_INPUT:
        return NvlmError(message, hint=hint)
    if code == "NOT_FOUND":
        return NvlmError(f"the server at {route} has no model nvlm: {message}", hint="serve a repository of ours")
    if code == "DEADLINE_EXCEEDED":
        hint = _hint(route, "allow more time (--timeout)")
        return MachineError(f"the server at {route} gave no whole answer in time", hint=hint)
    if code == "UNAVAILABLE" and has_begun and _CONNECTION.search(message):
        return MachineError(
            f"the connection to the server at {route} broke in the middle of an answer: {message}",
            hint="see the server's log, and ask again",
        )
    if code in _WITHOUT_GRPC and _NOT_GRPC.search(message):
        return MachineError(f"what answers at {route} is not gRPC: {message}", hint=_hint(route, f"give {_PORT}"))
    if code == "UNIMPLEMENTED":
        return NvlmError(f"the server at {route} is not a Triton server: {message}", hint=_hint(route, _START))
    if code == "UNAVAILABLE" and _CONNECTION.search(message):
        return MachineError(f"no server answers at {route}: {message}", hint=_hint(route, _START))
    return MachineError(f"the server at {route} failed ({code}): {message}", hint=hint)


def _hint(route: Route, hint: str) -> str:
    """A proxy that nobody thinks of is the likelier cause."""
    if route.proxy is None:
        return hint
    return f"to go past the proxy: `export no_grpc_proxy={route.address.host}`; or {hint}"


def _message_and_hint(details: str) -> tuple[str, str | None]:
    """The server sends `str(NvlmError)`."""
    message, _, hint = details.partition("\n  hint: ")
    return message, hint or None
