"""NvlmClient: ask, and iterate over the pieces of the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from nvlm_deploy.client.answer import Answer
from nvlm_deploy.client.channel import channel_to
from nvlm_deploy.client.exchange import DEFAULT_TIMEOUT_S, DEFAULT_URL, Client, Readiness, Stream
from nvlm_deploy.client.generation import Generation
from nvlm_deploy.client.images import Image
from nvlm_deploy.client.wire import readiness_request, service_on


class NvlmClient(Client):
    """One connection to a server; may be shared by threads.

    with NvlmClient("localhost:8001") as client:
        for piece in client.ask("What is in the picture?", ["cat.jpg"]):
            print(piece, end="")
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """`url` is HOST:PORT of the gRPC service; `timeout_s` bounds one whole answer. Connects on first use.

        Raises NvlmError for an address or a time that is none. Proxies of the environment are used as gRPC does
        (`grpc_proxy`, `https_proxy`, `http_proxy`), but never to reach this machine itself.
        """
        super().__init__(url, timeout_s)
        self._channel = channel_to(self.route)
        self._service = service_on(self._channel)

    def ask(
        self, question: str, images: Image | Sequence[Image] = (), generation: Generation | None = None
    ) -> AnswerStream:
        """Send a question with images and stream the answer.

        An image is a path, the bytes of a file, an open binary file (read from where it stands), a PIL image or a
        uint8 array. Raises NvlmError at once for what cannot be sent. What the server says is raised while iterating:
        NvlmError for a request it refuses, MachineError when it cannot be reached, fails, or takes longer than
        `timeout_s`, AnswerCancelled after `cancel()` or `close()`; the error's `partial` is the text that had come.
        """
        request = self.request(question, images, generation)
        try:
            call = self._service.ModelStreamInfer(iter([request]), timeout=self.timeout_s)
        except ValueError:  # another thread has closed the channel
            self.require_open()
            raise
        return AnswerStream(self, call)

    def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Return when the server can answer; MachineError that says what is missing when it cannot by then."""
        import grpc  # type: ignore[import-untyped, unused-ignore]

        waiting = Readiness(self, timeout_s)
        problem, response = None, None
        while True:
            try:
                problem, response = None, self._service.ModelReady(readiness_request(), timeout=waiting.patience_s)
            except grpc.RpcError as failure:
                problem = failure
            if waiting.is_reached(problem, response):
                return
            time.sleep(waiting.PAUSE_S)
            self.require_open()

    def close(self) -> None:
        """Close the connection; answers in flight are cancelled."""
        self.is_closed = True
        self._channel.close()

    def __enter__(self) -> NvlmClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AnswerStream(Stream):
    """Iterates over the pieces of one answer; `answer()` is the whole of it, `text` what has come so far."""

    def __init__(self, client: NvlmClient, call: Any) -> None:
        super().__init__(client, call)
        self._turn = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._turn:
            while not self._has_ended:
                with self._failing_for_good():
                    if text := self._take(next(self._call, None)):
                        return text
        raise StopIteration

    def answer(self) -> Answer:
        """Wait for what has not come yet, then the whole answer."""
        for _ in self:
            pass
        return self._whole()
