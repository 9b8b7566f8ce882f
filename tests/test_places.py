"""What a user names is missing, of another kind, or a broken link: each says what it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.places import require_file, require_folder


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for link in ("file", "folder", "gone"):
        (tmp_path / f"link-to-{link}").symlink_to(link)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "no checkpoint folder none"),
        ("file", "file is a file, not a folder"),
        ("file/below/it", "file is a file, not a folder"),
        ("link-to-file", "link-to-file is a file, not a folder"),
        ("link-to-gone", "link-to-gone is a link to gone, which does not exist"),
        ("pipe", "pipe is a pipe, not a folder"),
        ("/dev/null", "/dev/null is a device, not a folder"),
    ],
)
def test_what_is_no_folder_is_called_what_it_is(path: str, message: str) -> None:
    with pytest.raises(NvlmError) as failure:
        require_folder(Path(path), "checkpoint folder", hint="fetch it")
    assert failure.value.message == message
    assert failure.value.hint == ("fetch it" if path == "none" else None), "a hint belongs where its cause is known"


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "no key none"),
        ("folder", "folder is a folder, not a file"),
        ("link-to-folder", "link-to-folder is a folder, not a file"),
        ("pipe", "pipe is a pipe, not a file"),
    ],
)
def test_what_is_no_file_is_called_what_it_is(path: str, message: str) -> None:
    with pytest.raises(NvlmError) as failure:
        require_file(Path(path), "key")
    assert failure.value.message == message


@pytest.mark.usefixtures("things")
def test_what_is_right_passes_also_behind_a_link() -> None:
    for name in ("folder", "link-to-folder", "."):
        require_folder(Path(name))
    for name in ("file", "link-to-file"):
        require_file(Path(name))
