"""Latency of single requests, from the client's own clock: time to first token, time per token, end to end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from nvlm_deploy.client import Answer, Generation, NvlmClient
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.report.statistics import Latency, percentiles
from nvlm_deploy.samples import Sample


def measure_latencies(
    urls: Sequence[str],
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    warm_up: int = 5,
    on_sample: Callable[[], None] = lambda: None,
) -> list[Latency]:
    """One request at a time: each sample goes to every server in turn, so that a busy machine slows all of them alike.

    The first `warm_up` samples are asked once more before and not counted. Image files are read before that.
    """
    questions = [(sample.question, [image.read_bytes() for image in sample.images]) for sample in samples]
    generation = Generation(max_tokens=max_tokens)
    answers: dict[str, list[Answer]] = {url: [] for url in urls}
    with contextlib.ExitStack() as stack:
        clients = {url: stack.enter_context(NvlmClient(url)) for url in urls}
        for question, images in questions[:warm_up]:
            for client in clients.values():
                client.ask(question, images, generation).answer()
        for question, images in questions:
            for url, client in clients.items():
                answers[url].append(client.ask(question, images, generation).answer())
            on_sample()
    return [summarised(answers[url]) for url in urls]


def summarised(answers: Sequence[Answer]) -> Latency:
    """Raises NvlmError when there are no answers."""
    if not answers:
        raise NvlmError("no answers to take times of")
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    return Latency(
        time_to_first_token=percentiles([answer.time_to_first_token_s for answer in answers]),
        per_token=percentiles(gaps) if gaps else None,
        end_to_end=percentiles([answer.end_to_end_s for answer in answers]),
    )
