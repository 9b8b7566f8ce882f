"""SKUs: the shipped facts load, and say what a GPU can multiply."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nvlm_deploy import sku
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.profile import load_profile, profile_folder
from nvlm_deploy.sku import load_sku, sku_names

CAPABILITIES = {
    "a100-80gb": "8.0",
    "b200": "10.0",
    "cpu": None,
    "h100-nvl-94gb": "9.0",
    "h100-sxm-80gb": "9.0",
    "h200-141gb": "9.0",
    "l40s": "8.9",
    "rtx-pro-6000": "12.0",
}


@pytest.mark.parametrize("name", sku_names())
def test_every_shipped_sku_loads_by_name_and_cites_its_source(name):
    loaded = load_sku(name)
    assert (loaded.name, loaded.compute_capability) == (name, CAPABILITIES[name])
    assert loaded.source


def test_fp8_begins_with_ada_and_bf16_with_ampere():
    assert [name for name in sku_names() if not load_sku(name).has_fp8] == ["a100-80gb", "cpu"]
    assert [name for name in sku_names() if not load_sku(name).has_bf16] == ["cpu"]


def test_capabilities_compare_as_numbers_not_as_text():
    assert load_sku("b200").capability > load_sku("h200-141gb").capability


def test_an_unknown_sku_lists_those_there_are():
    with pytest.raises(NvlmError, match="no SKU 'h100'") as refusal:
        load_sku("h100")
    assert "h100-sxm-80gb, h200-141gb, l40s" in (refusal.value.hint or "")


def test_a_path_is_not_a_sku():
    with pytest.raises(NvlmError, match="no SKU"):
        load_sku("../profiles/cpu")


def test_facts_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_sku("l40s").compute_capability = "9.0"


@pytest.mark.parametrize("profile", sorted(path.stem for path in profile_folder().glob("*.toml")))
def test_every_shipped_profile_names_a_shipped_sku(profile):
    assert load_profile(profile).sku in sku_names()


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        ('description = "x"\nsource = "y"\ncompute_capability = 8.9', "compute_capability: .*string"),
        ('description = "x"\nsource = "y"\ncompute_capability = "sm89"', "compute_capability: .*pattern"),
        ('description = "x"', "source: field required"),
        ('description = "x"\nsource = "y"\nmemory = 1', "memory: extra inputs are not permitted"),
        ("description = ", "is not TOML"),
    ],
)
def test_a_file_that_does_not_state_the_facts_is_refused_by_key(tmp_path, monkeypatch, content, telling):
    (tmp_path / "mine.toml").write_text(content)
    monkeypatch.setattr(sku, "sku_folder", lambda: tmp_path)
    with pytest.raises(NvlmError, match=rf"mine\.toml.*{telling}"):
        load_sku("mine")
