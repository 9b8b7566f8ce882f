"""An answer as it arrives: its pieces with their times, and what it is when it has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from nvlm_deploy import tensors
from nvlm_deploy.client.wire import checked, is_final, output_values
from nvlm_deploy.errors import MachineError
from nvlm_deploy.machine.address import Route

# what a server says that names no reason at the end: older ones do so when an answer was cut at its longest length
CUT = "length"


@dataclass(frozen=True)
class Piece:
    """One streamed response. `arrived_s` is monotonic; `output_tokens` counts those of the answer so far."""

    text: str
    arrived_s: float
    output_tokens: int


@dataclass(frozen=True)
class Answer:
    """A finished answer. Times are seconds on the monotonic clock of this machine.

    `finish_reason` is the server's word: `stop` when the model ended or a stop word came, `length` when it was cut.
    """

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    sent_s: float
    ended_s: float
    pieces: tuple[Piece, ...]

    @property
    def time_to_first_token_s(self) -> float:
        """From sending to the first piece."""
        return self.pieces[0].arrived_s - self.sent_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between one piece and the next. Each piece carries one token; the last may carry only the end token."""
        return tuple(later.arrived_s - earlier.arrived_s for earlier, later in pairwise(self.pieces))

    @property
    def time_per_token_s(self) -> float | None:
        """Mean time between tokens after the first; None when there was one piece."""
        return fmean(self.gaps_s) if self.gaps_s else None

    @property
    def end_to_end_s(self) -> float:
        """From sending to the server's word that nothing more will come."""
        return self.ended_s - self.sent_s


class AnswerBuilder:
    """Collects the stream of one request."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._sent_s = time.monotonic()
        self._ended_s: float | None = None
        self._pieces: list[Piece] = []
        self._server_reason = CUT
        self._input_tokens = 0

    @property
    def text(self) -> str:
        """What has come so far."""
        return "".join(piece.text for piece in self._pieces)

    @property
    def has_begun(self) -> bool:
        """Whether any of the answer has come."""
        return bool(self._pieces)

    def add(self, message: Any) -> str:
        """Take one `ModelStreamInferResponse`; its text, empty for the one that only says the end.

        Raises the error that the server may send instead.
        """
        response = checked(self.route, message)
        arrived_s = time.monotonic()
        if is_final(response):
            self._ended_s = arrived_s
        values = output_values(self.route, response, tensors.RESPONSE_OUTPUTS)
        if values is None:
            return ""
        text: str = values[tensors.TEXT_OUTPUT.name]
        self._server_reason = values[tensors.FINISH_REASON.name] or self._server_reason
        self._input_tokens = values[tensors.INPUT_TOKEN_COUNT.name]
        so_far = self._pieces[-1].output_tokens if self._pieces else 0
        self._pieces.append(Piece(text, arrived_s, so_far + values[tensors.OUTPUT_TOKEN_COUNT.name]))
        return text

    def answer(self) -> Answer:
        """The whole answer; MachineError when the stream has ended without it."""
        if self._ended_s is None or not self._pieces:
            raise MachineError(
                f"the server at {self.route} stopped in the middle of an answer", hint="see the server's log"
            )
        return Answer(
            text=self.text,
            finish_reason=self._server_reason,
            num_input_tokens=self._input_tokens,
            num_output_tokens=self._pieces[-1].output_tokens,
            sent_s=self._sent_s,
            ended_s=self._ended_s,
            pieces=tuple(self._pieces),
        )
