"""`pytest --core` runs what nobody said needs an extra, and a folder that ran nothing is a failure."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import core_selection

PLUGIN = Path(core_selection.__file__)
CONFTEST = """
import pytest

pytest_plugins = ["core_selection"]

@pytest.fixture
def make_checkpoint():
    import torch
"""
PASSES = "def test_passes(): pass\n"
MARKED = 'import pytest\n@pytest.mark.needs("serve")\ndef test_marked(): import pytriton\n'
WITH_FIXTURE = "def test_with_fixture(make_checkpoint): pass\n"
IMPORTS_AT_TOP = "import torch.nn\ndef test_torch(): pass\n"
IMPORTS_INSIDE = "def test_inside(): import onnxruntime\n"
SKIPS = "import pytest\npytest.skip('no', allow_module_level=True)\n"
LOOKS_FOR_IT = """
from importlib.util import find_spec
def test_it_is_hidden(): assert find_spec("torch") is None
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A tests folder with the plugin, the paths that it lists, and one test that passes."""
    tests = tmp_path / "tests"
    for path in core_selection.NEEDED_BY_PATH:
        write(tests, f"{path}/test_listed.py" if "." not in path else path, IMPORTS_INSIDE)
    write(tests, "conftest.py", CONFTEST)
    write(tests, "room/test_passes.py", PASSES)
    for folder in {Path(path).parts[0] for path in core_selection.NEEDED_BY_PATH if "." in path}:
        write(tests, f"{folder}/test_passes_too.py", PASSES)
    (tests / "plugins").mkdir()
    shutil.copy(PLUGIN, tests / "plugins")
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\npythonpath = tests/plugins\naddopts = -ra\n")
    return tests


def write(tests: Path, name: str, text: str) -> None:
    (tests / name).parent.mkdir(parents=True, exist_ok=True)
    (tests / name).write_text(text)


def run(tests: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-p", "xdist.plugin", *options]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, env=environment, cwd=tests.parent, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_test_is_in_the_core_unless_something_says_what_it_needs(suite: Path, workers: str) -> None:
    write(suite, "new/test_new.py", PASSES + LOOKS_FOR_IT + MARKED + WITH_FIXTURE)
    write(suite, "new/test_imports.py", IMPORTS_AT_TOP)
    code, text = run(suite, "--core", "-n", workers)
    assert code == 0, text
    assert re.search(r"passed by folder: .*new 2, .*room 1", text)
    assert re.search(r"need the extra build: .*llm/test_listed.py, .*new/test_imports.py", text)
    assert re.search(r"SKIPPED .*needs the extra serve", text)
    assert re.search(r"SKIPPED .*needs the extra build", text)


def test_a_test_that_needs_more_and_does_not_say_so_fails(suite: Path) -> None:
    write(suite, "room/test_more.py", IMPORTS_INSIDE)
    code, text = run(suite, "--core")
    assert code == 1
    assert "No module named 'onnxruntime'" in text


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_folder_that_ran_no_test_is_a_failure(suite: Path, workers: str) -> None:
    for folder, text in {"marked": MARKED, "fixture": WITH_FIXTURE, "imports": IMPORTS_AT_TOP, "skips": SKIPS}.items():
        write(suite, f"{folder}/test_silent.py", text)
    code, text = run(suite, "--core", "-n", workers)
    assert code == 1
    assert "FAILED: no test passed in fixture, imports, marked, skips" in text


def test_a_listed_path_that_is_gone_is_said(suite: Path) -> None:
    shutil.rmtree(suite / "llm")
    code, text = run(suite, "--core")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "lists what is not there: llm" in text


def test_without_the_option_nothing_is_left_out(suite: Path) -> None:
    write(suite, "room/test_marked.py", 'import pytest\n@pytest.mark.needs("build")\ndef test_it(): assert False\n')
    code, text = run(suite, "tests/room")
    assert code == 1
    assert "1 failed, 1 passed" in text
