"""SKUs: the shipped facts load, and say what a GPU can multiply."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nvlm_deploy import sku
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.profile import load_profile, profile_names
from nvlm_deploy.sku import load_sku, sku_names
from nvlm_deploy.vision.tensorrt import RTX_TARGETS

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
    assert all(loaded.sources.values())


def test_fp8_begins_with_ada_and_bf16_with_ampere():
    assert [name for name in sku_names() if not load_sku(name).has_fp8] == ["a100-80gb", "cpu"]
    assert [name for name in sku_names() if not load_sku(name).has_bf16] == ["cpu"]


def test_every_gpu_states_what_a_plan_needs():
    for gpu in (load_sku(name) for name in sku_names() if name != "cpu"):
        assert gpu.visible_bytes
        assert gpu.bandwidth_gb_s
        assert gpu.price_usd_per_hour
        assert {"bf16", "fp16"} <= set(gpu.dense_tflops)


def test_what_the_marketing_calls_the_memory_is_more_than_what_is_visible():
    assert load_sku("h100-sxm-80gb").visible_bytes < 80 * 2**30
    assert load_sku("cpu").visible_bytes == 0


def test_tensorrt_rtx_is_listed_where_its_builder_has_a_target():
    listed = {name for name in sku_names() if "tensorrt_rtx" in load_sku(name).runtimes}
    assert listed == {name for name in sku_names() if load_sku(name).compute_capability in RTX_TARGETS}


def test_a_gpu_is_known_by_the_name_its_driver_gives_it():
    h200 = load_sku("h200-141gb")
    assert h200.is_gpu("NVIDIA H200", "9.0")
    assert not h200.is_gpu("NVIDIA H200 NVL", "9.0")
    assert not h200.is_gpu("NVIDIA H200", "10.0")


def test_a_card_of_another_bandwidth_is_not_claimed():
    """The A100's PCIe card: 1935 GB/s and a bridge for two."""
    a100 = load_sku("a100-80gb")
    assert a100.is_gpu("NVIDIA A100-SXM4-80GB", "8.0")
    assert not a100.is_gpu("NVIDIA A100 80GB PCIe", "8.0")


def test_of_three_cards_the_least_is_stated():
    """Server Edition 1597 GB/s, Workstation and Max-Q 1792; Max-Q 3511 sparse FP4 TOPS, the others more."""
    rtx = load_sku("rtx-pro-6000")
    assert rtx.bandwidth_gb_s == 1597
    assert rtx.dense_tflops == {"bf16": 438.9, "fp16": 438.9, "fp8": 877.7}
    assert rtx.dense_tflops["fp8"] == pytest.approx(3511 / 4, abs=0.1)
    for edition in ("Server", "Workstation", "Max-Q Workstation"):
        assert rtx.is_gpu(f"NVIDIA RTX PRO 6000 Blackwell {edition} Edition", "12.0")


# data sheets, dense: GB/s, BF16 and FP8 TFLOPS, GB/s of one GPU's link in both directions
DATA_SHEETS = {
    "a100-80gb": (2039, 312, None, 600),
    "b200": (7700, 2250, 4500, 1800),
    "h100-nvl-94gb": (3900, 1671 / 2, 3341 / 2, 600),
    "h100-sxm-80gb": (3350, 1979 / 2, 3958 / 2, 900),
    "h200-141gb": (4800, 1979 / 2, 3958 / 2, 900),
    "l40s": (864, 362.05, 733, 64),
    "rtx-pro-6000": (1597, 3511 / 8, 3511 / 4, 128),
}


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_speeds_are_those_of_the_data_sheets(name):
    gpu, (bandwidth, bf16, fp8, link) = load_sku(name), DATA_SHEETS[name]
    assert (gpu.bandwidth_gb_s, gpu.interconnect.gb_s) == (bandwidth, link)
    assert gpu.dense_tflops["bf16"] == gpu.dense_tflops["fp16"] == pytest.approx(bf16, rel=1e-3)
    assert gpu.dense_tflops.get("fp8") == (None if fp8 is None else pytest.approx(fp8, rel=1e-3))


def test_an_engine_depends_on_no_price():
    assert load_sku("l40s").build_facts == {"name": "l40s", "compute_capability": "8.9"}


def test_capabilities_compare_as_numbers_not_as_text():
    assert load_sku("b200").capability > load_sku("h200-141gb").capability


def test_an_unknown_sku_lists_those_there_are():
    with pytest.raises(NvlmError, match="no SKU 'h100'") as refusal:
        load_sku("h100")
    assert "h100-sxm-80gb, h200-141gb, l40s" in (refusal.value.hint or "")


def test_an_unknown_sku_is_answered_with_the_nearest_name():
    with pytest.raises(NvlmError, match=r"no SKU 'l40' \(did you mean 'l40s'\?\)"):
        load_sku("l40")


def test_a_path_is_not_a_sku():
    with pytest.raises(NvlmError, match="no SKU"):
        load_sku("../profiles/cpu")


def test_facts_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_sku("l40s").compute_capability = "9.0"


@pytest.mark.parametrize("profile", profile_names())
def test_every_shipped_profile_names_a_shipped_sku(profile):
    assert load_profile(profile).sku in sku_names()


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        ('description = "x"\ncompute_capability = 8.9\nsources = {a = "b"}', "compute_capability: .*string"),
        ('description = "x"\ncompute_capability = "sm89"\nsources = {a = "b"}', "compute_capability: .*pattern"),
        ('description = "x"', "sources: field required"),
        ('description = "x"\nmemory = 1\nsources = {a = "b"}', "memory: extra inputs are not permitted"),
        ('description = "x"\nvisible_gib = 80.0\nsources = {runtimes = "b"}', "no source for visible_gib"),
        ('description = "x"\nsources = {visible_gib = "b"}', "source of visible_gib"),
        (
            'description = "x"\ncompute_capability = "8.0"\ndense_tflops = {bf16 = 1.0, fp8 = 2.0}\n'
            'sources = {compute_capability = "y", dense_tflops = "y"}',
            "disagree on fp8",
        ),
        ("description = ", "is not TOML"),
    ],
)
def test_a_file_that_does_not_state_the_facts_is_refused_by_key(tmp_path, monkeypatch, content, telling):
    (tmp_path / "mine.toml").write_text(content)
    monkeypatch.setattr(sku, "sku_folder", lambda: tmp_path)
    with pytest.raises(NvlmError, match=rf"mine\.toml.*{telling}"):
        load_sku("mine")
