"""The table of `nvlm validate numerics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from nvlm_deploy.vision.numerics.report import NumericsReport, StageResult


def numerics_table(report: NumericsReport) -> Table:
    """A line per stage: the graph's own states, and the operation that by itself is nearest to its bound.

    Errors are the largest, relative to the largest magnitude expected, of the worst tile.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for column in ("cosine", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("by itself", no_wrap=True)
    for column in ("error", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("holds")
    for stage in report.stages:
        table.add_row(*_cells(stage), "yes" if report.holds(stage) else "[bold]NO[/bold]")
    return table


def _cells(stage: StageResult) -> list[str]:
    cells = [stage.name, f"{stage.accumulated.cosine:.7f}", _short(stage.accumulated.error)]
    worst = stage.worst
    if worst is None:
        return [*cells, "", "", ""]
    operation = worst.place.rpartition(": ")[2]
    return [*cells, operation, _short(worst.judged.difference.error), _short(worst.judged.bounds.error)]


def _short(value: float) -> str:
    """As `5.3e-3`."""
    return f"{value:.1e}".replace("e-0", "e-")
