"""AsyncNvlmClient: the same as NvlmClient for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from nvlm_deploy.client.answer import Answer, AnswerBuilder
from nvlm_deploy.client.request import Generation, Image, input_tensors
from nvlm_deploy.client.sync import DEFAULT_TIMEOUT_S, DEFAULT_URL
from nvlm_deploy.client.wire import (
    async_channel_to,
    infer_request,
    rpc_errors,
    service_on,
)


class AsyncNvlmClient:
    """One connection to a server, for the event loop it is made in; any number of answers at a time.

    async with AsyncNvlmClient() as client:
        async for piece in client.ask("What is 12 plus 7?"): ...
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """As NvlmClient's."""
        self.url = url
        self.timeout_s = timeout_s
        self._channel = async_channel_to(url)
        self._service = service_on(self._channel)

    def ask(
        self, question: str, images: Sequence[Image] = (), generation: Generation | None = None
    ) -> AsyncAnswerStream:
        """As NvlmClient.ask; nothing is awaited before the first piece."""
        generation = generation or Generation()
        request = infer_request(input_tensors(question, images, generation))
        builder = AnswerBuilder(self.url, generation)
        call = self._service.ModelStreamInfer(_only(request), timeout=self.timeout_s)
        return AsyncAnswerStream(call, builder)

    async def close(self) -> None:
        """Close the connection; answers in flight are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncNvlmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncAnswerStream:
    """As AnswerStream, with `async for` and `await`."""

    def __init__(self, call: Any, builder: AnswerBuilder) -> None:
        self._call = call
        self._builder = builder
        self._texts = self._received()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._texts

    async def answer(self) -> Answer:
        """Wait for what has not come yet, then the whole answer."""
        async for _ in self._texts:
            pass
        return self._builder.answer()

    def cancel(self) -> None:
        """Tell the server that nobody listens any more; does nothing to an answer that has ended."""
        self._call.cancel()

    async def _received(self) -> AsyncIterator[str]:
        try:
            with rpc_errors(self._builder.url):
                async for message in self._call:
                    text = self._builder.add(message)
                    if text:
                        yield text
        finally:
            self._call.cancel()
        self._builder.answer()  # raises when it is not whole


async def _only(request: Any) -> AsyncIterator[Any]:
    yield request
