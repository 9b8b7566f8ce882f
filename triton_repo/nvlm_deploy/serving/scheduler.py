"""In-flight batching: one thread prefills new requests and advances all running ones by a token per step.

The scheduler knows neither Triton nor torch modules: tokens come from an `Engine`, answers go to a `Sink`.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nvlm_deploy.errors import MachineError
from nvlm_deploy.serving.sampling import GREEDY, Sampler, SamplingSettings
from nvlm_deploy.serving.word_list import Word, ends_with, single_tokens

logger = logging.getLogger(__name__)

CANCEL_POLL_S = 0.05


@dataclass(frozen=True)
class Generation:
    """What is to be generated after one prompt.

    `prompt` numbers visual tokens from vocab_size on; they are rows of `table` [rows, hidden]. `key` is the server's
    own name of the request; `request_id` is what its client calls it, which others may use too: only where
    `can_be_named` does it name the request to `cancel_named`.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    end_id: int
    table: torch.Tensor | None = None
    sampling: SamplingSettings = GREEDY
    stop_words: tuple[Word, ...] = ()
    bad_words: tuple[Word, ...] = ()
    request_id: str = ""
    can_be_named: bool = True
    key: int = field(default_factory=lambda: secrets.randbits(64))


@dataclass(frozen=True)
class Progress:
    """One step of an answer: the new ids, how many tokens there are so far, and whether it is the last step.

    When the model ended by itself the new ids end with the end id, which is not counted.
    """

    new_ids: tuple[int, ...]
    total: int
    is_final: bool


class Sink(Protocol):
    """Where the answer to one request goes."""

    def progress(self, step: Progress) -> None:
        """A step of the answer, in order; the one with `is_final` is the last call."""
        ...

    def fail(self, problem: Exception) -> None:
        """The request cannot be answered; the last call."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether the sink itself has ended the answer; nothing more is delivered then."""
        ...

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more. Not asked after the last call."""
        ...


class Engine(Protocol):
    """A decoder with a fixed number of KV-cache slots."""

    @property
    def slots(self) -> int:
        """How many sequences can run at once."""
        ...

    def prefill(self, slot: int, prompt: Sequence[int], table: torch.Tensor | None) -> torch.Tensor:
        """Start a sequence in a free slot; logits [vocab] after its prompt."""
        ...

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each of the running sequences; logits [sequences, vocab] after them."""
        ...

    def release(self, slot: int) -> None:
        """End the slot's sequence."""
        ...


class _Sequence:
    """One request from its arrival to its last token."""

    def __init__(self, generation: Generation, sink: Sink) -> None:
        self.generation = generation
        self.sink = sink
        self.slot = -1
        self.is_done = False
        self.is_stopped = False
        self.sampler = Sampler(
            generation.sampling,
            generation.prompt,
            end_id=generation.end_id,
            further_ends=single_tokens(generation.stop_words),
            bad_words=generation.bad_words,
        )
        self._next_poll = 0.0

    @property
    def last_token(self) -> int:
        return self.sampler.generated[-1]

    @property
    def total(self) -> int:
        return len(self.sampler.generated)

    def advance(self, logits: torch.Tensor) -> None:
        """Choose the next token and deliver it."""
        token = self.sampler.next_token(logits)
        tokens = self.sampler.generated
        if token == self.generation.end_id:
            self._deliver((token,), len(tokens) - 1, is_final=True)
        elif any(ends_with(tokens, word) for word in self.generation.stop_words):
            self._deliver((token, self.generation.end_id), len(tokens), is_final=True)
        else:
            self._deliver((token,), len(tokens), is_final=len(tokens) >= self.generation.max_tokens)

    def fail(self, problem: Exception) -> None:
        self.is_done = True
        _guarded(lambda: self.sink.fail(problem))

    def end_if_cancelled(self, now: float) -> None:
        """Asking Triton costs a round trip to its process, so not at every token; once before the first."""
        if now >= self._next_poll:
            self._next_poll = now + CANCEL_POLL_S
            self.is_stopped = self.is_stopped or self.sink.is_cancelled()
        if self.is_stopped:
            logger.info("request %r was cancelled after %d tokens", self.generation.request_id, self.total)
            self._deliver((self.generation.end_id,), self.total, is_final=True)

    def _deliver(self, new_ids: tuple[int, ...], total: int, *, is_final: bool) -> None:
        is_delivered = _guarded(lambda: self.sink.progress(Progress(new_ids, total, is_final)))
        self.is_done = is_final or not is_delivered or self.sink.has_ended


class Scheduler:
    """Runs the sequences of many requests on one engine, first come first served."""

    def __init__(self, engine: Engine, *, max_waiting: int, max_prefill_tokens: int = 8192) -> None:
        """At most `max_prefill_tokens` prompt tokens are prefilled between two decode steps (one prompt always is), so
        that running answers keep flowing; `max_num_tokens` in TensorRT-LLM."""
        self.engine = engine
        self.max_waiting = max_waiting
        self.max_prefill_tokens = max_prefill_tokens
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._free = list(range(engine.slots - 1, -1, -1))
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin to work on what is submitted."""
        self._thread.start()

    def stop(self) -> None:
        """Fail what has not ended and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, generation: Generation, sink: Sink) -> None:
        """Queue a request. Raises MachineError when `max_waiting` requests wait already."""
        sequence = _Sequence(generation, sink)
        with self._changed:
            if len(self._waiting) >= self.max_waiting:
                raise MachineError(f"{self.max_waiting} requests wait already", hint="try again later")
            self._waiting.append(sequence)
            self._changed.notify()

    def cancel(self, key: int) -> None:
        """End the request of this key at the next step; none is fine."""
        self._cancel(lambda generation: generation.key == key)

    def cancel_named(self, request_id: str) -> None:
        """End the request of this id at the next step; none is fine.

        When several clients use one id nobody can tell whose request is meant: all go on to their own end.
        """
        self._cancel(lambda generation: generation.can_be_named and generation.request_id == request_id)

    def _cancel(self, is_meant: Callable[[Generation], bool]) -> None:
        with self._changed:
            meant = [s for s in (*self._running, *self._waiting) if is_meant(s.generation)]
            if len(meant) == 1:
                meant[0].is_stopped = True

    @property
    def free_slots(self) -> int:
        """Slots without a sequence."""
        return len(self._free)

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._step()
            except Exception as problem:  # the engine failed as a whole: these requests are lost, the server is not
                logger.exception("a decoding step failed")
                for sequence in self._running:
                    sequence.fail(problem)
                self._retire()
        for sequence in (*self._running, *self._waiting):
            sequence.fail(MachineError("the server is shutting down"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._running or self._waiting)
            return not self._stopping

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        if self._running:
            slots = [sequence.slot for sequence in self._running]
            logits = self.engine.decode(slots, [sequence.last_token for sequence in self._running])
            for sequence, row in zip(self._running, logits, strict=True):
                self._advance(sequence, row)
        self._retire()

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        with self._changed:
            waiting = list(self._waiting)
        for sequence in (*self._running, *waiting):
            sequence.end_if_cancelled(now)
        with self._changed:
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.is_done)
        self._retire()

    def _admit(self) -> None:
        budget = self.max_prefill_tokens
        while (sequence := self._next_admitted(budget)) is not None:
            budget -= len(sequence.generation.prompt)
            sequence.slot = self._lowest_free_slot()
            self._running.append(sequence)
            try:
                generation = sequence.generation
                logits = self.engine.prefill(sequence.slot, generation.prompt, generation.table)
            except Exception as problem:
                logger.exception("a prefill failed")
                sequence.fail(problem)
            else:
                self._advance(sequence, logits)
            self._retire()

    def _next_admitted(self, budget: int) -> _Sequence | None:
        with self._changed:
            if not self._waiting or not self._free:
                return None
            is_first = budget == self.max_prefill_tokens
            if not is_first and len(self._waiting[0].generation.prompt) > budget:
                return None
            return self._waiting.popleft()

    def _lowest_free_slot(self) -> int:
        """Low slots first: a batch of slots 0..n-1 is a view of the cache, any other must be gathered."""
        self._free.sort(reverse=True)
        return self._free.pop()

    def _advance(self, sequence: _Sequence, logits: torch.Tensor) -> None:
        try:
            sequence.advance(logits)
        except Exception as problem:
            logger.exception("sampling failed")
            sequence.fail(problem)

    def _retire(self) -> None:
        for sequence in self._running:
            if sequence.is_done:
                self.engine.release(sequence.slot)
                self._free.append(sequence.slot)
        self._running = [sequence for sequence in self._running if not sequence.is_done]


def _guarded(call: Callable[[], None]) -> bool:
    """A sink that fails (its client is gone) must not stop the other sequences."""
    try:
        call()
    except Exception:
        logger.exception("an answer could not be delivered")
        return False
    return True
