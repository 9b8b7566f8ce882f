"""NvlmClient: ask, and iterate over the pieces of the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nvlm_deploy.client.answer import Answer, AnswerBuilder
from nvlm_deploy.client.request import Generation, Image, input_tensors
from nvlm_deploy.client.wire import (
    channel_to,
    infer_request,
    rpc_errors,
    service_on,
)

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 300.0


class NvlmClient:
    """One connection to a server; may be shared by threads.

    with NvlmClient("localhost:8001") as client:
        for piece in client.ask("What is in the picture?", [Path("cat.jpg")]):
            print(piece, end="")
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """`url` is host:port of the gRPC service; `timeout_s` bounds one whole answer. Connects on first use."""
        self.url = url
        self.timeout_s = timeout_s
        self._channel = channel_to(url)
        self._service = service_on(self._channel)

    def ask(self, question: str, images: Sequence[Image] = (), generation: Generation | None = None) -> AnswerStream:
        """Send a question with encoded images (or their paths) and stream the answer.

        Raises NvlmError at once for an unreadable image; what the server says is raised while iterating: NvlmError for
        a request it refuses, MachineError when it cannot be reached, fails, or takes longer than `timeout_s`.
        """
        generation = generation or Generation()
        request = infer_request(input_tensors(question, images, generation))
        builder = AnswerBuilder(self.url, generation)
        call = self._service.ModelStreamInfer(iter([request]), timeout=self.timeout_s)
        return AnswerStream(call, builder)

    def close(self) -> None:
        """Close the connection; answers in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> NvlmClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AnswerStream:
    """Iterates over the pieces of one answer; `answer()` is the whole of it."""

    def __init__(self, call: Any, builder: AnswerBuilder) -> None:
        self._call = call
        self._builder = builder
        self._texts = self._received()

    def __iter__(self) -> Iterator[str]:
        return self._texts

    def answer(self) -> Answer:
        """Wait for what has not come yet, then the whole answer."""
        for _ in self._texts:
            pass
        return self._builder.answer()

    def cancel(self) -> None:
        """Tell the server that nobody listens any more; does nothing to an answer that has ended."""
        self._call.cancel()

    def _received(self) -> Iterator[str]:
        try:
            with rpc_errors(self._builder.url):
                for message in self._call:
                    text = self._builder.add(message)
                    if text:
                        yield text
        finally:
            self._call.cancel()
        self._builder.answer()  # raises when it is not whole
