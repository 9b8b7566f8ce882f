"""NvlmClient and AsyncNvlmClient behind the same methods, so that one test is for both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from typing import Any

from nvlm_deploy.client import AsyncNvlmClient, NvlmClient

PATIENCE_S = 120
_END = object()


class Blocking:
    """AsyncNvlmClient in an event loop of its own thread, with NvlmClient's methods."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.inner = AsyncNvlmClient(*arguments, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def wait(self, awaited: Awaitable[Any]) -> Any:
        async def result() -> Any:
            return await awaited

        return asyncio.run_coroutine_threadsafe(result(), self._loop).result(PATIENCE_S)

    def ask(self, *arguments: Any, **options: Any) -> BlockingStream:
        async def ask() -> Any:
            return self.inner.ask(*arguments, **options)

        return BlockingStream(self, self.wait(ask()))

    def wait_until_ready(self, timeout_s: float) -> None:
        self.wait(self.inner.wait_until_ready(timeout_s))

    def close(self) -> None:
        self.wait(self.inner.close())

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlockingStream:
    def __init__(self, client: Blocking, inner: Any) -> None:
        self._client = client
        self.inner = inner

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        async def following() -> Any:
            return await anext(self.inner, _END)

        text = self._client.wait(following())
        if text is _END:
            raise StopIteration
        return text

    def answer(self) -> Any:
        return self._client.wait(self.inner.answer())

    def cancel(self) -> None:
        async def cancel() -> None:
            self.inner.cancel()

        self._client.wait(cancel())

    @property
    def text(self) -> str:
        return self.inner.text


BOTH = {"sync": NvlmClient, "async": Blocking}
