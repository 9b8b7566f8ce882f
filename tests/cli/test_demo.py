"""The parts of `nvlm demo` that need no server; the whole run is tests/bench/bench_demo.py."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from nvlm_deploy.cli.demo import Screen
from nvlm_deploy.cli.main import run
from nvlm_deploy.demo import Assets
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.samples import Sample


def test_the_example_is_the_bundled_picture_and_its_answer_has_a_digit_per_tile() -> None:
    from nvlm_deploy.image_file.opening import open_image

    example = Assets.of_checkout().example()
    assert open_image(example.images[0].read_bytes()).width * 2 == open_image(example.images[0].read_bytes()).height * 3
    assert len(example.answer.split()) == 3 * 2


def test_a_folder_without_the_bundled_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(NvlmError, match=r"example\.png"):
        Assets(tmp_path, tmp_path, tmp_path).example()


def test_the_answer_is_shown_as_it_streams_beside_the_right_one(tmp_path: Path) -> None:
    output = io.StringIO()
    screen = Screen(output)
    screen.on_example(Sample(question="Read all.", answer="3 1", images=(tmp_path / "example.png",)))
    for piece in ("3", " ", "7"):
        screen.on_piece(piece)
    screen.on_example_end()
    assert output.getvalue().endswith("Read all.\n  FP8 answers: 3 7\n  right is:    3 1\n")


def test_an_installed_package_without_its_checkout_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nvlm_deploy.demo.__file__", str(tmp_path / "site-packages" / "nvlm_deploy" / "demo.py"))
    with pytest.raises(SystemExit) as ended:
        run(["demo", "--workspace", str(tmp_path / "workspace")])
    assert ended.value.code == 2
    assert "checkout" in capsys.readouterr().err
    assert not (tmp_path / "workspace").exists()
