"""Samples and their answers become right or wrong, per task and over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.report.statistics import Accuracy, PairedDifference, paired_difference
from nvlm_deploy.samples import Sample

ALL = "all"


@dataclass(frozen=True)
class Scored:
    """One sample and what was answered."""

    sample: Sample
    text: str

    @property
    def is_right(self) -> bool:
        return is_exact(self.text, self.sample.answer)


def is_exact(text: str, expected: str) -> bool:
    """Exact match, but for white space around."""
    return text.strip() == expected.strip()


def scored(samples: Sequence[Sample], texts: Sequence[str]) -> list[Scored]:
    """Pair samples with the answers to them, in the same order."""
    return [Scored(sample, text) for sample, text in zip(samples, texts, strict=True)]


def accuracy_by_task(answers: Sequence[Scored]) -> dict[str, Accuracy]:
    """Accuracy of each task in order of appearance, then of `all`. Raises NvlmError when there are no answers."""
    if not answers:
        raise NvlmError("no answers to score")
    groups: dict[str, list[bool]] = {}
    for answer in answers:
        groups.setdefault(answer.sample.task, []).append(answer.is_right)
    groups[ALL] = [answer.is_right for answer in answers]
    return {task: Accuracy(sum(rights), len(rights)) for task, rights in groups.items()}


@dataclass(frozen=True)
class Comparison:
    """Reference and candidate on the same samples, in the same order."""

    reference: Sequence[Scored]
    candidate: Sequence[Scored]

    @property
    def differences(self) -> dict[str, PairedDifference]:
        """Paired, by task and for `all`."""
        tasks = [*dict.fromkeys(answer.sample.task for answer in self.reference), ALL]
        return {task: self._difference(task) for task in tasks}

    @property
    def agreement(self) -> Accuracy:
        """How often both gave the same text, right or wrong."""
        same = sum(is_exact(new.text, old.text) for old, new in zip(self.reference, self.candidate, strict=True))
        return Accuracy(same, len(self.reference))

    def _difference(self, task: str) -> PairedDifference:
        def rights(answers: Sequence[Scored]) -> list[bool]:
            return [answer.is_right for answer in answers if task in (ALL, answer.sample.task)]

        return paired_difference(rights(self.reference), rights(self.candidate))
