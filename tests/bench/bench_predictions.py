"""The planner's arithmetic against published measurements of 70B decoders: predicted, published, error.

    python tests/bench/bench_predictions.py             # fit, table, bars
    python tests/bench/bench_predictions.py --write     # the table into engines/PREDICTIONS.md

Efficiency constants are fitted anew to one half of the rows (anchors.halves) and judged on the other; then the other
way round, so that no choice of half matters; then to all sources but one, and judged on that one. Prints a table and,
as its last line, one JSON object. Exit code 1 when a bar does not hold; sources left out have none.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from scipy.optimize import minimize

from nvlm_deploy.planning.anchors import ANCHORS, UNCOUNTED, Anchor, halves
from nvlm_deploy.planning.roofline import EFFICIENCY, Efficiency
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table

TABLE = Path(__file__).parents[2] / "engines" / "PREDICTIONS.md"
START = {"bandwidth": 0.7, "fp8": 0.5, "sixteen_bit": 0.6, "link": 0.5, "all_reduce_s": 2e-5, "first_token_s": 1e-2}
MOST_ERROR = 0.25
RESTARTS = 4
# the planner's constants are rounded to three digits
MOST_DISTANCE_FROM_FIT = 0.01


def median_error(anchors: Sequence[Anchor], efficiency: Efficiency = EFFICIENCY) -> float:
    """Of absolute errors relative to the published value."""
    return median(abs(anchor.error(efficiency)) for anchor in anchors)


def fitted(anchors: Sequence[Anchor]) -> Efficiency:
    """The constants with the least sum of |ln(predicted / published)|; shares stay below 1."""

    def loss(logarithms: np.ndarray) -> float:
        values = np.exp(logarithms)
        if (values[:4] > 1).any():
            return math.inf
        efficiency = Efficiency(*values)
        return sum(abs(math.log1p(anchor.error(efficiency))) for anchor in anchors)

    point = np.log(list(START.values()))
    for _ in range(RESTARTS):
        point = minimize(loss, point, method="Nelder-Mead", options={"maxiter": 1500}).x
    return Efficiency(*np.exp(point))


def table_lines() -> Iterator[str]:
    """engines/PREDICTIONS.md."""
    fit, test = halves(ANCHORS)
    yield "# Predictions against published measurements"
    yield ""
    yield "Written by `python tests/bench/bench_predictions.py --write`; a test keeps it equal to the planner."
    yield ""
    yield "The efficiency constants (`build/nvlm_deploy/planning/roofline.py`) are fitted to one half of the rows,"
    yield "marked fit below; the other half, marked test, was not used. The rule of the halves looks at no error:"
    yield "within each source, GPU and quantity rows take turns, the first to fit. Median absolute error:"
    yield f"{median_error(fit):.1%} on the {len(fit)} fitted rows, {median_error(test):.1%} on the {len(test)} tested,"
    yield f"{median_error(ANCHORS):.1%} on all {len(ANCHORS)}. The bench also swaps the halves,"
    yield "and leaves out each source in turn."
    yield ""
    yield "No row has more than four GPUs, GPUs that talk over PCIe, or a pipeline: there the planner extrapolates."
    yield ""
    yield from _markdown(ANCHORS, ["fit" if anchor in fit else "test" for anchor in ANCHORS])
    yield ""
    yield "Rows of old releases that do not say how many requests ran. As many as memory holds are assumed, which those"
    yield "runs did not have; neither fitted, nor tested, nor counted:"
    yield ""
    yield from _markdown(UNCOUNTED, ["-"] * len(UNCOUNTED))


def _markdown(anchors: Sequence[Anchor], roles: Sequence[str]) -> Iterator[str]:
    yield "| source | decoder | GPUs | in / out | at once | quantity | published | predicted | error | |"
    yield "|---|---|---|--:|--:|---|--:|--:|--:|---|"
    for anchor, role in zip(anchors, roles, strict=True):
        setup = anchor.setup
        model = "Llama 3 70B" if setup.decoder.vocab_size == 128256 else "Llama 2 70B"
        kind = "FP8" if setup.fp8 else "16-bit"
        at_once = "all that fit" if anchor.at_once is None else f"{anchor.at_once}"
        lengths = f"{anchor.input_tokens} / {anchor.output_tokens}"
        predicted = anchor.predicted()
        numbers = f"{anchor.value:g} | {predicted:.0f} | {anchor.error():+.0%}"
        if predicted < 1000:
            numbers = f"{anchor.value:g} | {predicted:.1f} | {anchor.error():+.0%}"
        yield (
            f"| {setup.source} | {model} {kind} | {setup.tensor} x {setup.sku} | {lengths} | {at_once} "
            f"| {anchor.quantity} | {numbers} | {role} |"
        )


def verdicts(fits: Mapping[str, Efficiency]) -> Iterator[Verdict]:
    fit, test = halves(ANCHORS)
    at_most, both = Bar("at most", MOST_ERROR), (("shipped", fit, test), ("swapped", test, fit))
    for name, to_fit, to_test in both:
        found = fits[name]
        yield _verdict(f"{name} half, fitted rows: median error", median_error(to_fit, found), len(to_fit), at_most)
        yield _verdict(f"{name} half, tested rows: median error", median_error(to_test, found), len(to_test), at_most)
        if name == "shipped":
            away = max(abs(getattr(EFFICIENCY, field) / getattr(found, field) - 1) for field in START)
            yield _verdict("constants: distance from the fit", away, len(START), Bar("at most", MOST_DISTANCE_FROM_FIT))


def without_each_source() -> Iterator[Measurement]:
    """How well each source is predicted by constants that are fitted to the others."""
    for source in dict.fromkeys(anchor.setup.source for anchor in ANCHORS):
        inside, outside = (
            [row for row in ANCHORS if (row.setup.source == source) == within] for within in (True, False)
        )
        value = median_error(inside, fitted(outside))
        yield Measurement(f"fitted without {source}: its median error", value, "", len(inside), evidence="derived")


def _verdict(name: str, value: float, n: int, bar: Bar) -> Verdict:
    return Verdict(Measurement(name, float(value), "", n, evidence="derived"), bar)


def main() -> int:
    if "--write" in sys.argv[1:]:
        TABLE.write_text("\n".join(table_lines()) + "\n", encoding="utf-8")
        return 0
    console = Console(width=140)
    for line in table_lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    fits = {name: fitted(half) for name, half in zip(("shipped", "swapped"), halves(ANCHORS), strict=True)}
    judged = list(verdicts(fits))
    console.print(verdict_table(judged))
    left_out = list(without_each_source())
    for found in left_out:
        console.print(f"{found.name} {found.value:.1%} (n {found.n})", highlight=False)
    constants = {half: {name: getattr(found, name) for name in START} for half, found in fits.items()}
    errors = {found.name: found.value for found in left_out}
    results = {"rows": len(ANCHORS), "constants": constants, "left_out": errors}
    bars = [verdict.as_json() for verdict in judged]
    print(json.dumps({"name": "predictions", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
