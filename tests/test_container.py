"""Commands for a container: whatever a folder is called, a shell reads back its name, and paths map by the mounts."""

from __future__ import annotations

import csv
import itertools
import shlex
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_deploy.container import Container, Mount, Package, folder_mount

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


def mounted(container: Container) -> dict[str, str]:
    """By the place inside, what docker would mount there, as it parses its own options."""
    words, found = shlex.split(container.start()), {}
    for option, value in itertools.pairwise(words):
        if option == "-v":
            host, inside = value.split(":")[:2]
            found[inside] = host
        if option == "--mount":
            fields = dict(field.split("=", 1) for field in next(csv.reader([value])) if "=" in field)
            found[fields["target"]] = fields["source"]
    return found


@given(NAMES, NAMES)
def test_a_folder_of_any_name_is_mounted_and_found_inside(parent: str, name: str) -> None:
    host = Path("/data") / parent
    container = Container("image:1", (Mount(host, PurePosixPath("/workspace"), is_writable=True),))
    assert container.inside(host / name) == PurePosixPath("/workspace") / name
    if "\n" not in parent and "\r" not in parent:  # csv's lines; docker's own reader takes one line too
        assert mounted(container) == {"/workspace": str(host)}


def test_the_nearest_mount_wins_and_a_writable_one_among_equals() -> None:
    data, below = Path("/data"), Path("/data/model")
    container = Container(
        "image:1",
        (
            Mount(data, PurePosixPath("/source")),
            Mount(data, PurePosixPath("/workspace"), is_writable=True),
            Mount(below, PurePosixPath("/checkpoint")),
        ),
    )
    assert str(container.inside(below / "config.json")) == "/checkpoint/config.json"
    assert str(container.inside(data / "engines")) == "/workspace/engines"
    with pytest.raises(ValueError, match="in no mount"):
        container.inside(Path("/elsewhere"))


def test_a_download_cache_is_mounted_with_what_its_links_lead_to(tmp_path: Path) -> None:
    """As Hugging Face's: snapshots/REVISION/file -> ../../blobs/DIGEST."""
    (tmp_path / "hub/blobs").mkdir(parents=True)
    (tmp_path / "hub/blobs/abc").write_text("{}")
    snapshot = tmp_path / "hub/snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    container = Container("image:1", (folder_mount(snapshot, "/checkpoint", snapshot.iterdir()),))
    assert mounted(container) == {"/checkpoint": str(tmp_path / "hub")}
    assert str(container.inside(snapshot)) == "/checkpoint/snapshots/main"


def test_a_folder_of_files_is_mounted_by_itself(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").symlink_to("a")
    assert folder_mount(tmp_path, "/checkpoint", tmp_path.iterdir()).host == tmp_path


def test_without_a_checkout_the_package_comes_from_the_index_and_a_program_by_itself(tmp_path: Path) -> None:
    program = tmp_path / "engine_one_rank.py"
    installed = Package(None)
    assert installed.install("onnx").startswith("python3 -m pip install nvlm-deploy==")
    container = Container("image:1", installed.mounts_for(program))
    assert str(container.inside(program)) == "/nvlm-deploy/engine_one_rank.py"
    assert Package.here().mounts[0].host == Path(__file__).parents[1]
