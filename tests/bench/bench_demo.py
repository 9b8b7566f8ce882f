"""The demo's accuracy and latency: FP8 beside BF16, over the real server, on questions never trained on.

    python tests/bench/bench_demo.py

Prints a table and, as its last line, one JSON object. Exit code 1 when a bar does not hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvlm_deploy.cli.demo import Screen, print_result
from nvlm_deploy.demo import Assets, DemoResult, Sizes, run_demo
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table
from nvlm_deploy.validate.accuracy import drop_verdict

WORKSPACE = Path("engines/demo")
# percent of held-out questions answered exactly right, unquantised
ACCURACY_BARS = {"tile": 97, "read": 93, "count": 88, "largest": 96, "text": 99, "all": 95}
LEAST_QUESTIONS = 600
LARGEST_DROP_POINTS = 1.0


def verdicts(result: DemoResult) -> Iterator[Verdict]:
    """Every bar of the demo, judged."""
    for task, bound in ACCURACY_BARS.items():
        accuracy = result.reference.result.accuracy[task]
        found = Measurement(f"BF16 accuracy, {task}", accuracy.percent, "%", accuracy.total, accuracy.interval_percent)
        yield Verdict(found, Bar("at least", bound))
    yield drop_verdict(result.comparison, max_drop_points=LARGEST_DROP_POINTS)
    asked = len(result.reference.answers)
    yield Verdict(Measurement("questions asked", asked, "", asked), Bar("at least", LEAST_QUESTIONS))
    yield Verdict(Measurement("bundled picture read right", int(result.example.is_right), "", 1), Bar("at least", 1))


def time_ratios(result: DemoResult) -> dict[str, float]:
    """FP8's median time to first token over BF16's, by kind of request; the CPU has no FP8 units, so no bar."""
    reference, fp8 = result.reference.result.latency, result.fp8.result.latency
    return {
        kind: fp8[kind].time_to_first_token.p50_ms / reference[kind].time_to_first_token.p50_ms for kind in reference
    }


def document(result: DemoResult, judged: list[Verdict]) -> dict[str, Any]:
    return {
        "name": "demo",
        "device": device_name(),
        "results": {**result.as_json(), "time_to_first_token_fp8_over_bf16": time_ratios(result)},
        "bars": [verdict.as_json() for verdict in judged],
    }


def main() -> int:
    result = run_demo(Assets.of_checkout(), WORKSPACE, Screen(sys.stderr), Sizes(latency_requests=100))
    judged = list(verdicts(result))
    print_result(result, verdict_table(judged))
    print(json.dumps(document(result, judged)))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
