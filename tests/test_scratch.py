"""Scratch folders vanish with their owner, at the latest when the next one is made; nobody else's is touched."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_deploy.errors import MachineError
from nvlm_deploy.scratch import OWNER, scratch_folder

HOLD = """
import sys, time
from nvlm_deploy.scratch import scratch_folder
with scratch_folder("test") as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has a scratch folder."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    assert Path(child.stdout.readline().strip(), "file").is_file()
    yield child
    child.kill()
    child.wait()


def test_it_is_empty_and_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder("test") as folder:
        assert [*folder.iterdir()] == []
        (folder / "below").mkdir()
    assert [*tmp_path.iterdir()] == []


def test_it_is_gone_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch_folder("test"):
        raise ZeroDivisionError
    assert [*tmp_path.iterdir()] == []


def test_what_a_killed_process_left_is_removed_by_the_next(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert len([*tmp_path.iterdir()]) == 1
    with scratch_folder("other") as folder:
        assert [*tmp_path.iterdir()] == [folder.parent]


@pytest.mark.usefixtures("owner")
def test_a_living_process_keeps_its_own(tmp_path: Path) -> None:
    (before,) = tmp_path.iterdir()
    with scratch_folder("test"):
        pass
    assert [*tmp_path.iterdir()] == [before]
    assert (before / "content" / "file").is_file()


def test_a_stopped_process_keeps_its_own(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    owner.send_signal(signal.SIGSTOP)
    with scratch_folder("test"):
        pass
    assert len([*tmp_path.iterdir()]) == 1


def test_folders_within_one_process_do_not_remove_each_other(tmp_path: Path) -> None:
    with scratch_folder("test") as one, scratch_folder("test") as other:
        assert one.is_dir()
        assert other.is_dir()
        assert len([*tmp_path.iterdir()]) == 2


def abandoned(folder: Path) -> Path:
    (folder / "content").mkdir(parents=True)
    (folder / OWNER).touch()
    return folder


def test_another_users_folder_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = abandoned(tmp_path / "nvlm-triton-theirs")
    monkeypatch.setattr(os, "getuid", lambda: theirs.stat().st_uid + 1)
    with scratch_folder("test"):
        pass
    assert theirs.is_dir()


def test_a_folder_that_does_not_say_its_owner_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "nvlm-notes").mkdir()
    (tmp_path / "nvlm-file").touch()
    with scratch_folder("test"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"nvlm-notes", "nvlm-file"}


def test_a_folder_behind_a_link_is_not_touched(tmp_path: Path) -> None:
    elsewhere = abandoned(tmp_path / "elsewhere")
    (tmp_path / "nvlm-link").symlink_to(elsewhere)
    linked_owner = tmp_path / "nvlm-linked-owner"
    linked_owner.mkdir()
    (linked_owner / OWNER).symlink_to(elsewhere / OWNER)
    with scratch_folder("test"):
        pass
    assert elsewhere.is_dir()
    assert linked_owner.is_dir()


def test_an_abandoned_folder_is_removed_as_set_up_by_these_tests(tmp_path: Path) -> None:
    abandoned(tmp_path / "nvlm-triton-old")
    with scratch_folder("test"):
        pass
    assert [*tmp_path.iterdir()] == []


def test_a_full_temporary_directory_is_named_and_not_the_file_that_was_copied(tmp_path: Path) -> None:
    full = pytest.raises(MachineError, match=f"temporary directory {tmp_path} is full")
    with full as failure, scratch_folder("test") as folder:
        raise OSError(errno.ENOSPC, "No space left", "/usr/lib/source.so", None, str(folder / "source.so"))
    assert "TMPDIR" in (failure.value.hint or "")


@pytest.mark.parametrize("names", [("/elsewhere/file",), ("/elsewhere/source", None, "/elsewhere/target"), ()])
def test_a_disk_that_is_full_elsewhere_is_not_blamed_on_it(names: tuple[str, ...]) -> None:
    with pytest.raises(OSError, match="No space left") as failure, scratch_folder("test"):
        raise OSError(errno.ENOSPC, "No space left", *names)
    assert not isinstance(failure.value, MachineError)


def test_no_place_at_all_says_how_to_choose_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(MachineError, match="no temporary folder can be made") as failure, scratch_folder("test"):
        pass
    assert "TMPDIR" in (failure.value.hint or "")


FILL = """
import sys
from nvlm_deploy.cli.main import run
from nvlm_deploy.scratch import scratch_folder
from nvlm_deploy.cli import main
def verb():
    with scratch_folder("test") as folder:
        (folder / "file").write_bytes(bytes(4 * 2**20))
main.app.command(name="fill")(verb)
run(["fill"])
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="needs `unshare -rm` for a small disk of its own",
)
def test_a_small_disk_that_is_really_full_is_named(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=2m tmpfs {tmp_path}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && TMPDIR={tmp_path} "$0" -c "$1"', sys.executable, FILL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert f"the temporary directory {tmp_path} is full" in " ".join(done.stderr.split())
