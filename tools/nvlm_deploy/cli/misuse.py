"""What typer says of an argument or option that is missing, unknown or out of range, with the help that lists it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from nvlm_deploy.errors import NvlmError


def misuse(problem: Any, arguments: Sequence[str]) -> NvlmError:
    """The error of a typer exception; the hint is the help of the verb that was typed."""
    context, parameter = getattr(problem, "ctx", None), getattr(problem, "param", None)
    value = None if parameter is None else _value_of(parameter.opts, arguments)
    given = "" if value is None else f"; given: {value!r}"
    typed = " ".join(["nvlm", *itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[:1])])
    verb = typed if context is None else context.command_path
    return NvlmError(f"{problem.format_message()}{given}", hint=f"`{verb} --help`")


def _value_of(names: Iterable[str], arguments: Sequence[str]) -> str | None:
    """What follows the option's last mention."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in names:
            found = value if equals else following
    return found
