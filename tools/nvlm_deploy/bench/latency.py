"""Latency of single requests, from the client's own clock: time to first token, time per token, end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nvlm_deploy.client import Answer, Generation, NvlmClient
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.report.statistics import Latency, percentiles
from nvlm_deploy.samples import Sample


def measure_latency(
    url: str,
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    warm_up: int = 5,
    on_answer: Callable[[], None] = lambda: None,
) -> Latency:
    """Ask one sample after another; the first `warm_up` are asked once more before and not counted.

    Image files are read before the clock starts.
    """
    questions = [(sample.question, [image.read_bytes() for image in sample.images]) for sample in samples]
    generation = Generation(max_tokens=max_tokens)
    answers: list[Answer] = []
    with NvlmClient(url) as client:
        for question, images in questions[:warm_up]:
            client.ask(question, images, generation).answer()
        for question, images in questions:
            answers.append(client.ask(question, images, generation).answer())
            on_answer()
    return summarised(answers)


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
