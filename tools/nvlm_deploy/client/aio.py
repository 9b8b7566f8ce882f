"""AsyncNvlmClient: the same as NvlmClient for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from nvlm_deploy.client.answer import Answer
from nvlm_deploy.client.channel import async_channel_to
from nvlm_deploy.client.exchange import DEFAULT_TIMEOUT_S, DEFAULT_URL, Client, Readiness, Stream
from nvlm_deploy.client.generation import Generation
from nvlm_deploy.client.images import Image
from nvlm_deploy.client.wire import readiness_request, service_on
from nvlm_deploy.errors import NvlmError


class AsyncNvlmClient(Client):
    """One connection to a server, for the event loop that it is first used in; any number of answers at a time.

    async with AsyncNvlmClient() as client:
        async for piece in client.ask("What is 12 plus 7?"): ...
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """As NvlmClient's."""
        super().__init__(url, timeout_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: Any = None
        self._service: Any = None

    def ask(
        self, question: str, images: Image | Sequence[Image] = (), generation: Generation | None = None
    ) -> AsyncAnswerStream:
        """As NvlmClient.ask; nothing is awaited before the first piece. NvlmError outside of its event loop."""
        request = self.request(question, images, generation)
        self._connect()
        return AsyncAnswerStream(self, self._service.ModelStreamInfer(_only(request), timeout=self.timeout_s))

    async def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """As NvlmClient.wait_until_ready."""
        import grpc  # type: ignore[import-untyped, unused-ignore]

        waiting = Readiness(self, timeout_s)
        problem, response = None, None
        while True:
            self._connect()
            try:
                call = self._service.ModelReady(readiness_request(), timeout=waiting.patience_s)
                problem, response = None, await call
            except grpc.RpcError as failure:
                problem = failure
            if waiting.is_reached(problem, response):
                return
            await asyncio.sleep(waiting.PAUSE_S)
            self.require_open()

    async def close(self) -> None:
        """Close the connection; answers in flight are cancelled."""
        self.is_closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncNvlmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _connect(self) -> None:
        """Make the channel in the running loop: gRPC's belongs to one."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            raise NvlmError(
                "AsyncNvlmClient asks in a running event loop only", hint="use it in a coroutine, or use NvlmClient"
            ) from None
        if self._loop is None:
            self._loop = running
            self._channel = async_channel_to(self.route)
            self._service = service_on(self._channel)
        if self._loop is not running:
            raise NvlmError("this AsyncNvlmClient belongs to another event loop", hint="make one in each event loop")


class AsyncAnswerStream(Stream):
    """As AnswerStream, with `async for` and `await`. A task that is cancelled while it waits cancels the answer."""

    def __init__(self, client: AsyncNvlmClient, call: Any) -> None:
        super().__init__(client, call)
        self._loop = asyncio.get_running_loop()
        self._messages = call.__aiter__()
        self._turn = asyncio.Lock()

    def __del__(self) -> None:
        """Cancel an answer that nobody holds any more: gRPC's own object is kept alive by the loop."""
        if not self._has_ended and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        async with self._turn:
            while not self._has_ended:
                with self._failing_for_good():
                    if text := self._take(await self._message()):
                        return text
        raise StopAsyncIteration

    async def answer(self) -> Answer:
        """Wait for what has not come yet, then the whole answer."""
        async for _ in self:
            pass
        return self._whole()

    async def _message(self) -> Any | None:
        """The next message, None at the end.

        It is read in a task of its own. gRPC raises CancelledError when the call is cancelled; here that means the
        call, and a CancelledError of `wait` the task that asks, which must see it.
        """
        reading = asyncio.ensure_future(anext(self._messages, None))
        try:
            await asyncio.wait([reading])
        except asyncio.CancelledError:
            reading.cancel()
            raise
        if reading.cancelled():
            raise self._cancelled()
        return reading.result()


async def _only(request: Any) -> AsyncIterator[Any]:
    yield request
