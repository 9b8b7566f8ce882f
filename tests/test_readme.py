"""README's commands for the small model run as they stand, pasted into a shell in a fresh copy of the checkout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nvlm_deploy.cli.main import app
from nvlm_deploy.triton.server import Ports

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
INTRODUCTION = "With the small model from this repository"
PORTS = (8001, 8000, 8002)
ANSWER = r"(?m)^[0-9]$"


def block_after(words: str) -> list[str]:
    """The lines of the indented block that follows a paragraph beginning with these words."""
    found = re.search(rf"^{re.escape(words)}[^\n]*(?:\n\S[^\n]*)*\n\n((?:    [^\n]*\n)+)", README, re.MULTILINE)
    assert found, f"README has no block after {words!r}"
    return [line.removeprefix("    ") for line in found[1].splitlines()]


def blocks() -> list[str]:
    return [line.removeprefix("    ") for line in README.splitlines() if line.startswith("    nvlm ")]


def words_of(line: str) -> list[str]:
    """The words behind `nvlm`, without the marks of a choice, a second command or a comment."""
    first = line.split("#")[0].split(";")[0].rstrip(" &")
    return shlex.split(re.sub(r"[][|]", " ", first))[1:]


@pytest.fixture
def fresh_copy(tmp_path: Path) -> Path:
    """What git has of this checkout, as it stands in the working tree, with a ready environment beside it."""
    copy = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    make_environment(copy)
    return copy


def make_environment(copy: Path) -> None:
    """A `.venv` whose `activate` and `nvlm` are as pip makes them, with this environment's packages; no downloads."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy / ".venv"], check=True)
    site = next((copy / ".venv" / "lib").glob("python*/site-packages"))
    roots = [str(copy / root) for root in ("build", "triton_repo", "tools")]
    (site / "peers.pth").write_text("\n".join([*roots, *(path for path in sys.path if "site-packages" in path)]))
    script = copy / ".venv" / "bin" / "nvlm"
    script.write_text(f"#!{copy}/.venv/bin/python\nfrom nvlm_deploy.cli.main import run\nrun()\n")
    script.chmod(0o755)
    for stamp in (".setup-run", ".setup-test"):  # what `make setup` looks at: newer than what it is made of
        (copy / ".venv" / stamp).touch()


def with_free_ports(lines: list[str]) -> list[str]:
    """The same lines for a machine on which the usual ports may be taken; nothing else is changed."""
    ports = Ports.free()
    options = {
        "nvlm serve": f"--grpc-port {ports.grpc} --http-port {ports.http} --metrics-port {ports.metrics}",
        "nvlm ask": f"--url localhost:{ports.grpc}",
    }
    return [re.sub("^(nvlm serve|nvlm ask)", lambda verb: f"{verb[1]} {options[verb[1]]}", line) for line in lines]


@pytest.mark.slow
def test_the_lines_for_the_small_model_run_as_pasted(fresh_copy: Path) -> None:
    lines = block_after(INTRODUCTION)
    assert any(line.startswith("nvlm ask") for line in lines)
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment.pop("VIRTUAL_ENV", None)
    environment.pop("PYTHONPATH", None)
    pasted = "\n".join(["set -e", *with_free_ports(lines), "wait $!; echo server ended with $?"])
    done = subprocess.run(
        ["bash"], input=pasted, cwd=fresh_copy, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert re.search(ANSWER, done.stdout), done.stdout
    assert "server ended with 0" in done.stdout


def test_every_command_of_the_readme_is_one_that_exists() -> None:
    """Verbs and options, by the help of the verb itself."""
    commands = typer.main.get_command(app)
    for line in [*blocks(), *block_after(INTRODUCTION)]:
        if not line.startswith("nvlm "):
            continue
        words = words_of(line)
        verb = [words[0], *words[1:2]] if words[0] == "validate" else words[:1]
        assert words[0] in commands.commands, line  # type: ignore[attr-defined]
        shown = CliRunner().invoke(app, [*verb, "--help"]).output
        for option in [word for word in words if word.startswith("-")]:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown), f"{option} in {line}"


def test_the_usual_ports_are_those_that_the_readme_relies_on() -> None:
    assert (Ports().grpc, Ports().http, Ports().metrics) == PORTS
