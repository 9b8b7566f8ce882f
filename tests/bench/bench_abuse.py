"""A served small model under hostile and careless clients: what they send, cancel, share and stop.

    python tests/bench/bench_abuse.py            # all parts; or some: limits identity stops characters

Prints a table and, as its last line, one JSON object. Exit code 1 when a bar does not hold. All requests go to a server
that it starts on this machine.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import queue
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from nvlm_deploy.demo import Assets
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table
from nvlm_deploy.steps.order import pipeline_of
from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

WORKSPACE = Path("engines/demo")
SUM = "What is 12 plus 7?"
TYPES = {
    "text_input": ("BYTES", np.object_), "image": ("BYTES", np.object_), "stop_words": ("BYTES", np.object_),
    "max_tokens": ("INT32", np.int32), "seed": ("UINT64", np.uint64), "temperature": ("FP32", np.float32),
    "stream": ("BOOL", np.bool_),
}  # fmt: skip
SHARED_IDS = ["", "0", "1", "a", "request", "17", "ü", "x" * 60]
HOSTILE_TIMES = 10
REQUESTS, STOPS, LOUD = 2000, 500, 500
# random tokens, many of which are parts of characters
LOUD_OPTIONS: dict[str, Any] = {"text": "Say", "max_tokens": 24, "temperature": 50.0}


Finding = Measurement | Verdict


@dataclass
class Answer:
    """What came of one request."""

    pieces: list[str]
    reason: str = ""
    error: str = ""
    first_s: float = 0.0
    whole_s: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Caller:
    """A bare gRPC client."""

    def __init__(self, url: str) -> None:
        self.url = url

    def inputs(self, **values: Any) -> list[Any]:
        from tritonclient import grpc

        found = []
        for name, value in {"stream": True, **values}.items():
            kind, dtype = TYPES[name]
            array = np.array(value if isinstance(value, list) else [value], dtype=dtype)
            found.append(grpc.InferInput(name, list(array.shape), kind))
            found[-1].set_data_from_numpy(array)
        return found

    def ask(self, text: str, *, request_id: str = "", leave_after: int | None = None, **values: Any) -> Answer:
        """Stream an answer; with `leave_after` cancel it after as many pieces."""
        from tritonclient import grpc

        responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        answer, started = Answer([]), time.perf_counter()
        with grpc.InferenceServerClient(self.url) as client:
            client.start_stream(lambda result, error: responses.put((result, error)))
            client.async_stream_infer(
                "nvlm", self.inputs(text_input=text.encode(), **values), request_id=request_id,
                enable_empty_final_response=True,
            )  # fmt: skip
            while leave_after is None or len(answer.pieces) < leave_after:
                result, error = responses.get(timeout=300)
                if error is not None:
                    answer.error = error.message()
                    break
                if result.get_response().outputs:
                    answer.first_s = answer.first_s or time.perf_counter() - started
                    answer.pieces.append(result.as_numpy("text_output")[0].decode())
                    answer.reason = result.as_numpy("finish_reason")[0].decode()
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
            client.stop_stream(cancel_requests=leave_after is not None)
        answer.whole_s = time.perf_counter() - started
        return answer


def flat_webp() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (9400, 9400), (200, 30, 30)).save(stream, "WEBP")
    return stream.getvalue()


HOSTILE: dict[str, Callable[[], dict[str, Any]]] = {
    "a text of 5 MB": lambda: {"text": "a b " * 1_250_000},
    "a text of 64 MB": lambda: {"text": "a b " * 16_000_000},
    "16 WebP of 9400 x 9400": lambda: {"text": SUM, "image": [flat_webp()] * 16},
    "FF D8 FF and 100 MB of zeros": lambda: {"text": SUM, "image": [b"\xff\xd8\xff" + bytes(100_000_000)]},
    "1.5 GB of zeros": lambda: {"text": SUM, "image": [bytes(1_500_000_000)]},
}


def send_hostile(url: str, name: str, errors: Any) -> None:
    """In a process of its own, whose work must not delay the honest client's."""
    request = HOSTILE[name]()
    caller = Caller(url)
    errors.put("ready")
    for _ in range(HOSTILE_TIMES):
        errors.put(caller.ask(request["text"], **{k: v for k, v in request.items() if k != "text"}).error[:200])


def p99_ms(seconds: Sequence[float]) -> float:
    return 1000 * float(np.percentile(seconds, 99))


def texts_until(caller: Caller, is_over: Callable[[], bool], *, at_least: int) -> list[float]:
    """Times of text requests, one after the other."""
    times: list[float] = []
    while len(times) < at_least or not is_over():
        answer = caller.ask(SUM)
        assert answer.text == "19", answer
        times.append(answer.whole_s)
    return times


def sizes(server: TritonServer) -> dict[str, int]:
    """Return the bytes of the server's processes, by model: resident ones, and those that are not shared.

    Triton copies a request into memory that it shares with a model's process, and never gives that memory back.
    """
    family = psutil.Process(server.process_id)
    found: dict[str, int] = {}
    for process in (family, *family.children()):
        name = next((part.split("/")[-3] for part in process.cmdline() if part.endswith("model.py")), process.name())
        memory = process.memory_info()
        for key, size in ((name, memory.rss), (f"{name}, its own", memory.rss - memory.shared)):
            found[key] = found.get(key, 0) + size
    return found


def limits_verdicts(server: TritonServer) -> Iterator[Finding]:
    caller = Caller(server.grpc_url)
    texts_until(caller, lambda: True, at_least=50)
    picture = (Assets.of_checkout().model.parent / "heldout" / "example.png").read_bytes()
    for _ in range(20):
        caller.ask("Read all digits in order.", image=[picture])
    calm, before = p99_ms(texts_until(caller, lambda: True, at_least=400)), sizes(server)
    yield Measurement("p99 of texts alone", calm, "ms", 400)
    context = multiprocessing.get_context("spawn")
    for name in HOSTILE:
        errors = context.Queue()
        sender = context.Process(target=send_hostile, args=(server.grpc_url, name, errors))
        sender.start()
        errors.get(timeout=300)
        times = texts_until(caller, lambda sender=sender: not sender.is_alive(), at_least=100)
        sender.join()
        refused = [errors.get(timeout=10) for _ in range(HOSTILE_TIMES)]
        print(f"{name}: {refused[0]}", file=sys.stderr)
        good = sum("INVALID_ARGUMENT" in error for error in refused)
        yield Verdict(Measurement(f"{name}: refused", good, "", HOSTILE_TIMES), Bar("at least", HOSTILE_TIMES))
        rise = p99_ms(times) - calm
        yield Verdict(Measurement(f"{name}: p99 of texts rises by", rise, "ms", len(times)), Bar("at most", 100))
    time.sleep(60)
    after = sizes(server)
    print(json.dumps({"before": before, "after": after}), file=sys.stderr)
    for name in before:
        growth = Measurement(f"growth of {name} a minute later", 100 * (after[name] / before[name] - 1), "%", 1)
        yield Verdict(growth, Bar("at most", 10)) if name.startswith("preprocessing") else growth


def identity_verdicts(server: TritonServer) -> Iterator[Finding]:
    """A third of the requests is cancelled or ends at its limit within a character."""
    caller, dice = Caller(server.grpc_url), random.Random(5)
    plans = []
    for number in range(REQUESTS):
        plan: dict[str, Any] = {**LOUD_OPTIONS, "seed": number % 100, "max_tokens": 24}
        kind = dice.choice(["whole", "whole", "whole", "whole", "cut", "left"])
        if kind == "cut":
            plan["max_tokens"] = dice.randint(1, 23)
        if kind == "left":
            plan["leave_after"] = dice.randint(0, 12)
        plans.append(plan)
    twins = {seed: [caller.ask(**{**LOUD_OPTIONS, "seed": seed, "max_tokens": m}).text for m in range(1, 25)]
             for seed in range(100)}  # fmt: skip
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda plan: caller.ask(**plan, request_id=dice.choice(SHARED_IDS)), plans))
    ended = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        probes = list(pool.map(lambda _: caller.ask(SUM), range(8)))
    free_s = time.perf_counter() - ended
    wrong = failed = 0
    for plan, answer in zip(plans, answers, strict=True):
        twin = twins[plan["seed"]][plan["max_tokens"] - 1]
        failed += bool(answer.error)
        wrong += not twin.startswith(answer.text) if "leave_after" in plan else answer.text != twin
    yield Verdict(Measurement("answers unlike their one-by-one twins", wrong, "", REQUESTS), Bar("at most", 0))
    yield Verdict(Measurement("requests that failed", failed, "", REQUESTS), Bar("at most", 0))
    right = sum(probe.text == "19" for probe in probes)
    yield Verdict(Measurement("right answers on all slots at once, after", right, "", 8), Bar("at least", 8))
    yield Verdict(Measurement("until they all had answered", free_s, "s", 8), Bar("at most", 1))
    yield from abandoned_verdicts(server, caller)


def abandoned_verdicts(server: TritonServer, caller: Caller) -> Iterator[Finding]:
    """16 clients without an id begin long answers over HTTP and close their connections."""
    import socket

    body = json.dumps({"text_input": "Say", "max_tokens": 900, "temperature": 50.0, "stream": True}).encode()
    head = f"POST /v2/models/nvlm/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connections = [socket.create_connection((server.choices.ports.host, server.choices.ports.http)) for _ in range(16)]
    for connection in connections:
        connection.sendall(head.encode() + body)
    time.sleep(0.5)
    for connection in connections:
        connection.close()
    started = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: caller.ask(SUM), range(8)))
    taken = time.perf_counter() - started
    yield Verdict(Measurement("all slots free after 16 closed connections", taken, "s", 16), Bar("at most", 1))


def stops_verdicts(server: TritonServer) -> Iterator[Finding]:
    """Stop strings cut from real answers at random offsets and of random lengths."""
    caller, dice = Caller(server.grpc_url), random.Random(7)
    answers = {seed: caller.ask(**LOUD_OPTIONS, seed=seed).text for seed in range(60)}

    def is_right(number: int) -> bool:
        seed = number % 60
        text = answers[seed]
        start = number * 7 % len(text)
        word = text[start : start + dice.randint(1, 6)]
        found = caller.ask(**LOUD_OPTIONS, seed=seed, stop_words=[word.encode()])
        return found.text == text[: text.index(word)] and found.reason == "stop"

    with ThreadPoolExecutor(8) as pool:
        right = sum(pool.map(is_right, range(STOPS)))
    yield Verdict(Measurement("texts that end right before the stop string", right, "", STOPS), Bar("at least", STOPS))


def characters_verdicts(server: TritonServer) -> Iterator[Finding]:
    """Over HTTP without an id, streamed and not; against the tokenizer's own decoding of the whole."""
    base = f"http://{server.choices.ports.host}:{server.choices.ports.http}/v2/models/nvlm"

    def is_valid(seed: int) -> bool:
        body = {"text_input": "Say", "max_tokens": 24, "temperature": 50.0, "seed": seed}
        streamed = post(f"{base}/generate_stream", {**body, "stream": True})
        events = [json.loads(line[6:]) for line in streamed.decode("utf-8").split("\n") if line.startswith("data: ")]
        whole = json.loads(post(f"{base}/generate", body).decode("utf-8"))
        return "".join(event["text_output"] for event in events) == whole["text_output"]

    with ThreadPoolExecutor(8) as pool:
        valid = sum(pool.map(is_valid, range(LOUD)))
    yield Verdict(Measurement("loud answers that are UTF-8, JSON and whole", valid, "", LOUD), Bar("at least", LOUD))


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as response:
        return bytes(response.read())


PARTS = {
    "limits": limits_verdicts, "identity": identity_verdicts, "stops": stops_verdicts,
    "characters": characters_verdicts,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts; all when none is named")
    parts = parser.parse_args().parts or list(PARTS)
    assets = Assets.of_checkout()
    recipe = Recipe(assets.model, load_profile("cpu"), WORKSPACE, assets.calibration)
    list(pipeline_of(recipe).run())
    found: list[Finding] = []
    with TritonServer(recipe.repository, ServerChoices(ports=Ports.free())) as server:
        for part in parts:
            for finding in PARTS[part](server):
                found.append(finding)
                print(finding, file=sys.stderr, flush=True)
    judged = [finding for finding in found if isinstance(finding, Verdict)]
    Console().print(verdict_table(judged))
    bars = [verdict.as_json() for verdict in judged]
    measured = [finding.measurement if isinstance(finding, Verdict) else finding for finding in found]
    results = {each.name: each.value for each in measured}
    print(json.dumps({"name": "abuse", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
