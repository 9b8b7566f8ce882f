"""Tables for people, 80 columns wide, and the same numbers for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from nvlm_deploy.report.measurement import IntervalVerdict, Outcome, Verdict
from nvlm_deploy.report.statistics import Accuracy, Latency, PairedDifference, Percentiles

_SHOWN = {Outcome.HOLDS: "yes", Outcome.FAILS: "[bold]NO[/bold]", Outcome.UNDECIDED: "[bold]undecided[/bold]"}


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model: accuracy by task, latency by kind of request."""

    title: str
    accuracy: Mapping[str, Accuracy]
    latency: Mapping[str, Latency] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Percentages with their intervals, times in milliseconds."""
        return {
            "title": self.title,
            "accuracy": {task: accuracy_as_json(accuracy) for task, accuracy in self.accuracy.items()},
            "latency": {kind: latency_as_json(latency) for kind, latency in self.latency.items()},
        }


def results_table(results: Sequence[ModelResult]) -> Table:
    """One column per model; all must have the same tasks and kinds of request."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("n", justify="right")
    for result in results:
        table.add_column(result.title, justify="right")
    _add_accuracy(table, results)
    for kind in results[0].latency:
        _add_latency(table, kind, [result.latency[kind] for result in results])
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """One line per bar."""
    table = Table("bar", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("measured", justify="right")
    table.add_column("holds")
    for verdict in verdicts:
        table.add_row(verdict.what, f"{verdict.measurement.value:.4g}", _SHOWN[verdict.outcome])
    return table


def undecided_sentence(verdict: IntervalVerdict) -> str:
    """Why an undecided verdict is one, and how many observations would decide it."""
    (low, high), measured = verdict.measurement.interval or (0.0, 0.0), verdict.measurement
    possible = f"after {measured.n:,} questions it may be {low:+.1f} to {high:+.1f} {measured.unit} (95 %)"
    found = f"undecided: {measured.name}: {possible}, the bar is {verdict.bar.sense} {verdict.bar.bound:g}."
    if verdict.decisive_n is None:
        return f"{found} More questions decide only if the measured value moves off the bar."
    return f"{found} About {verdict.decisive_n:,} questions decide if the two go on to differ as often (assumed)."


def difference_sentence(reference: str, candidate: str, difference: PairedDifference, agreement: Accuracy) -> str:
    """As `FP8 minus BF16: -0.3 points (95 %: -0.9 to 0.3); the same answer to 99.2 % of 750 questions`."""
    low, high = difference.interval_points
    return (
        f"{candidate} minus {reference}: {difference.points:+.1f} points (95 %: {low:+.1f} to {high:+.1f}); "
        f"the same answer to {agreement.percent:.1f} % of {agreement.total} questions"
    )


def accuracy_as_json(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "n": accuracy.total,
        "right": accuracy.right,
        "percent": accuracy.percent,
        "interval_95_percent": list(accuracy.interval_percent),
    }


def difference_as_json(difference: PairedDifference) -> dict[str, Any]:
    return {
        "n": difference.total,
        "points": difference.points,
        "interval_95_points": list(difference.interval_points),
        "only_reference_right": difference.only_reference,
        "only_candidate_right": difference.only_candidate,
    }


def latency_as_json(latency: Latency) -> dict[str, Any]:
    """`n` requests; percentiles in milliseconds, each with the number of times it rests on."""
    return {"n": latency.n, **asdict(latency)}


def _add_accuracy(table: Table, results: Sequence[ModelResult]) -> None:
    table.add_row("[bold]right[/bold], % (95 % interval)")
    for task in results[0].accuracy:
        found = [result.accuracy[task] for result in results]
        table.add_row(f"  {task}", str(found[0].total), *(_accuracy_cell(accuracy) for accuracy in found))


def _add_latency(table: Table, kind: str, found: Sequence[Latency]) -> None:
    table.add_section()
    table.add_row(f"[bold]{kind}[/bold], ms (p50 / p95)")
    requests = str(found[0].n)
    table.add_row("  time to first token", requests, *(_times_cell(latency.time_to_first_token) for latency in found))
    table.add_row("  per token", requests, *(_times_cell(latency.per_token) for latency in found))
    table.add_row("  end to end", requests, *(_times_cell(latency.end_to_end) for latency in found))


def _accuracy_cell(accuracy: Accuracy) -> str:
    low, high = accuracy.interval_percent
    return f"{accuracy.percent:.1f} ({low:.1f} - {high:.1f})"


def _times_cell(times: Percentiles | None) -> str:
    return "-" if times is None else f"{times.p50_ms:.1f} / {times.p95_ms:.1f}"
