"""Profiles: shipped ones load, mistakes are named by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import ImageLimits
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.profile import load_profile, profile_folder, profile_names
from nvlm_deploy.recipe import Recipe

SHIPPED = profile_names()


@pytest.fixture
def text() -> str:
    return (profile_folder() / "cpu.toml").read_text()


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.toml").write_text(text)
    return str(tmp_path / "mine.toml")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_loads_by_name(name):
    assert load_profile(name).name == name


def test_the_cpu_profile_is_fp8_on_the_reference_runtime():
    profile = load_profile("cpu")
    assert (profile.vision.runtime, profile.decoder.runtime, profile.decoder.quantization) == (
        "onnxruntime",
        "reference",
        "fp8",
    )


def test_a_profile_of_ones_own_is_named_after_its_file(tmp_path, text):
    assert load_profile(written(tmp_path, text)).name == "mine"


def test_an_unknown_profile_lists_those_there_are():
    with pytest.raises(NvlmError, match="no profile 'gpu'") as refusal:
        load_profile("gpu")
    assert "cpu" in (refusal.value.hint or "")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("h200", "h200-141gb-latency"), ("b200-throghput", "b200-throughput"), ("cpubf16", "cpu-bf16"), ("CPU", None)],
)
def test_an_unknown_profile_is_answered_with_the_nearest_name(name, nearest):
    with pytest.raises(NvlmError, match=f"no profile '{name}'") as refusal:
        load_profile(name)
    meant = f"did you mean '{nearest}'?"
    assert (meant in refusal.value.message) if nearest else ("did you mean" not in refusal.value.message)
    assert all(other in (refusal.value.hint or "") for other in SHIPPED)


@pytest.mark.parametrize("key", ["max_batch_size", "max_seq_len"])
def test_a_number_that_no_engine_has_is_refused_by_name(tmp_path, text, key):
    line = next(line for line in text.splitlines() if line.startswith(key))
    with pytest.raises(NvlmError, match=rf"decoder\.{key} is 1000.*less than or equal"):
        load_profile(written(tmp_path, text.replace(line, f"{key} = 1{'0' * 30}")))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NvlmError, match=r"no profile file .*nowhere\.toml"):
        load_profile(str(tmp_path / "nowhere.toml"))


def test_an_unknown_key_is_named_with_the_nearest_that_exists(tmp_path, text):
    path = written(tmp_path, text.replace("quantization", "quantisation"))
    with pytest.raises(NvlmError, match=r"unknown key 'decoder\.quantisation' \(did you mean 'quantization'\?\)"):
        load_profile(path)


def test_an_unknown_section_is_named_with_the_nearest_that_exists(tmp_path, text):
    with pytest.raises(NvlmError, match=r"unknown key 'decodr' \(did you mean 'decoder'\?\)"):
        load_profile(written(tmp_path, text.replace("[decoder]", "[decodr]")))


def test_an_unknown_key_that_resembles_nothing_lists_what_there_is(tmp_path, text):
    with pytest.raises(NvlmError, match=r"unknown key 'vision\.zzz' \(there are: runtime, precision, weight_scales"):
        load_profile(written(tmp_path, text.replace("[vision]", "[vision]\nzzz = 1")))


def test_a_missing_key_is_named(tmp_path, text):
    with pytest.raises(NvlmError, match=r"key 'decoder\.max_batch_size' is missing"):
        load_profile(written(tmp_path, text.replace("max_batch_size = 8", "")))


@pytest.mark.parametrize(
    ("before", "after", "telling"),
    [
        ("max_batch_size = 8", "max_batch_size = 0", r"decoder\.max_batch_size is 0: .*greater than 0"),
        ("max_batch_size = 8", 'max_batch_size = "many"', r"decoder\.max_batch_size is 'many'"),
        ('precision = "fp32"', 'precision = "fp4"', r"vision\.precision is 'fp4'"),
        ('wrapper = "chat"', 'wrapper = "llama"', r"serving\.wrapper is 'llama'.*'chat_template'"),
        ('wrapper = "chat"', 'images = "sideways"', r"serving\.images is 'sideways'.*'as_viewed' or 'reference'"),
        ('wrapper = "chat"', 'image_background = "whit"', r"serving\.image_background is 'whit': .*no opaque colour"),
        ('wrapper = "chat"', "max_image_pixels = 179_000_000", r"max_image_pixels is 179000000: .*equal to 178000000"),
        ('wrapper = "chat"', "max_image_bytes = 0", r"serving\.max_image_bytes is 0: .*greater than 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(tmp_path, text, before, after, telling):
    assert before in text
    with pytest.raises(NvlmError, match=telling):
        load_profile(written(tmp_path, text.replace(before, after)))


def test_several_mistakes_are_named_at_once(tmp_path, text):
    wrong = text.replace("max_seq_len", "max_sequence_len").replace("samples = 64", "samples = -1")
    with pytest.raises(NvlmError, match=r"max_sequence_len.*samples is -1"):
        load_profile(written(tmp_path, wrong))


@pytest.mark.parametrize("content", ["decoder = [", "\x00", '"unclosed'])
def test_a_file_that_is_not_toml_is_refused(tmp_path, content):
    with pytest.raises(NvlmError, match="is not TOML"):
        load_profile(written(tmp_path, content))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"description = '\xff'")
    with pytest.raises(NvlmError, match="is not TOML"):
        load_profile(str(tmp_path / "mine.toml"))


def test_the_choices_of_images_are_one_reading(tmp_path, text):
    keys = 'images = "reference"\nimage_background = "#102030"\nmax_image_bytes = 5\nmax_image_pixels = 6'
    reading = load_profile(
        written(tmp_path, text.replace('wrapper = "chat"', keys + "\nmax_request_pixels = 7"))
    ).serving.image_reading
    assert reading == ImageReading("reference", "#102030", ImageLimits(5, 6, 7))


def test_calibration_depends_on_how_images_are_read_and_not_on_their_limits(tmp_path, text):
    def settings(*keys: str) -> dict[str, object]:
        profile = load_profile(written(tmp_path, text.replace('wrapper = "chat"', "\n".join(keys))))
        return Recipe(tmp_path, profile, tmp_path).calibration_settings()

    assert settings("max_image_bytes = 5") == settings()
    assert settings('images = "reference"') != settings()
    assert settings('image_background = "black"') != settings()
