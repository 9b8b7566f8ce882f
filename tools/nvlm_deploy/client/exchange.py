"""What both clients share: all but the waiting, which one does in a thread and the other in an event loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from nvlm_deploy.client.answer import Answer, AnswerBuilder
from nvlm_deploy.client.generation import Generation
from nvlm_deploy.client.images import Image
from nvlm_deploy.client.request import input_tensors
from nvlm_deploy.client.status import error_from_status
from nvlm_deploy.client.values import seconds
from nvlm_deploy.client.wire import ENSEMBLE, infer_request
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.machine.address import Route, address_from

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 300.0


class AnswerCancelled(NvlmError):  # noqa: N818  # as asyncio.CancelledError: what happened, not a fault
    """The answer was cancelled by its `cancel()`, or by closing the client; `partial` is the text that had come."""

    exit_code = 130


class Client:
    """Where a client asks and how long it waits, and whether it still may."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.route = Route.to(address_from(url))
        self.timeout_s = seconds("timeout_s", timeout_s)
        self.is_closed = False

    @property
    def url(self) -> str:
        """HOST:PORT of the server."""
        return str(self.route.address)

    def require_open(self) -> None:
        """Raise NvlmError after `close`."""
        if self.is_closed:
            raise NvlmError(f"this client of {self.url} is closed", hint="make a new one, or ask before close()")

    def request(self, question: str, images: Image | Sequence[Image], generation: Generation | None) -> Any:
        """The message to send; NvlmError for what cannot be asked, and after `close`."""
        self.require_open()
        return infer_request(input_tensors(question, images, generation))


class Stream:
    """The state of one answer: what has come, and whether it goes on, has ended or failed.

    An error is raised again on every later use, with the text so far as its `partial`.
    """

    def __init__(self, client: Client, call: Any) -> None:
        self._client = client
        self._call = call
        self._builder = AnswerBuilder(client.route)
        self._is_cancelled = False
        self._has_ended = False
        self._problem: NvlmError | None = None

    @property
    def text(self) -> str:
        """The text that has come so far."""
        return self._builder.text

    def cancel(self) -> None:
        """Tell the server that nobody listens any more; does nothing to an answer that has ended.

        Whoever waits for the answer gets AnswerCancelled.
        """
        if not self._has_ended:
            self._is_cancelled = True
        self._call.cancel()

    @contextlib.contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """Turn what goes wrong into one error of ours, and raise that from now on."""
        import grpc  # type: ignore[import-untyped, unused-ignore]

        try:
            self._require_going()
            yield
        except grpc.RpcError as problem:
            raise self._failed(self._meaning_of(problem)) from None
        except NvlmError as problem:
            raise self._failed(problem) from problem.__cause__
        except BaseException:  # Ctrl-C, or the task that waits was cancelled
            self.cancel()
            raise

    def _require_going(self) -> None:
        if self._problem is not None:
            raise self._problem
        if self._is_cancelled or self._client.is_closed:
            raise self._cancelled()

    def _meaning_of(self, problem: Any) -> NvlmError:
        code = problem.code().name
        if code == "CANCELLED" and (self._is_cancelled or self._client.is_closed):
            return self._cancelled()
        details = problem.details() or "no details"
        return error_from_status(self._client.route, code, details, has_begun=self._builder.has_begun)

    def _cancelled(self) -> AnswerCancelled:
        how = "" if self._is_cancelled else ": its client was closed"
        return AnswerCancelled(f"the answer was cancelled{how}")

    def _failed(self, problem: NvlmError) -> NvlmError:
        problem.partial = self.text
        self._problem = problem
        self._call.cancel()
        return problem

    def _take(self, message: Any | None) -> str:
        """The text of one message; None is the end of the stream, and an error when the answer is not whole."""
        if message is not None:
            return self._builder.add(message)
        self._builder.answer()
        self._has_ended = True
        return ""

    def _whole(self) -> Answer:
        return self._builder.answer()


class Readiness:
    """Waiting for a server: how long yet, and what it said last."""

    PAUSE_S = 0.2
    _MOST_PATIENCE_S = 5.0

    def __init__(self, client: Client, timeout_s: float) -> None:
        client.require_open()
        self._route = client.route
        self._timeout_s = seconds("timeout_s", timeout_s)
        self._deadline_s = time.monotonic() + self._timeout_s
        self._last: NvlmError | None = None

    @property
    def patience_s(self) -> float:
        """For how long one question may wait for its answer."""
        return min(self._MOST_PATIENCE_S, max(0.1, self._deadline_s - time.monotonic()))

    def is_reached(self, problem: Any, response: Any) -> bool:
        """Judge one try, an error or an answer; MachineError when it failed and no time is left for another."""
        if problem is None and response.ready:
            return True
        if problem is not None:
            self._last = error_from_status(self._route, problem.code().name, problem.details() or "no details")
        else:
            self._last = NvlmError(f"the server at {self._route} runs, but its model {ENSEMBLE} is not ready")
        if time.monotonic() < self._deadline_s:
            return False
        raise MachineError(
            f"no server was ready within {self._timeout_s:g} s: {self._last.message}", hint=self._last.hint
        )
