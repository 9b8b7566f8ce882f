"""Lists of profiles, the choice by SLO, and the steps of a build."""

from __future__ import annotations

import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.machine.resources import Gpu, Machine
from nvlm_deploy.planning.build_steps import step_estimates
from nvlm_deploy.planning.known_models import planned_model
from nvlm_deploy.planning.listing import (
    ELSEWHERE,
    IMPOSSIBLE,
    RUNNABLE,
    VERDICTS,
    judged,
    list_profiles,
    sku_of_machine,
    usable_gpus,
)
from nvlm_deploy.planning.plan import make_plan
from nvlm_deploy.planning.slo import Slo, choose
from nvlm_deploy.profile import load_profile, profile_names
from nvlm_deploy.recipe import Recipe, steps_of_build
from nvlm_deploy.report.planning import system_sentence
from nvlm_deploy.sku import load_sku, sku_names

GIB = 1 << 30
LAPTOP = Machine(24 * GIB, ())
TWO_H100 = Machine(900 * GIB, tuple(Gpu("NVIDIA H100 80GB HBM3", "9.0", str(index)) for index in range(2)))


def verdicts(model, machine) -> dict[str, str]:
    return {row.name: row.verdict for row in list_profiles(model, machine)}


def test_each_gpu_has_a_latency_and_a_throughput_profile_that_fits(released):
    for sku in sku_names():
        if load_sku(sku).compute_capability:
            for kind in ("latency", "throughput"):
                plan = make_plan(released, load_profile(f"{sku}-{kind}"), 0)
                assert plan.memory.fits, plan.memory.why_not
                assert plan.prediction is not None


def test_runnable_profiles_come_first_and_impossible_ones_last_with_the_reason(released):
    rows = list_profiles(released, TWO_H100)
    order = [VERDICTS.index(row.verdict) for row in rows]
    assert order == sorted(order)
    assert [row.name for row in rows if row.verdict == RUNNABLE] == ["cpu", "cpu-bf16", "h100-sxm-80gb-throughput"]
    reasons = {row.name: row.reason for row in rows if row.verdict == IMPOSSIBLE}
    assert "79.2 visible" in reasons["h100-sxm-80gb-throughput on 1"]


def test_a_laptop_runs_the_small_model_and_not_the_released_one(released, tiny_folder):
    assert verdicts(planned_model(tiny_folder), LAPTOP)["cpu"] == RUNNABLE
    assert verdicts(released, LAPTOP)["cpu"] == ELSEWHERE


def test_too_few_gpus_of_the_right_kind_are_elsewhere(released):
    one = Machine(TWO_H100.available_bytes, TWO_H100.gpus[:1])
    assert verdicts(released, one)["h100-sxm-80gb-throughput"] == ELSEWHERE


def test_a_profile_that_cannot_be_is_listed_with_its_reason(released, profile_with):
    row = judged(released, profile_with(decoder_tensor_parallel=3), LAPTOP)
    assert (row.verdict, row.plan) == (IMPOSSIBLE, None)
    assert "cannot share" in row.reason


def test_images_that_no_request_can_have_are_named_with_the_number_that_works(released, profile_with):
    plan = make_plan(released, profile_with(serving_max_images=1000), 0)
    assert plan.memory.fits
    assert plan.warning == "max_images 1,000 cannot be served: max_seq_len 8,192 has room for 30 of 1 tile, 4 of 7"
    assert plan.warning in judged(released, profile_with(serving_max_images=1000), LAPTOP).reason


@pytest.mark.parametrize("images", [30, 31])
def test_as_many_images_as_a_sequence_holds_are_no_reason_to_warn(released, profile_with, images):
    """30 pictures of one tile, two tokens: 30 x (256 + 5 + 4) + 2 = 7,952."""
    plan = make_plan(released, profile_with(serving_max_images=images), 0)
    assert (plan.warning is None) == (images == 30)


def test_gpus_are_told_apart_by_what_the_driver_says():
    assert sku_of_machine(LAPTOP) == "cpu"
    assert sku_of_machine(TWO_H100) == "h100-sxm-80gb"
    assert sku_of_machine(Machine(GIB, (Gpu("NVIDIA GeForce RTX 3060", "8.6", "0"),))) is None
    assert sku_of_machine(Machine(GIB, (Gpu("NVIDIA A100-SXM4-80GB", "8.0", "0"),))) == "a100-80gb"
    assert sku_of_machine(Machine(GIB, (Gpu("NVIDIA A100 80GB PCIe", "8.0", "0"),))) is None


@pytest.mark.parametrize("name", profile_names())
def test_the_steps_are_those_of_a_build(released, name, tmp_path):
    profile = load_profile(name)
    steps = step_estimates(released, profile)
    assert [step.name for step in steps] == steps_of_build(Recipe(tmp_path, profile, tmp_path))
    assert all(step.host_bytes > 0 for step in steps)


def test_a_rank_built_at_a_time_needs_less_host_memory(released, profile_with):
    def host(at_once: int) -> int:
        steps = step_estimates(released, profile_with("h100-sxm-80gb-latency", decoder_build_at_once=at_once))
        return next(step.host_bytes for step in steps if step.name == "build-llm")

    assert host(1) * 4 == host(4)


def plans_for(model):
    return [make_plan(model, load_profile(name), 24 * GIB) for name in profile_names()]


def test_the_cheapest_profile_that_meets_the_objective_is_chosen_by_the_stated_rule(released):
    plans = plans_for(released)
    choice = choose(plans, Slo(ttft_ms=600, tpot_ms=25))
    prices = {
        plan.profile.name: plan.price_usd_per_hour
        for plan in plans
        if plan.prediction and plan.prediction.ttft_s <= 0.6 and plan.prediction.tpot_s <= 0.025
    }
    assert choice.cheapest.profile.name == min(prices, key=prices.get)
    assert {plan.profile.name for plan in choice.meeting} == set(prices)


def test_a_tighter_objective_costs_no_less(released):
    plans = plans_for(released)
    loose, tight = (choose(plans, Slo(tpot_ms=bound)).cheapest for bound in (40, 12))
    assert tight.price_usd_per_hour >= loose.price_usd_per_hour


def test_when_none_meets_it_every_profile_says_why(released):
    choice = choose(plans_for(released), Slo(ttft_ms=1, tpot_ms=0.5))
    assert choice.cheapest is None
    assert set(choice.reasons) == set(profile_names())
    assert any("TTFT" in reason and "asked 1" in reason for reason in choice.reasons["b200-latency"])
    assert "needs" in choice.reasons["cpu"][0]


def test_a_profile_that_cannot_be_misses_every_objective_for_its_own_reason(released):
    choice = choose(plans_for(released), Slo(ttft_ms=600), {"mine": "tensor_parallel 3 cannot share 64 heads"})
    assert choice.reasons["mine"] == ("tensor_parallel 3 cannot share 64 heads",)


@pytest.mark.parametrize("bound", [0, -1, float("nan"), float("inf")])
def test_an_objective_that_is_none_is_refused(bound):
    with pytest.raises(NvlmError, match="is no objective"):
        Slo(ttft_ms=bound)


def test_only_gpus_of_a_kind_that_a_program_gets_together_count() -> None:
    h100, a100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", "0"), Gpu("NVIDIA A100-SXM4-80GB", "8.0", "1")
    mixed = Machine(GIB, (h100, a100, h100))
    assert usable_gpus(mixed, "h100-sxm-80gb") == 1
    assert usable_gpus(mixed, "a100-80gb") == 0
    row = judged(planned_model(None, "nvlm-d-72b"), load_profile("h100-sxm-80gb-throughput"), mixed)
    assert row.verdict == ELSEWHERE
    known = "2 x NVIDIA H100 80GB HBM3 (SKU h100-sxm-80gb), 1 x NVIDIA A100-SXM4-80GB, "
    assert system_sentence(mixed).startswith(known)
