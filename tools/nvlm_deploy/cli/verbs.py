"""How the verbs of `nvlm`, and of a group of them, are listed in its help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from nvlm_deploy.errors import NvlmError


class Verbs(TyperGroup):
    """A group whose help gives each verb's first paragraph in full: typer's own cuts it after the first line.

    Without a verb it shows that help and ends with exit code 2.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            print(ctx.get_help())
            ctx.exit(NvlmError.exit_code)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, _first_paragraph(command.help)) for name, command in commands.items() if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())
