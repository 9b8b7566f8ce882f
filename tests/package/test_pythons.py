"""`make` finds a Python that fits, says within a second which is needed, and never mixes two in one environment."""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nvlm_deploy.errors import MachineError
from nvlm_deploy.triton.installation import libpython_folder

REPOSITORY = Path(__file__).parents[2]
CHOOSE, MAKE_VENV = REPOSITORY / "tools/choose_python.sh", REPOSITORY / "tools/make_venv.sh"
FITTING = "3.11 3.12"
COMMANDS = (
    "sh",
    "make",
    "awk",
    "sed",
    "cut",
    "tr",
    "ls",
    "cat",
    "head",
    "readlink",
    "uname",
    "rm",
    "mkdir",
    "dirname",
    "cp",
)

# Answers as a Python of another version would. `-m venv FOLDER` makes a folder with itself as its Python.
FAKE = """#!/bin/sh
if [ "$1" = -m ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && exit; fi
exec {python} -I -c '
import os, sys
minor = {minor}
sys.version_info = (3, minor, 1, "final", 0)
sys.version = "3.%d.1 (fake)" % minor
sys.executable = sys.argv[1]
import sysconfig
os.path.exists = lambda path, real=os.path.exists: {libpython} if "libpython" in str(path) else real(path)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, real=real: real(name) if {venv} or name != "ensurepip" else None
code = sys.argv[3]
sys.argv = ["-c", *sys.argv[4:]]
exec(code)
' "$0" "$@"
"""


class Machine:
    """A PATH, a home with pyenv and uv in it, and fake Pythons wherever they are put."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.pyenv, self.uv = folder / "home/.pyenv", folder / "home/.local/share/uv/python"
        self.path = [self.bin, folder / "tools"]
        self.path[1].mkdir(parents=True)
        for name in COMMANDS:
            (self.path[1] / name).symlink_to(str(shutil.which(name)))

    def python(self, place: Path, minor: int, *, libpython: bool = True, venv: bool = True) -> Path:
        """Put a Python 3.`minor` at `place`."""
        return script(place, FAKE.format(python=sys.executable, minor=minor, libpython=libpython, venv=venv))

    def run(self, command: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(self.folder / "home"), "PATH": os.pathsep.join(map(str, self.path)), **changes}
        return subprocess.run(
            [command, *arguments], env=environment, cwd=self.folder, capture_output=True, text=True, check=False
        )

    def choose(self, *asked: str, purpose: str = "server", versions: str = FITTING) -> Path:
        answer = self.run(CHOOSE, purpose, versions, *asked)
        assert answer.returncode == 0, answer.stderr
        return Path(answer.stdout.strip())

    def refusal(self, *asked: str, purpose: str = "server", versions: str = FITTING) -> str:
        answer = self.run(CHOOSE, purpose, versions, *asked)
        assert (answer.returncode, answer.stdout) == (1, "")
        return answer.stderr

    def venv(self, *asked: str, versions: str = FITTING) -> subprocess.CompletedProcess[str]:
        return self.run(MAKE_VENV, ".venv", "server", versions, *asked)


def script(place: Path, text: str) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    place.chmod(place.stat().st_mode | stat.S_IXUSR)
    return place


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def places(machine: Machine, minor: int) -> dict[str, Path]:
    return {
        "PATH": machine.bin / f"python3.{minor}",
        "pyenv": machine.pyenv / f"versions/3.{minor}.1/bin/python3",
        "uv": machine.uv / f"cpython-3.{minor}.1-linux-x86_64-gnu/bin/python3",
    }


@pytest.mark.parametrize("minors", [(10,), (13,), (10, 13, 14), (11,), (12,), (11, 12), (12, 13)])
@pytest.mark.parametrize("where", ["PATH", "pyenv", "uv"])
def test_of_those_that_fit_the_preferred_is_taken_wherever_it_lies(machine: Machine, minors, where: str) -> None:
    pythons = {minor: machine.python(places(machine, minor)[where], minor) for minor in minors}
    fitting = [pythons[minor] for minor in (11, 12) if minor in pythons]
    if fitting:
        assert machine.choose() == fitting[0]
    else:
        text = machine.refusal()
        assert "Python 3.11 or 3.12" in text
        assert all(f"3.{minor}.1 " in text and str(pythons[minor]) in text for minor in minors)


@pytest.mark.parametrize("name", ["python3", "python"])
def test_a_python_without_its_version_in_its_name_is_found(machine: Machine, name: str) -> None:
    python = machine.python(machine.bin / name, 12)
    assert machine.choose() == python


def test_with_none_that_fits_it_says_within_a_second_what_to_do(machine: Machine) -> None:
    machine.python(machine.bin / "python3", 13)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = machine.run(Path("make"), "-C", str(REPOSITORY), "demo", f"VENV={machine.folder / '.venv'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert answer.returncode == 2
    for word in ("3.13.1", "Python 3.11 or 3.12", "apt-get install python3.11", "uv python install", "pyenv install"):
        assert word in answer.stderr
    assert not (machine.folder / ".venv").exists()


def test_a_machine_without_any_python_is_told_so(machine: Machine) -> None:
    assert "none at all" in machine.refusal()


def test_what_a_python_of_the_right_version_lacks_is_named_and_another_is_taken(machine: Machine) -> None:
    machine.python(machine.bin / "python3.11", 11, venv=False)
    machine.python(machine.bin / "python3.12", 12, libpython=False)
    script(machine.bin / "python3", "#!/bin/sh\nexit 127\n")
    text = machine.refusal()
    assert "apt-get install python3.11-venv" in text
    assert "no libpython3.12.so.1.0: apt-get install libpython3.12" in text
    assert "bin/python3: does not run" in text
    good = machine.python(places(machine, 12)["uv"], 12)
    assert machine.choose() == good


def test_the_core_needs_no_libpython(machine: Machine) -> None:
    python = machine.python(machine.bin / "python3.13", 13, libpython=False)
    assert machine.choose(purpose="core", versions="3.11 3.12 3.13") == python


@pytest.fixture
def pyenv(machine: Machine) -> Machine:
    """A machine with pyenv in front: 3.10 is enabled, 3.12 is installed, and both have shims."""
    for minor in (10, 12):
        machine.python(places(machine, minor)["pyenv"], minor)
    for name in ("python3", "python3.10", "python3.12"):
        script(machine.pyenv / "shims" / name, "#!/bin/sh\necho command not found >&2\nexit 127\n")
    (machine.pyenv / "version").write_text("3.10.1\n")
    machine.path.insert(0, machine.pyenv / "shims")
    return machine


@pytest.mark.parametrize("asked", [(), ("3.12",), ("python3.12",), ("3.12.1",)])
def test_a_shim_of_a_version_that_is_not_enabled_is_no_obstacle(pyenv: Machine, asked: tuple[str, ...]) -> None:
    assert pyenv.choose(*asked) == places(pyenv, 12)["pyenv"]


def test_what_pyenv_has_enabled_comes_before_what_is_behind_it_on_the_path(pyenv: Machine) -> None:
    behind = pyenv.python(pyenv.bin / "python3.12", 12)
    assert pyenv.choose() == behind
    (pyenv.pyenv / "version").write_text("3.12.1\n")
    assert pyenv.choose() == places(pyenv, 12)["pyenv"]


@pytest.mark.parametrize("asked", ["3.12", "python3.12", "3.12.1", "PATH", "other"])
def test_the_python_asked_for_is_taken_by_version_by_command_and_by_path(machine: Machine, asked: str) -> None:
    machine.python(machine.bin / "python3.11", 11)
    python = machine.python(machine.bin / "python3.12", 12)
    shutil.copy(python, machine.bin / "other")
    wanted = machine.bin / "other" if asked == "other" else python
    assert machine.choose(str(python) if asked == "PATH" else asked) == wanted


@pytest.mark.parametrize("asked", ["3.13", "python3.13", "3.12.9", "nowhere/python", "3.10"])
def test_where_the_one_asked_for_does_not_fit_no_other_is_taken(machine: Machine, asked: str) -> None:
    machine.python(machine.bin / "python3.11", 11)
    machine.python(machine.bin / "python3.13", 13)
    assert f"PYTHON asks for {asked}" in machine.refusal(asked)


def test_libpython_is_looked_for_where_the_server_looks_for_it() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    answer = subprocess.run([CHOOSE, "server", version, sys.executable], capture_output=True, text=True, check=False)
    try:
        libpython_folder(version)
    except MachineError:
        assert "no libpython" in answer.stderr
    else:
        assert answer.returncode == 0, answer.stderr


def version_in(machine: Machine) -> str:
    answer = machine.run(machine.folder / ".venv/bin/python", "-c", "import sys; print(sys.version_info[1])")
    return answer.stdout.strip()


@pytest.fixture
def made(machine: Machine) -> Machine:
    """An environment of 3.11, with something installed in it, where 3.12 is there too."""
    for minor in (11, 12):
        machine.python(machine.bin / f"python3.{minor}", minor)
    assert machine.venv().returncode == 0
    assert version_in(machine) == "11"
    (machine.folder / ".venv/installed").touch()
    return machine


def installed(machine: Machine) -> bool:
    return (machine.folder / ".venv/installed").exists()


@pytest.mark.parametrize("asked", [(), ("3.11",), ("python3.11",)])
def test_an_environment_is_kept_for_the_python_it_was_made_with(made: Machine, asked: tuple[str, ...]) -> None:
    mark = made.folder / ".venv/.python"
    before = mark.stat().st_mtime_ns
    assert made.venv(*asked).returncode == 0
    assert mark.stat().st_mtime_ns == before  # or make would install all again
    assert installed(made)


def test_another_python_makes_an_environment_anew_and_it_stays(made: Machine) -> None:
    assert "removing .venv" in made.venv("3.12").stderr
    assert (version_in(made), installed(made)) == ("12", False)
    (made.folder / ".venv/installed").touch()
    assert made.venv().returncode == 0
    assert (version_in(made), installed(made)) == ("12", True)


def test_one_that_does_not_fit_is_asked_for_in_vain_and_the_environment_stays(made: Machine) -> None:
    assert made.venv("3.13").returncode == 1
    assert installed(made)


def no_python(machine: Machine) -> None:
    (machine.folder / ".venv/bin/python").unlink()


def unfinished(machine: Machine) -> None:
    (machine.folder / ".venv/.python").write_text("")


def carried(machine: Machine) -> None:
    mark = machine.folder / ".venv/.python"
    mark.write_text(mark.read_text().replace(str(machine.folder), "/elsewhere"))


def of_another_version(machine: Machine) -> None:
    machine.python(machine.folder / ".venv/bin/python", 12)


@pytest.mark.parametrize("damage", [no_python, unfinished, carried, of_another_version])
def test_a_broken_unfinished_or_carried_environment_is_made_anew(made: Machine, damage) -> None:
    damage(made)
    assert made.venv().returncode == 0
    assert (version_in(made), installed(made)) == ("11", False)


def test_an_environment_of_an_older_makefile_is_taken_over(made: Machine) -> None:
    (made.folder / ".venv/.python").unlink()
    (made.folder / ".venv/.setup-run").touch()
    assert made.venv().returncode == 0
    assert installed(made)
    assert made.venv("3.12").returncode == 0
    assert version_in(made) == "12"


def test_a_folder_that_make_did_not_make_is_used_where_it_fits_and_never_removed(machine: Machine) -> None:
    machine.python(machine.bin / "python3.11", 11)
    machine.python(machine.folder / ".venv/bin/python", 12)
    (machine.folder / ".venv/installed").touch()
    machine.python(machine.bin / "python3.12", 12)
    assert machine.venv().returncode == 0
    assert machine.venv("3.12").returncode == 0
    for asked in [("3.11",), ("python3.11",)]:
        answer = machine.venv(*asked)
        assert (answer.returncode, installed(machine), version_in(machine)) == (1, True, "12")
        assert "move it away" in answer.stderr
    machine.python(machine.folder / ".venv/bin/python", 13)
    assert (machine.venv().returncode, installed(machine)) == (1, True)


def requirements() -> Iterator[tuple[str, Requirement]]:
    """Each requirement with its extra, `core` for those without one."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for extra, texts in {"core": project["dependencies"], **project["optional-dependencies"]}.items():
        yield from ((extra, Requirement(text)) for text in texts)


def test_only_the_bundled_server_keeps_numpy_below_2() -> None:
    bounds = {extra: requirement.specifier for extra, requirement in requirements() if requirement.name == "numpy"}
    assert {extra for extra, bound in bounds.items() if "2.4.6" not in bound} == {"serve"}
    assert all("1.26.4" in bound for bound in bounds.values())


def test_numpy_is_pinned_for_the_core_and_left_to_the_server_otherwise() -> None:
    pins = {path: re.findall(r"(?m)^numpy.*$", (REPOSITORY / path).read_text()) for path in
            ("constraints.txt", "constraints-core.txt")}  # fmt: skip
    assert pins["constraints.txt"] == []
    (pin,) = pins["constraints-core.txt"]
    assert pin.startswith("numpy==2.")


def test_the_pythons_of_the_makefile_are_those_of_the_package() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    listed = {name: value.split() for name, value in re.findall(r"(?m)^(\w+_PYTHONS) := (.*)$", makefile)}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    classifiers = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if "Python ::" in line]
    assert listed["CORE_PYTHONS"] == classifiers
    assert set(listed["SERVER_PYTHONS"]) < set(classifiers)
    assert project["requires-python"] == f">={classifiers[0]}"
