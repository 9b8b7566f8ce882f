"""`pytest --core`: run the tests that need neither torch, ONNX nor the bundled server.

An application that installs the client or the planner has none of these, on any Python and with numpy 1 or 2. Their
libraries are hidden, so the selection is the same in every environment. A test is in the core unless one of these
says which extra it needs:

- its folder or file is listed in `NEEDED_BY_PATH`;
- its file imports a library of that extra at the top;
- it uses a fixture listed in `NEEDED_BY_FIXTURE`;
- it is marked `@pytest.mark.needs("build")`.

A new test is therefore in the core, and fails there if it needs more. The run fails, too, when a folder of the core
ran no test.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
# import names by extra; `test` stands for the peers that tests compare with
LIBRARIES = {
    "build": ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch"),
    "serve": ("psutil", "pytriton"),
    "test": ("modelopt", "polygraphy", "sklearn", "tensorrt_rtx", "transformers"),
}
NEEDED_BY_PATH = {
    "checkpoint": "build",
    "llm": "build",
    "models": "build",
    "serving/test_decoder_inputs.py": "build",
    "serving/test_engine_repository.py": "serve",
    "steps/test_decoder.py": "build",
    "vision": "build",
}
NEEDED_BY_FIXTURE = {"make_checkpoint": "build", "traced_once": "build"}
# no part of any plain run: see norecursedirs in pyproject.toml, and bench holds no tests
OTHER_RUNS = {"bench", "gpu", "oracles", "plugins"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", action="store_true", help="run the tests that need none of the extras build and serve")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(extra): needs this extra; `pytest --core` skips it")
    if config.getoption("core"):
        require_listed_paths()
        sys.meta_path[sys.meta_path.index(PathFinder)] = PathWithoutExtras
        config.pluginmanager.register(CoreRun(), "core_run")


class PathWithoutExtras(PathFinder):
    """Find no library of an extra, so that `import torch` fails here as it does where torch is not installed."""

    hidden = frozenset(library for libraries in LIBRARIES.values() for library in libraries)

    @classmethod
    def find_spec(cls, fullname: str, *place: Any) -> ModuleSpec | None:
        return None if fullname in cls.hidden else super().find_spec(fullname, *place)


class CoreRun:
    """Leave out what needs an extra, count what passed, and fail for a folder that ran nothing."""

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return True if extra_needed_by_path(collection_path) else None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if extra := extra_needed_by_item(item):
                item.add_marker(pytest.mark.skip(reason=f"needs the extra {extra}"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed[folder_of(TESTS.parent / report.nodeid.split("::")[0])] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and self.silent() and not hasattr(session.config, "workerinput"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("core")
        counts = ", ".join(f"{folder} {count}" for folder, count in sorted(self.passed.items()))
        terminalreporter.line(f"passed by folder: {counts}")
        for extra in LIBRARIES:
            left_out = sorted(path for path, needed in left_out_files().items() if needed == extra)
            if left_out:
                terminalreporter.line(f"{len(left_out)} files need the extra {extra}: {', '.join(left_out)}")
        if self.silent():
            terminalreporter.line(f"FAILED: no test passed in {', '.join(self.silent())}", red=True)

    def silent(self) -> list[str]:
        """Return the folders of the core in which no test passed."""
        return sorted(core_folders() - self.passed.keys())


def require_listed_paths() -> None:
    missing = [path for path in NEEDED_BY_PATH if not (TESTS / path).exists()]
    if missing:
        raise pytest.UsageError(f"NEEDED_BY_PATH in {__file__} lists what is not there: {', '.join(missing)}")


def extra_needed_by_path(path: Path) -> str | None:
    """Return the extra that a folder or a test file needs as a whole."""
    if not path.is_relative_to(TESTS):
        return None
    name = path.relative_to(TESTS).as_posix()
    listed = next((extra for listed, extra in NEEDED_BY_PATH.items() if f"{name}/".startswith(f"{listed}/")), None)
    if listed is None and path.suffix == ".py" and path.name.startswith("test_"):
        return next(
            (extra for library in top_imports(path) for extra in LIBRARIES if library in LIBRARIES[extra]), None
        )
    return listed


def top_imports(path: Path) -> Iterator[str]:
    """Yield the libraries that a file's top-level statements import."""
    for node in ast.parse(path.read_bytes()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name.split(".")[0] for name in names)


def extra_needed_by_item(item: pytest.Item) -> str | None:
    """Return the extra that one test needs by its marker or its fixtures."""
    marker = item.get_closest_marker("needs")
    if marker is not None:
        return str(marker.args[0])
    fixtures = getattr(item, "fixturenames", ())
    return next((extra for fixture, extra in NEEDED_BY_FIXTURE.items() if fixture in fixtures), None)


def test_files() -> list[Path]:
    return [path for path in sorted(TESTS.rglob("test_*.py")) if folder_of(path) not in OTHER_RUNS]


def folder_of(path: Path) -> str:
    """Return the folder below tests/ that holds a file, `tests` for a file at its top."""
    parts = path.relative_to(TESTS).parts
    return parts[0] if len(parts) > 1 else TESTS.name


def left_out_files() -> dict[str, str]:
    needed = {path.relative_to(TESTS).as_posix(): extra_needed_by_path(path) for path in test_files()}
    return {path: extra for path, extra in needed.items() if extra}


def core_folders() -> set[str]:
    return {folder_of(path) for path in test_files()} - NEEDED_BY_PATH.keys()
