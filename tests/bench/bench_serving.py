"""A served small model under load: concurrent answers equal the single ones, memory stays flat over 1,000 requests.

    python tests/bench/bench_serving.py

Prints a table and, as its last line, one JSON object. Exit code 1 when a bar does not hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import psutil
import torch
from rich.console import Console

from nvlm_deploy.demo import Assets
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table
from nvlm_deploy.samples import Sample, read_samples
from nvlm_deploy.steps.order import pipeline_of
from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer
from nvlm_deploy.validate.in_process import InProcessModel, built_model
from nvlm_deploy.validate.over_server import answers_from_server

WORKSPACE = Path("engines/demo")
CONCURRENT = 32
ROUNDS = 4
SOAK_REQUESTS = 1000
WARM_UP_REQUESTS = 200
MAX_TOKENS = 16
# two candidates this close may change places with the order of a float sum
NEAR_TIE = 1e-3
LARGEST_GROWTH_PERCENT = 2.0


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the server with its stubs, and how many processes they are."""

    size_bytes: int
    processes: int

    @classmethod
    def of(cls, server: TritonServer) -> Memory:
        family = psutil.Process(server.process_id)
        members = [family, *family.children(recursive=True)]
        return cls(sum(member.memory_info().rss for member in members), len(members))


def mixed(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Image and text-only questions in turn."""
    images = cycle([sample for sample in samples if sample.images])
    texts = cycle([sample for sample in samples if not sample.images])
    return [next(images if number % 2 else texts) for number in range(count)]


def texts_of(url: str, samples: Sequence[Sample], concurrency: int) -> list[str]:
    return [a.text for a in answers_from_server(url, samples, max_tokens=MAX_TOKENS, concurrency=concurrency)]


@torch.inference_mode()
def gap_at_first_difference(model: InProcessModel, sample: Sample, one: str, other: str) -> float:
    """How far apart the two best logits lie where two greedy answers part."""
    tokenizer = model.embedder.prompts.tokenizer
    ids, others = (tokenizer.encode(text, add_special_tokens=False).ids for text in (one, other))
    common = next(
        (n for n, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), min(len(ids), len(others))
    )
    embeddings = model.embedder.prompt(sample)
    if common:
        embeddings = torch.cat([embeddings, model.decoder.embed(torch.tensor(ids[:common]))])
    best = model.decoder(embeddings[None])[0, -1].topk(2).values
    return float(best[0] - best[1])


def concurrency_verdicts(url: str, samples: Sequence[Sample], model: InProcessModel) -> list[Verdict]:
    asked = mixed(samples, CONCURRENT * ROUNDS)
    alone, together = texts_of(url, asked, 1), texts_of(url, asked, CONCURRENT)
    gaps = [
        gap_at_first_difference(model, sample, one, other)
        for sample, one, other in zip(asked, alone, together, strict=True)
        if one != other
    ]
    different = Measurement("answers that differ, concurrent from single", len(gaps), "", len(asked))
    unexplained = Measurement(
        f"of them with best logits over {NEAR_TIE:g} apart", sum(gap > NEAR_TIE for gap in gaps), "", len(asked)
    )
    return [Verdict(different, Bar("at most", len(asked) * 0.02)), Verdict(unexplained, Bar("at most", 0))]


def soak_verdicts(server: TritonServer, samples: Sequence[Sample]) -> list[Verdict]:
    texts_of(server.grpc_url, mixed(samples, WARM_UP_REQUESTS), CONCURRENT)
    before = Memory.of(server)
    asked = list(islice(cycle(mixed(samples, 200)), SOAK_REQUESTS))
    answered = len(texts_of(server.grpc_url, asked, CONCURRENT))
    after = Memory.of(server)
    growth = 100 * (after.size_bytes / before.size_bytes - 1)
    return [
        Verdict(Measurement("requests answered", answered, "", SOAK_REQUESTS), Bar("at least", SOAK_REQUESTS)),
        Verdict(Measurement("memory growth", growth, "%", SOAK_REQUESTS), Bar("at most", LARGEST_GROWTH_PERCENT)),
        Verdict(
            Measurement("processes that died", before.processes - after.processes, "", SOAK_REQUESTS), Bar("at most", 0)
        ),
    ]


def main() -> int:
    assets = Assets.of_checkout()
    recipe = Recipe(assets.model, load_profile("cpu"), WORKSPACE, assets.calibration)
    list(pipeline_of(recipe).run())
    samples = read_samples(assets.held_out)
    with TritonServer(recipe.repository, ServerChoices(ports=Ports.free())) as server:
        judged = concurrency_verdicts(server.grpc_url, samples, built_model(recipe)) + soak_verdicts(server, samples)
    Console().print(verdict_table(judged))
    bars = [verdict.as_json() for verdict in judged]
    results = {verdict.measurement.name: verdict.measurement.value for verdict in judged}
    print(json.dumps({"name": "serving", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
