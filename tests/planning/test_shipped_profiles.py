"""What `latency` and `throughput` mean: the planner's own numbers for every shipped profile and every legal split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest

from nvlm_deploy.planning.known_models import PlannedModel
from nvlm_deploy.planning.plan import Plan, legal_splits, make_plan
from nvlm_deploy.planning.serving import Workload
from nvlm_deploy.profile import Profile, load_profile, profile_names
from nvlm_deploy.sku import load_sku, sku_names

GPUS = [name for name in sku_names() if load_sku(name).compute_capability]
ON_GPUS = [name for name in profile_names() if load_profile(name).sku in GPUS]
LATENCY = [name for name in ON_GPUS if "-latency" in name]
COUNTS = (1, 2, 4, 8)
# a first token is called as early when it is no more than this share later: half of the planner's own error
AS_EARLY = 1.05


def plan_of(model: PlannedModel, profile: Profile, concurrency: int = 1) -> Plan:
    return make_plan(model, profile, 0, Workload(concurrency=concurrency))


def with_other_splits(model: PlannedModel, profile: Profile) -> Iterator[Profile]:
    """The same profile, its own split too, on 1, 2, 4 and 8 GPUs; those that fit, fewest GPUs first."""
    for tensor, pipeline in legal_splits(model.spec, max(COUNTS)):
        split = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
        other = profile.model_copy(update={"decoder": profile.decoder.model_copy(update=split)})
        if tensor * pipeline in COUNTS and plan_of(model, other).memory.fits:
            yield other


def split_of(profile: Profile) -> tuple[int, int]:
    return profile.decoder.tensor_parallel, profile.decoder.pipeline_parallel


def first_token_s(model: PlannedModel, profile: Profile) -> float:
    return plan_of(model, profile).prediction.ttft_s


def answer_s(model: PlannedModel, profile: Profile) -> float:
    """A lone request's whole answer."""
    plan = plan_of(model, profile)
    return plan.prediction.ttft_s + plan.workload.output_tokens * plan.prediction.tpot_s


def tokens_per_s_of_a_gpu(model: PlannedModel, profile: Profile) -> float:
    """With as many requests at once as its memory holds."""
    full = plan_of(model, profile, plan_of(model, profile).requests)
    return full.prediction.tokens_per_s / full.gpus


def best(profiles: list[Profile], value: Callable[[Profile], float]) -> Profile:
    """The first, and so the one on the fewest GPUs, of the greatest value, to nine digits."""
    return max(profiles, key=lambda profile: float(f"{value(profile):.9g}"))


@pytest.mark.parametrize("sku", GPUS)
def test_throughput_is_the_split_with_the_most_tokens_a_second_per_gpu(released, sku):
    shipped = load_profile(f"{sku}-throughput")
    splits = list(with_other_splits(released, shipped))
    found = best(splits, lambda profile: tokens_per_s_of_a_gpu(released, profile))
    assert split_of(found) == split_of(shipped)


def soonest(model: PlannedModel, sku: str, most_gpus: int) -> tuple[int, int]:
    """The split with the soonest answer of those whose first token comes as early as the throughput profile's."""
    profile, bound = load_profile(f"{sku}-latency"), first_token_s(model, load_profile(f"{sku}-throughput"))
    splits = [
        other
        for other in with_other_splits(model, profile)
        if math.prod(split_of(other)) <= most_gpus and first_token_s(model, other) <= AS_EARLY * bound
    ]
    return split_of(best(splits, lambda other: -answer_s(model, other)))


@pytest.mark.parametrize("sku", GPUS)
def test_latency_is_the_split_with_the_soonest_answer_of_those_with_as_early_a_first_token(released, sku):
    assert soonest(released, sku, 8) == split_of(load_profile(f"{sku}-latency"))


@pytest.mark.parametrize("sku", GPUS)
def test_a_latency_profile_for_four_gpus_is_there_exactly_where_it_is_a_split_of_its_own(released, sku):
    others = {split_of(load_profile(f"{sku}-{kind}")) for kind in ("latency", "throughput")}
    found, name = soonest(released, sku, 4), f"{sku}-latency-4gpu"
    assert (name in profile_names()) == (found not in others)
    if name in profile_names():
        assert split_of(load_profile(name)) == found


@pytest.mark.parametrize("name", LATENCY)
def test_no_latency_profile_answers_later_than_the_throughput_profile_of_its_gpu(released, name):
    fast = load_profile(name)
    wide = load_profile(f"{fast.sku}-throughput")
    assert first_token_s(released, fast) <= AS_EARLY * first_token_s(released, wide)
    assert plan_of(released, fast).prediction.tpot_s <= plan_of(released, wide).prediction.tpot_s
    assert tokens_per_s_of_a_gpu(released, fast) < tokens_per_s_of_a_gpu(released, wide)


@pytest.mark.parametrize("name", LATENCY)
def test_two_profiles_of_a_gpu_differ_in_what_they_serve_even_where_one_split_is_best_at_both(name):
    fast = load_profile(name)
    wide = load_profile(f"{fast.sku}-throughput")
    assert fast.decoder.max_batch_size < wide.decoder.max_batch_size
    assert fast.serving.max_images > wide.serving.max_images


@pytest.mark.parametrize("sku", GPUS)
@pytest.mark.parametrize(
    ("kind", "aim"), [("latency", "a lone answer"), ("throughput", "most tokens a second per GPU")]
)
def test_a_description_says_how_many_gpus_and_what_the_profile_is_for(sku, kind, aim):
    profile = load_profile(f"{sku}-{kind}")
    gpus = profile.decoder.tensor_parallel * profile.decoder.pipeline_parallel
    assert profile.description.startswith("one " if gpus == 1 else f"{gpus} x ")
    assert aim in profile.description


@pytest.mark.parametrize("name", [name for name in profile_names() if load_profile(name).sku in GPUS])
def test_every_gpu_profile_can_serve_as_many_of_the_largest_images_as_it_promises(released, name):
    plan = plan_of(released, load_profile(name))
    largest, _ = plan.servable_images
    assert plan.warning is None
    assert largest >= plan.profile.serving.max_images
