"""Answers of a running server, a bounded number of requests at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from nvlm_deploy.client import Answer, AsyncNvlmClient, Generation
from nvlm_deploy.samples import Sample


def answers_from_server(
    url: str,
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    concurrency: int = 8,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Greedy answers to all samples, in their order; `on_answer` is called after each, for a progress bar.

    The first failure ends the run: NvlmError when the server refuses a sample, MachineError when it cannot answer.
    """
    generation = Generation(max_tokens=max_tokens)
    return asyncio.run(_all(url, samples, generation, concurrency, on_answer))


async def _all(
    url: str, samples: Sequence[Sample], generation: Generation, concurrency: int, on_answer: Callable[[], None]
) -> list[Answer]:
    free = asyncio.Semaphore(concurrency)
    async with AsyncNvlmClient(url) as client:

        async def one(sample: Sample) -> Answer:
            async with free:
                answer = await client.ask(sample.question, sample.images, generation).answer()
            on_answer()
            return answer

        return list(await asyncio.gather(*(one(sample) for sample in samples)))
