"""One rule for each kind of value a caller gives: the right value, or an error that names it. Nothing is rounded."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Sequence

import numpy as np

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.tensors import TensorSpec

LONGEST_WAIT_S = 365 * 24 * 3600


def shown(value: object) -> str:
    """The value as Python writes it, cut short, with its type."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def number_for(spec: TensorSpec, value: object) -> int | float:
    """The number that goes into a tensor; NvlmError for another type and for what the tensor cannot hold.

    Whether the server allows it is for the server to say: its limits depend on the repository.
    """
    if np.dtype(spec.dtype).kind in "iu":
        return _integer(spec, value)
    number = real(spec.name, value)
    limits = np.finfo(spec.dtype)
    if abs(number) > float(limits.max) or 0 < abs(number) < float(limits.tiny):
        least, most = float(limits.tiny), float(limits.max)
        raise NvlmError(f"{spec.name} is {number}, expected 0 or a size between {least:.2g} and {most:.2g}")
    return number


def _integer(spec: TensorSpec, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise NvlmError(f"{spec.name} is {shown(value)}, expected an integer")
    number, limits = int(value), np.iinfo(spec.dtype)
    if not limits.min <= number <= limits.max:
        raise NvlmError(f"{spec.name} is {reprlib.repr(number)}, expected {limits.min} to {limits.max}")
    return number


def real(name: str, value: object) -> float:
    """A finite number; NvlmError for anything else, booleans and strings included."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise NvlmError(f"{name} is {shown(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NvlmError(f"{name} is {number}, expected a finite number")
    return number


def seconds(name: str, value: object) -> float:
    """A wait; NvlmError unless it is above 0 and at most a year."""
    number = real(name, value)
    if not 0 < number <= LONGEST_WAIT_S:
        raise NvlmError(f"{name} is {number:g}, expected seconds above 0 and at most {LONGEST_WAIT_S:,} (a year)")
    return number


def text_bytes(name: str, value: object) -> bytes:
    """UTF-8; NvlmError for what is not a `str`, or is one that was made of bytes in another encoding."""
    if not isinstance(value, str):
        raise NvlmError(f"{name} is {shown(value)}, expected a str")
    try:
        return value.encode()
    except UnicodeEncodeError as problem:
        around = value[max(0, problem.start - 20) : problem.start + 20]
        raise NvlmError(
            f"{name} is not valid UTF-8 at character {problem.start + 1}: {around!a}",
            hint="a lone surrogate is a byte that Python could not decode: encode the text as UTF-8",
        ) from None


def words(name: str, value: object) -> tuple[str, ...]:
    """The words of a list or tuple; a `str` is one word. NvlmError for anything else and for an empty word."""
    if value is None:
        return ()
    given: Sequence[object] = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
    if not isinstance(value, str | list | tuple):
        raise NvlmError(f"{name} is {shown(value)}, expected a str, or a list or tuple of them")
    for number, word in enumerate(given, start=1):
        if not text_bytes(f"word {number} of {name}", word):
            raise NvlmError(f"word {number} of {name} is empty", hint=f"leave {name} out for no words")
    return tuple(str(word) for word in given)
