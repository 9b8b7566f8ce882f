"""In-flight batching, with an engine that counts instead of thinking."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from nvlm_deploy.errors import MachineError
from nvlm_deploy.serving.scheduler import Generation, Progress, Scheduler

VOCABULARY = 200
END = 99


class CountingEngine:
    """Its best token is always the last one plus 1."""

    def __init__(self, slots: int = 4) -> None:
        self.slots = slots
        self.busy: set[int] = set()
        self.batches: list[int] = []
        self.steps: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def prefill(self, slot: int, prompt: Sequence[int], table) -> torch.Tensor:
        assert slot not in self.busy
        self.busy.add(slot)
        self.steps.append(f"prefill {len(prompt)}")
        if prompt[-1] == 66:
            raise ValueError("this prompt breaks the engine")
        return self._logits(prompt[-1])

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        assert self.gate.wait(10)
        assert set(slots) <= self.busy
        self.batches.append(len(slots))
        self.steps.append("decode")
        if 150 in tokens:
            raise ValueError("this batch breaks the engine")
        return torch.stack([self._logits(token) for token in tokens])

    def release(self, slot: int) -> None:
        self.busy.remove(slot)

    def _logits(self, token: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(token + 1), VOCABULARY).float()


class ListSink:
    def __init__(self) -> None:
        self.steps: list[Progress] = []
        self.problem: Exception | None = None
        self.cancelled = False
        self.has_ended = False
        self.done = threading.Event()

    def progress(self, step: Progress) -> None:
        assert not self.done.is_set()
        self.steps.append(step)
        if step.is_final:
            self.done.set()

    def fail(self, problem: Exception) -> None:
        self.problem = problem
        self.done.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    @property
    def ids(self) -> list[int]:
        assert self.done.wait(10)
        return [token for step in self.steps for token in step.new_ids]


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def scheduler(engine):
    scheduler = Scheduler(engine, max_waiting=1000)
    scheduler.start()
    yield scheduler
    engine.gate.set()
    scheduler.stop()
    assert not engine.busy


def submit(scheduler: Scheduler, first: int, max_tokens: int = 5, sink: ListSink | None = None, **more) -> ListSink:
    sink = sink or ListSink()
    scheduler.submit(Generation((first,), max_tokens, END, **more), sink)
    return sink


def test_a_request_gets_max_tokens_one_per_step(scheduler) -> None:
    sink = submit(scheduler, 10, 5)
    assert sink.ids == [11, 12, 13, 14, 15]
    assert [step.total for step in sink.steps] == [1, 2, 3, 4, 5]
    assert [step.is_final for step in sink.steps] == [False] * 4 + [True]


def test_one_token_needs_no_decoding(scheduler, engine) -> None:
    assert submit(scheduler, 10, 1).ids == [11]
    assert not engine.batches


def test_the_end_id_ends_an_answer_and_is_not_counted(scheduler) -> None:
    sink = submit(scheduler, 96, 50)
    assert sink.ids == [97, 98, END]
    assert sink.steps[-1].total == 2


def test_a_stop_word_ends_an_answer_with_the_end_id_behind_it(scheduler) -> None:
    sink = submit(scheduler, 10, 50, stop_words=((13, 14), (80,)))
    assert sink.ids == [11, 12, 13, 14, END]
    assert sink.steps[-1].total == 4


def test_running_requests_are_decoded_together(scheduler, engine) -> None:
    engine.gate.clear()
    sinks = [submit(scheduler, 10 * number, 8) for number in range(1, 5)]
    engine.gate.set()
    assert [sink.ids[0] for sink in sinks] == [11, 21, 31, 41]
    assert max(engine.batches) == 4
    assert [len(sink.ids) for sink in sinks] == [8] * 4


def test_more_requests_than_slots_wait_their_turn(scheduler, engine) -> None:
    sinks = [submit(scheduler, number, 3) for number in range(40)]
    assert [sink.ids for sink in sinks] == [[n + 1, n + 2, n + 3] for n in range(40)]
    assert max(engine.batches) <= engine.slots


def test_prefill_work_between_two_steps_is_bounded() -> None:
    engine = CountingEngine(slots=4)
    scheduler = Scheduler(engine, max_waiting=10, max_prefill_tokens=25)
    engine.gate.clear()
    sinks = [ListSink() for _ in range(4)]
    for sink in sinks:
        scheduler.submit(Generation((1,) * 20, 3, END), sink)
    scheduler.start()
    engine.gate.set()
    assert [len(sink.ids) for sink in sinks] == [3] * 4
    scheduler.stop()
    assert engine.steps[:4] == ["prefill 20", "decode", "prefill 20", "decode"]


def test_a_prompt_beyond_the_bound_still_runs() -> None:
    scheduler = Scheduler(CountingEngine(), max_waiting=10, max_prefill_tokens=5)
    scheduler.start()
    sink = ListSink()
    scheduler.submit(Generation((1,) * 20, 2, END), sink)
    assert sink.ids == [2, 3]
    scheduler.stop()


def test_a_failing_prefill_fails_its_request_only(scheduler) -> None:
    bad, good = submit(scheduler, 66), submit(scheduler, 10)
    assert good.ids == [11, 12, 13, 14, 15]
    assert bad.done.wait(10)
    assert "breaks the engine" in str(bad.problem)


def test_a_failing_step_fails_what_runs_and_the_next_request_works(scheduler) -> None:
    bad = submit(scheduler, 148, 20)
    assert bad.done.wait(10)
    assert isinstance(bad.problem, ValueError)
    assert submit(scheduler, 10, 2).ids == [11, 12]


def test_a_sink_that_cannot_deliver_frees_its_slot(scheduler, engine) -> None:
    class Gone(ListSink):
        def progress(self, step: Progress) -> None:
            raise ConnectionError("the client is gone")

    submit(scheduler, 10, 50, sink=Gone())
    assert submit(scheduler, 20, 3).ids == [21, 22, 23]
    assert max(engine.batches, default=1) == 1


def test_a_cancelled_request_ends_and_frees_its_slot(scheduler, engine) -> None:
    engine.gate.clear()
    sink = submit(scheduler, 1, 90)
    sink.cancelled = True
    threading.Timer(0.1, engine.gate.set).start()
    assert sink.ids[-1] == END
    assert len(sink.ids) < 50


def test_cancelling_by_id_ends_the_running_or_waiting_request_of_that_id(scheduler, engine) -> None:
    engine.gate.clear()
    sinks = [submit(scheduler, 1, 90, request_id=f"{number}") for number in range(8)]
    for number in range(1, 8, 2):
        scheduler.cancel_named(f"{number}")
    engine.gate.set()
    lengths = [len(sink.ids) for sink in sinks]
    assert all(length < 50 for length in lengths[1::2])
    assert all(length == 90 for length in lengths[::2])


def test_a_key_names_one_request_among_many_of_one_id(scheduler, engine) -> None:
    engine.gate.clear()
    sinks = [ListSink() for _ in range(3)]
    generations = [Generation((10,), 5, END, request_id="same") for _ in sinks]
    for generation, sink in zip(generations, sinks, strict=True):
        scheduler.submit(generation, sink)
    scheduler.cancel(generations[1].key)
    engine.gate.set()
    assert [len(sink.ids) == 5 for sink in sinks] == [True, False, True]


def test_a_sink_that_has_ended_the_answer_frees_its_slot(scheduler, engine) -> None:
    class OneToken(ListSink):
        def progress(self, step: Progress) -> None:
            super().progress(step)
            self.has_ended = True
            self.done.set()

    sink = submit(scheduler, 10, 5, OneToken())
    assert sink.ids == [11]
    assert submit(scheduler, 20, 2).ids == [21, 22]
    assert not engine.busy


def test_cancelling_an_id_that_two_clients_use_ends_nobodys_answer(scheduler, engine) -> None:
    engine.gate.clear()
    sinks = [submit(scheduler, 1, 90, request_id="1") for _ in range(2)]
    scheduler.cancel_named("1")
    engine.gate.set()
    assert [len(sink.ids) for sink in sinks] == [90, 90]


def test_a_full_queue_is_refused(engine) -> None:
    scheduler = Scheduler(engine, max_waiting=2)
    for _ in range(2):
        submit(scheduler, 1)
    with pytest.raises(MachineError, match="2 requests wait already"):
        submit(scheduler, 1)


def test_stopping_fails_what_has_not_ended(engine) -> None:
    scheduler = Scheduler(engine, max_waiting=100)
    scheduler.start()
    engine.gate.clear()
    sinks = [submit(scheduler, 1, 90) for _ in range(6)]
    threading.Timer(0.1, engine.gate.set).start()
    scheduler.stop()
    assert all(sink.done.is_set() for sink in sinks)
    assert any("shutting down" in str(sink.problem) for sink in sinks)


def test_slots_come_back_after_many_requests(scheduler, engine) -> None:
    sinks = [submit(scheduler, number % 60, 1 + number % 7) for number in range(300)]
    for number, sink in enumerate(sinks):
        sink.cancelled = number % 5 == 0
    assert all(sink.done.wait(20) for sink in sinks)
    submit(scheduler, 1, 1).done.wait(10)
    assert scheduler.free_slots == engine.slots
