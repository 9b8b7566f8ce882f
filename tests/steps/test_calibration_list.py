"""A calibration list that would spoil hours of work, or that no server would take, is refused by its line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.profile import CalibrationChoice, Profile, load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.sample_embeddings import tiles_of_pictures
from nvlm_deploy.steps.calibration_list import require_whole_pictures
from nvlm_deploy.steps.order import pipeline_of

GOOD = {"question": "How many?", "answer": "3"}


def profile(**decoder: object) -> Profile:
    cpu = load_profile("cpu")
    changes = {"name": "mine", "calibration": CalibrationChoice(samples=3)}
    return cpu.model_copy(update={**changes, "decoder": cpu.decoder.model_copy(update=decoder)})


def list_of(folder: Path, *lines: dict[str, Any]) -> Path:
    """An empty line comes first, and a picture lies beside the list."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.jpg", quality=95)
    (folder / "samples.jsonl").write_text("\n" + "".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("line", "words", "mend"),
    [
        (
            GOOD | {"question": "Why? " * 1100},
            "tokens with the answer, profile 'mine' serves at most 1,024",
            "max_seq_len",
        ),
        (
            GOOD | {"answer": "no " * 1100},
            "tokens with the answer, profile 'mine' serves at most 1,024",
            "2,048 positions",
        ),
        (GOOD | {"images": ["a.jpg"] * 17}, "17 images, profile 'mine' serves at most 16 a request", "max_images"),
        (GOOD | {"images": ["a.jpg"], "question": "<image><image>"}, "2 <image> placeholder(s)", "once per image"),
        (GOOD | {"images": ["text.png"]}, "text.png: not an image", "replace it by a whole JPEG"),
        (GOOD | {"images": ["none.png"]}, "no image", "put it there"),
        (GOOD | {"answer": 3}, "answer: Input should be a valid string", "mend its line"),
    ],
    ids=["long question", "long answer", "images", "placeholders", "no picture", "missing", "type"],
)
def test_a_sample_that_no_server_would_take_is_named_by_list_and_line(
    tiny_folder: Path, tmp_path: Path, line: dict[str, Any], words: str, mend: str
) -> None:
    folder = list_of(tmp_path / "list", GOOD, line)
    (folder / "text.png").write_text("no picture")
    with pytest.raises(NvlmError) as refusal:
        pipeline_of(Recipe(tiny_folder, profile(), tmp_path / "work", folder), "calibrate-llm", dry_run=True)
    assert refusal.value.exit_code == 2
    assert refusal.value.message.startswith(f"{folder / 'samples.jsonl'} line 3: ")
    assert words in refusal.value.message
    assert mend in (refusal.value.hint or "")
    assert not (tmp_path / "work").exists()


def test_a_sample_that_just_fits_is_taken(tiny_folder: Path, tmp_path: Path) -> None:
    """As long as the profile allows, by one token more it would be too long."""
    folder = list_of(tmp_path / "list", GOOD | {"images": ["a.jpg"], "question": "Why? " * 60})
    with pytest.raises(NvlmError, match="serves at most 130") as refusal:
        pipeline_of(Recipe(tiny_folder, profile(max_seq_len=130), tmp_path, folder), "calibrate-llm", dry_run=True)
    tokens = int(refusal.value.message.split("line 2: ")[1].split(" ")[0].replace(",", ""))
    fits, too_long = profile(max_seq_len=tokens), profile(max_seq_len=tokens - 1)
    pipeline_of(Recipe(tiny_folder, fits, tmp_path, folder), "calibrate-llm", dry_run=True)
    with pytest.raises(NvlmError, match=f"serves at most {tokens - 1}"):
        pipeline_of(Recipe(tiny_folder, too_long, tmp_path, folder), "calibrate-llm", dry_run=True)


@pytest.mark.parametrize("reader", ["decoder", "encoder"])
def test_a_picture_that_is_cut_off_is_found_before_the_first_is_encoded(
    tiny_folder: Path, tmp_path: Path, reader: str
) -> None:
    folder = list_of(tmp_path / "list", GOOD | {"images": ["a.jpg"]}, GOOD | {"images": ["a.jpg", "cut.jpg"]})
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:-400])
    recipe = Recipe(tiny_folder, profile(), tmp_path, folder)
    with pytest.raises(NvlmError, match=r"samples\.jsonl line 3: .*cut\.jpg: the image is damaged") as refusal:
        if reader == "decoder":
            require_whole_pictures(recipe.placed_samples(), recipe.profile.serving.image_reading)
        else:
            tiles_of_pictures(recipe.placed_samples(), recipe.spec.tiling)
    assert "replace it" in (refusal.value.hint or "")


def test_a_list_shorter_than_the_profile_asks_is_said(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = Recipe(tiny_folder, profile(), tmp_path, list_of(tmp_path / "short", GOOD))
    with caplog.at_level(logging.WARNING):
        pipeline_of(short, "calibrate-llm", dry_run=True)
    assert "line 2 is the last of 1 samples, profile 'mine' asks for 3" in caplog.text
    caplog.clear()
    full = Recipe(tiny_folder, profile(), tmp_path, list_of(tmp_path / "full", GOOD, GOOD, GOOD))
    with caplog.at_level(logging.WARNING):
        pipeline_of(full, "calibrate-llm", dry_run=True)
    assert not caplog.text
