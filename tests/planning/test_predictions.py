"""Seconds: against published rows, against the fact sheet's arithmetic, and in the right direction."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from nvlm_deploy.planning.anchors import ANCHORS, TPOT, TTFT, halves
from nvlm_deploy.planning.plan import make_plan
from nvlm_deploy.planning.roofline import EFFICIENCY, SplitDecoder, encoder_flops, encoder_s, has_nvlink, link_gb_s
from nvlm_deploy.planning.serving import Demand, Workload, predict
from nvlm_deploy.profile import load_profile
from nvlm_deploy.report.planning_json import TESTED_ERROR
from nvlm_deploy.sku import load_sku

ROOT = Path(__file__).parents[2]
HOST = 64 << 30


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_predictions", ROOT / "tests/bench/bench_predictions.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_predictions"] = module
    spec.loader.exec_module(module)
    return module


def test_half_of_the_rows_is_fitted_and_the_median_error_of_the_other_is_small(bench):
    fit, test = halves(ANCHORS)
    assert len(fit) + len(test) == len(ANCHORS)
    assert not set(fit) & set(test)
    assert bench.median_error(fit) < 0.25
    assert bench.median_error(test) < 0.25
    assert f"{bench.median_error(test):.0%}".replace("%", " %") == TESTED_ERROR


def test_both_halves_have_rows_of_every_gpu_and_of_every_quantity():
    fit, test = halves(ANCHORS)
    for kind in (lambda row: row.setup.sku, lambda row: row.quantity, lambda row: row.setup.source):
        assert {kind(row) for row in fit} == {kind(row) for row in test} == {kind(row) for row in ANCHORS}


def test_tables_of_two_gpus_are_halved_gpu_by_gpu():
    overview = [row for row in ANCHORS if "perf-overview" in row.setup.source]
    fit, _ = halves(ANCHORS)
    for sku in ("h200-141gb", "h100-sxm-80gb"):
        rows = [row for row in overview if row.setup.sku == sku]
        assert [row in fit for row in rows] == [True, False] * 4


def test_the_shipped_constants_are_a_best_fit_to_the_fitted_half_alone(bench):
    """Moving any of them by a tenth makes the fit worse; the whole fit is the bench's."""
    import math
    from dataclasses import replace

    fit, _ = halves(ANCHORS)

    def loss(efficiency) -> float:
        return sum(abs(math.log1p(row.error(efficiency))) for row in fit)

    best = loss(bench.EFFICIENCY)
    for name in bench.START:
        for factor in (0.9, 1.1):
            moved = replace(bench.EFFICIENCY, **{name: factor * getattr(bench.EFFICIENCY, name)})
            assert loss(moved) > best, name


def test_the_written_table_is_what_the_planner_says(bench):
    assert bench.TABLE.read_text() == "\n".join(bench.table_lines()) + "\n"


def test_the_rows_that_matter_most_are_among_the_anchors():
    found = {(row.setup.source[:3], row.quantity, row.input_tokens, row.at_once): row.value for row in ANCHORS}
    assert found["NIM", TPOT, 5000, 1] == 18.58
    assert found["NIM", TTFT, 5000, 1] == 406.8
    assert found["Ten", TTFT, 2048, 1] in (109, 377)


def test_a_tile_costs_what_the_fact_sheet_derives(released):
    work = encoder_flops(released.spec)
    found = {name: round(flops / 1e12, 2) for name, flops in work.items()}
    assert found == {"linears": 11.34, "attention": 0.61, "projector": 0.32}


def test_seven_tiles_take_seven_times_one_and_none_take_nothing(released):
    h100 = load_sku("h100-sxm-80gb")
    one, seven = (encoder_s(released.spec, h100, tiles, "bf16") for tiles in (1, 7))
    assert seven == pytest.approx(7 * one)
    # facts part 2.1: about 24 ms a tile at half of the peak
    assert one == pytest.approx(0.024, rel=0.06)
    assert encoder_s(released.spec, h100, 0, "bf16") == 0


def test_decoding_is_never_faster_than_the_memory_allows(released):
    """facts part 2.2: 11.2 ms a token on two H100, 15.6 ms on one H200."""
    for sku, tensor, floor_ms in (("h100-sxm-80gb", 2, 10.7), ("h200-141gb", 1, 15.0)):
        decoder = SplitDecoder(released.spec.decoder, load_sku(sku), tensor)
        assert 1e3 * decoder.decode_s(1, 2000) > floor_ms


def test_more_gpus_shorten_a_token_and_more_requests_lengthen_it(released):
    h100 = load_sku("h100-sxm-80gb")
    on = {gpus: SplitDecoder(released.spec.decoder, h100, gpus) for gpus in (2, 4, 8)}
    times = [on[gpus].decode_s(1, 2000) for gpus in (2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert on[2].decode_s(64, 2000) > on[2].decode_s(1, 2000)
    assert on[2].prefill_s(4000) > on[2].prefill_s(1000)


def test_gpus_beyond_a_bridge_talk_over_pcie():
    bridged = load_sku("h100-nvl-94gb")
    assert (link_gb_s(bridged, 2), link_gb_s(bridged, 4)) == (600, 128)
    assert link_gb_s(load_sku("l40s"), 8) == 64
    assert [has_nvlink(bridged, gpus) for gpus in (2, 4)] == [True, False]
    assert not has_nvlink(load_sku("l40s"), 2)


def test_over_pcie_an_all_reduce_has_the_published_share_of_the_link(released):
    """28 GB/s of a ring over eight GPUs; what NVLink reaches says nothing of it."""
    slow = SplitDecoder(released.spec.decoder, load_sku("rtx-pro-6000"), 8)
    ring = 2 * 7 / 8 * 2000 * 8192 * 2
    assert slow._all_reduces_s(2000) == pytest.approx(160 * (EFFICIENCY.all_reduce_s + ring / 28e9), rel=0.01)


def test_the_stages_add_up_and_others_make_one_wait(released):
    decoder = SplitDecoder(released.spec.decoder, load_sku("h200-141gb"))
    alone, among = (predict(decoder, Demand(0.05, 0.2, 2000, 100, at_once, 32)) for at_once in (1, 16))
    assert alone.ttft_s == pytest.approx(sum(alone.stages.values()))
    assert alone.stages["wait"] == 0
    assert among.ttft_s > alone.ttft_s
    assert among.tpot_s > alone.tpot_s
    assert among.tokens_per_s > alone.tokens_per_s


def test_beyond_what_runs_at_once_requests_queue(released):
    decoder = SplitDecoder(released.spec.decoder, load_sku("h200-141gb"))
    full, over = (predict(decoder, Demand(0.0, 0.0, 2000, 100, at_once, 32)) for at_once in (32, 64))
    assert over.running == full.running == 32
    assert over.stages["wait"] > full.stages["wait"] + 32 * 100 * full.tpot_s / 32 * 0.99
    assert over.tokens_per_s == pytest.approx(full.tokens_per_s)


def test_prompts_have_the_tokens_of_the_released_tokenizer(released):
    """facts nvlm-d.md section 5: a span of 261 n + 4."""
    assert Workload(images=1, input_tokens=10).prompt_tokens(released.spec) == 10 + 1831
    assert Workload(images=0, input_tokens=10).prompt_tokens(released.spec) == 10


@pytest.mark.parametrize(
    ("workload", "telling"),
    [(Workload(images=3), "3 images, max_images is 2"), (Workload(output_tokens=9000), "max_seq_len is 8,192")],
)
def test_a_request_that_would_be_refused_gets_no_prediction(released, workload, telling):
    plan = make_plan(released, load_profile("h100-sxm-80gb-throughput"), HOST, workload)
    assert telling in plan.refused_request
    assert plan.prediction is None
