"""What becomes of an answer that ends, fails, is cancelled or too late: the same in both clients."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest

from nvlm_deploy.client import AnswerCancelled, AsyncNvlmClient, NvlmClient
from nvlm_deploy.errors import MachineError, NvlmError


def test_an_answer_ends_with_the_servers_word(client) -> None:
    stream = client.ask("go")
    assert list(stream) == ["1", "9"]
    assert (stream.answer().text, stream.text) == ("19", "19")
    assert (stream.answer().finish_reason, stream.answer().num_output_tokens) == ("stop", 2)
    assert client.ask("cut").answer().finish_reason == "length"


def test_an_answer_that_was_begun_is_continued_by_answer(client) -> None:
    stream = client.ask("go")
    for text in stream:
        assert text == "1"
        break
    assert stream.text == "1"
    assert stream.answer().text == "19"


FAILURES = {
    "refuse": (NvlmError, "^no\n  hint: do not$"),
    "fail": (MachineError, "oops"),
    "cancel": (MachineError, r"failed \(CANCELLED\): the server does not want to"),
    "stop early": (MachineError, "stopped in the middle of an answer"),
}


@pytest.mark.parametrize("question", FAILURES)
def test_an_error_keeps_the_text_so_far_and_comes_again(client, question) -> None:
    kind, telling = FAILURES[question]
    stream = client.ask(question)
    for _ in range(3):
        with pytest.raises(NvlmError, match=telling) as failure:
            stream.answer()
        assert type(failure.value) is kind
        assert failure.value.partial == stream.text == "19"
    with pytest.raises(kind):
        next(stream)
    assert client.ask("go").answer().text == "19"


def test_a_deadline_keeps_the_text_so_far(client_class, triton) -> None:
    with client_class(triton.url, timeout_s=0.5) as hurried:
        with pytest.raises(MachineError, match="in time") as failure:
            hurried.ask("hang").answer()
        assert failure.value.partial == "19"
        with pytest.raises(MachineError, match="in time") as failure:
            hurried.ask("silence").answer()
        assert failure.value.partial == ""


def test_a_broken_connection_keeps_the_text_so_far(client_class, relay) -> None:
    with client_class(relay.url, timeout_s=30) as client:
        stream = client.ask("hang")
        assert [next(stream), next(stream)] == ["1", "9"]
        relay.cut()
        with pytest.raises(
            MachineError, match=f"connection to the server at {relay.url} broke in the middle"
        ) as failure:
            next(stream)
        assert failure.value.partial == "19"


def test_a_cancelled_answer_raises_one_error_of_ours_and_the_server_hears_of_it(client, triton) -> None:
    stream = client.ask("hang")
    assert next(stream) == "1"
    stream.cancel()
    for _ in range(2):
        with pytest.raises(AnswerCancelled, match=r"the answer was cancelled$") as cancelled:
            stream.answer()
        assert cancelled.value.partial == "1"
    assert isinstance(cancelled.value, NvlmError)
    assert triton.cancelled.wait(10)


@pytest.mark.parametrize("question", ["hang", "silence"])
def test_cancel_wakes_whoever_waits_for_the_answer(client, question) -> None:
    stream = client.ask(question)
    timer = threading.Timer(0.5, stream.cancel)
    timer.start()
    with pytest.raises(AnswerCancelled) as cancelled:
        stream.answer()
    timer.join()
    assert cancelled.value.partial == ("19" if question == "hang" else "")


def test_an_answer_is_cancelled_before_it_is_waited_for(client) -> None:
    stream = client.ask("silence")
    stream.cancel()
    with pytest.raises(AnswerCancelled):
        next(stream)


def test_cancelling_an_answer_that_has_ended_changes_nothing(client) -> None:
    stream = client.ask("go")
    stream.answer()
    stream.cancel()
    assert stream.answer().text == "19"
    assert list(stream) == []


def test_close_cancels_the_answers_in_flight_and_refuses_new_questions(client) -> None:
    stream = client.ask("hang")
    assert next(stream) == "1"
    client.close()
    with pytest.raises(AnswerCancelled, match="its client was closed") as cancelled:
        stream.answer()
    assert cancelled.value.partial == "1"
    for use in (lambda: client.ask("go"), lambda: client.wait_until_ready(1)):
        with pytest.raises(NvlmError, match="is closed") as refused:
            use()
        assert refused.value.exit_code == 2
    client.close()


def test_close_wakes_whoever_waits_for_an_answer(client) -> None:
    stream = client.ask("hang")
    timer = threading.Timer(0.5, client.close)
    timer.start()
    with pytest.raises(AnswerCancelled, match="its client was closed"):
        stream.answer()
    timer.join()


def test_two_threads_may_wait_for_one_answer(client) -> None:
    stream, found = client.ask("go"), []
    threads = [threading.Thread(target=lambda: found.append(stream.answer().text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == ["19"] * 4


def test_a_stream_that_nobody_holds_is_cancelled(client, triton) -> None:
    next(client.ask("hang"))
    gc.collect()
    assert triton.cancelled.wait(10)


def test_every_error_of_the_project_has_a_partial_text() -> None:
    assert NvlmError("x").partial == MachineError("x").partial == ""


# what only asyncio knows


def in_a_loop(triton, body) -> None:
    async def run() -> None:
        async with AsyncNvlmClient(triton.url, timeout_s=30) as client:
            await body(client)

    asyncio.run(run())


def test_a_task_that_is_cancelled_from_outside_sees_its_cancellation(triton) -> None:
    async def body(client: AsyncNvlmClient) -> None:
        stream = client.ask("hang")
        task = asyncio.create_task(stream.answer())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        with pytest.raises(AnswerCancelled) as cancelled:
            await stream.answer()
        assert cancelled.value.partial == "19"

    in_a_loop(triton, body)
    assert triton.cancelled.wait(10)


def test_a_timeout_of_asyncio_stays_one(triton) -> None:
    async def body(client: AsyncNvlmClient) -> None:
        stream = client.ask("hang")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await stream.answer()
        assert stream.text == "19"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.ask("silence").answer(), 0.2)

    in_a_loop(triton, body)


def test_cancelling_the_answer_does_not_cancel_the_task_that_waits_for_it(triton) -> None:
    """Not even in a task that was cancelled before and went on."""

    async def waits(stream) -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(0.2, stream.cancel)
        try:
            await stream.answer()
        except AnswerCancelled as cancelled:
            return cancelled.partial
        return "no error"

    async def body(client: AsyncNvlmClient) -> None:
        task = asyncio.create_task(waits(client.ask("hang")))
        await asyncio.sleep(0.1)
        task.cancel()
        assert await task == "19"

    in_a_loop(triton, body)


def test_an_async_client_may_be_made_before_its_loop_and_is_of_one_loop(triton) -> None:
    client = AsyncNvlmClient(triton.url)
    with pytest.raises(NvlmError, match="event loop"):
        client.ask("go")

    async def text() -> str:
        return (await client.ask("go").answer()).text

    assert asyncio.run(text()) == "19"
    with pytest.raises(NvlmError, match="another event loop"):
        asyncio.run(text())


def test_an_answer_that_nobody_waits_for_leaves_no_warning(triton, recwarn, caplog) -> None:
    async def body(client: AsyncNvlmClient) -> None:
        client.ask("hang")
        stream = client.ask("hang")
        await anext(stream)
        task = asyncio.create_task(stream.answer())
        await asyncio.sleep(0.1)
        task.cancel()

    in_a_loop(triton, body)
    gc.collect()
    assert not [str(one.message) for one in recwarn]
    assert not caplog.records


def test_the_same_words_in_both_clients(triton) -> None:
    """Every public name of one is in the other."""

    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(NvlmClient) == names(AsyncNvlmClient)
    with NvlmClient(triton.url) as client:
        stream = client.ask("go")
        stream.answer()

        async def body(other: AsyncNvlmClient) -> None:
            assert names(type(other.ask("go"))) == names(type(stream))

        in_a_loop(triton, body)


def test_a_stream_is_timed_from_its_sending(client) -> None:
    before_s = time.monotonic()
    answer = client.ask("go").answer()
    assert before_s <= answer.sent_s <= answer.pieces[0].arrived_s <= answer.ended_s
