"""Two models answer the same questions; is the candidate at most so much worse?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvlm_deploy.report.measurement import Bar, IntervalVerdict, Measurement
from nvlm_deploy.report.progress import progress
from nvlm_deploy.report.tables import ModelResult, accuracy_as_json, difference_as_json
from nvlm_deploy.samples import Sample
from nvlm_deploy.validate.tasks import ALL, Comparison, Scored, accuracy_by_task, scored

if TYPE_CHECKING:
    from nvlm_deploy.validate.in_process import InProcessModel


@dataclass(frozen=True)
class Questions:
    """What is asked of every model, greedily; `concurrency` bounds the requests in flight to a server."""

    samples: Sequence[Sample]
    max_tokens: int = 32
    concurrency: int = 8

    def to_server(self, url: str, name: str | None = None) -> list[Scored]:
        """Raises NvlmError when the server refuses a sample, MachineError when it cannot answer."""
        from nvlm_deploy.validate.over_server import answers_from_server

        with progress(f"asking {name or url}", len(self.samples)) as advance:
            answers = answers_from_server(
                url, self.samples, max_tokens=self.max_tokens, concurrency=self.concurrency, on_answer=advance
            )
        return scored(self.samples, [answer.text for answer in answers])

    def in_process(self, make_model: Callable[[], InProcessModel], name: str) -> list[Scored]:
        """Raises NvlmError for an image that cannot be read."""
        texts = []
        with progress(f"asking {name} in this process", len(self.samples)) as advance:
            for text in make_model().texts(self.samples, max_tokens=self.max_tokens):
                texts.append(text)
                advance()
        return scored(self.samples, texts)


def drop_verdict(comparison: Comparison, *, max_drop_points: float) -> IntervalVerdict:
    """Is the candidate, over all tasks, at most `max_drop_points` percentage points below the reference?

    It is when the whole 95 % interval of the loss is within the bar; a small loss of a few questions shows nothing.
    """
    difference = comparison.differences[ALL]
    low, high = difference.interval_points
    drop = Measurement("accuracy lost, all tasks", 0.0 - difference.points, "points", difference.total, (-high, -low))
    return IntervalVerdict(drop, Bar("at most", max_drop_points), difference.decisive_total(-max_drop_points))


def model_results(comparison: Comparison, *, reference: str, candidate: str) -> list[ModelResult]:
    """One column of the table for each side."""
    return [
        ModelResult(reference, accuracy_by_task(comparison.reference)),
        ModelResult(candidate, accuracy_by_task(comparison.candidate)),
    ]


def comparison_as_json(comparison: Comparison) -> dict[str, Any]:
    """Differences by task, and how often both sides gave the same answer."""
    return {
        "difference": {task: difference_as_json(found) for task, found in comparison.differences.items()},
        "agreement": accuracy_as_json(comparison.agreement),
    }
