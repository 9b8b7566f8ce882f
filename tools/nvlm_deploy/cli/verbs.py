"""How the verbs of `nvlm`, and of a group of them, are listed in its help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class Verbs(TyperGroup):
    """A group whose help gives each verb's first paragraph in full: typer's own cuts it after the first line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, _first_paragraph(command.help)) for name, command in commands.items() if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())
