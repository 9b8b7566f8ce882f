"""What is written about a verb or an option is what its help shows, word for word."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nvlm_deploy.cli.main import app
from nvlm_deploy.cli.verbs import Verbs

RUNNER = CliRunner()
COLUMNS = [40, 80, 200]
HARD_TO_SHOW = "The <image> of [name] and [bold]x[/bold], `a <b>`, *c*, __d__, <br/>, https://e.f/[g](h), :cat: & 1. i"


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb and group as typer has it, the outermost first, with what a user types."""
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


EVERY = list(commands(typer.main.get_command(app)))


def shown(arguments: tuple[str, ...], columns: int, shown_app: typer.Typer = app) -> str:
    """All that a help shows but the white space, for a line may end within a word that has a hyphen."""
    found = RUNNER.invoke(shown_app, [*arguments, "--help"], env={"COLUMNS": str(columns)})
    assert found.exit_code == 0
    return without_space(found.output)


def without_space(text: str) -> str:
    return "".join(text.split())


def written(command: Any) -> Iterator[str]:
    """The help of the command, of its arguments and options, and the first paragraph of each verb of a group."""
    yield command.help or ""
    yield from (parameter.help for parameter in command.params if getattr(parameter, "help", None))
    yield from ((inner.help or "").partition("\n\n")[0] for inner in getattr(command, "commands", {}).values())


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("words", "command"), EVERY, ids=[" ".join(("nvlm", *words)) for words, _ in EVERY])
def test_every_word_that_is_written_is_shown(words: tuple[str, ...], command: Any, columns: int) -> None:
    texts = [without_space(text) for text in written(command)]
    assert len(texts) > 1
    found = shown(words, columns)
    assert [text for text in texts if text not in found] == []


def test_every_verb_has_a_help_of_its_own() -> None:
    assert [words for words, command in EVERY if not (command.help or "").strip()] == []


@pytest.mark.slow
def test_the_mark_of_an_image_is_in_the_help_of_ask_as_a_user_sees_it() -> None:
    program = "from nvlm_deploy.cli.main import run; run()"
    environment = {**os.environ, "COLUMNS": "80", "FORCE_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, "ask", "--help"], capture_output=True, text=True, env=environment
    )
    assert "<image>" in done.stdout


@pytest.mark.parametrize("columns", COLUMNS)
def test_what_looks_like_marks_is_shown_as_it_is(columns: int) -> None:
    """With the settings of our app, texts that markdown or rich would take for marks."""
    probe = typer.Typer(cls=Verbs, rich_markup_mode=app.rich_markup_mode, add_completion=False)

    @probe.command(help=HARD_TO_SHOW)
    def verb(option: str = typer.Option("x", help=HARD_TO_SHOW)) -> None:
        """Never run."""

    probe.command(name="other", help=HARD_TO_SHOW)(verb)
    assert shown((), columns, probe).count(without_space(HARD_TO_SHOW)) == 2
    assert shown(("verb",), columns, probe).count(without_space(HARD_TO_SHOW)) == 2
