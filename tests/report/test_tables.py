"""Tables fit a terminal of 80 columns and say the same as the JSON."""

from __future__ import annotations

import io
import json

from rich.console import Console, RenderableType

from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict
from nvlm_deploy.report.statistics import Accuracy, Latency, PairedDifference, percentiles
from nvlm_deploy.report.tables import ModelResult, difference_sentence, results_table, verdict_table

TIMES = percentiles([0.5, 0.5, 12.3456])


def result(title: str, right: int) -> ModelResult:
    latency = {
        "image": Latency(TIMES, TIMES, TIMES),
        "text-only": Latency(percentiles([0.004]), None, percentiles([0.004])),
    }
    return ModelResult(title, {"tile": Accuracy(right, 150), "all": Accuracy(600, 600)}, latency)


def shown(table: RenderableType, width: int = 80) -> str:
    output = io.StringIO()
    Console(file=output, width=width, color_system=None).print(table)
    return output.getvalue()


def test_the_table_of_two_models_fits_80_columns_unwrapped() -> None:
    results = [result("BF16 (unquantised)", 148), result("FP8", 147)]
    narrow, wide = shown(results_table(results)), shown(results_table(results), width=300)
    assert max(map(len, narrow.splitlines())) <= 80
    assert len(narrow.splitlines()) == len(wide.splitlines())
    assert "…" not in narrow


def test_accuracy_is_shown_with_its_interval_and_latency_as_p50_and_p95() -> None:
    table = shown(results_table([result("FP8", 150)]))
    assert "100.0 (97.5 - 100.0)" in table
    assert "500.0 / 11161.0" in table


def test_answers_of_one_token_have_no_time_per_token() -> None:
    lines = [line for line in shown(results_table([result("FP8", 150)])).splitlines() if "per token" in line]
    assert lines[1].split()[-1] == "-"


def test_the_same_numbers_are_json() -> None:
    document = json.loads(json.dumps(result("FP8", 150).as_json()))
    assert document["accuracy"]["tile"]["percent"] == 100
    assert document["accuracy"]["tile"]["n"] == 150
    assert document["latency"]["image"]["time_to_first_token"] == {
        "p50_ms": TIMES.p50_ms,
        "p95_ms": TIMES.p95_ms,
        "n": 3,
    }
    assert document["latency"]["text-only"]["per_token"] is None


def test_a_broken_bar_is_loud() -> None:
    verdict = Verdict(Measurement("accuracy lost", 1.5, "points", 600), Bar("at most", 1.0))
    assert "NO" in shown(verdict_table([verdict]))


def test_the_difference_is_one_sentence() -> None:
    sentence = difference_sentence("BF16", "FP8", PairedDifference(1, 3, 600), Accuracy(590, 600))
    assert sentence.startswith("FP8 minus BF16: -0.3 points (95 %: ")
    assert sentence.endswith("the same answer to 98.3 % of 600 questions")


def test_the_device_is_named_with_its_cores() -> None:
    assert "cores" in device_name()
