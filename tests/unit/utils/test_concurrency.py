"""Tasks that live and die together."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest

from qwen3_distill.errors import StallError
from qwen3_distill.utils.concurrency import TaskScope, result_within, together, within


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 10))


async def forever(seen: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        seen.append("ended")


async def fail(message: str) -> None:
    await asyncio.sleep(0)
    raise ValueError(message)


def test_leaving_the_block_ends_its_tasks() -> None:
    seen: list[str] = []

    async def block() -> str:
        async with TaskScope() as scope:
            scope.spawn(forever(seen), "a")
            scope.spawn(forever(seen), "b")
            await asyncio.sleep(0)
        assert seen == ["ended", "ended"]
        return "done"

    assert run(block()) == "done"


def test_an_error_of_a_task_ends_the_block_and_the_other_tasks_and_is_raised_itself() -> None:
    seen: list[str] = []

    async def block() -> None:
        async with TaskScope() as scope:
            scope.spawn(forever(seen), "a")
            scope.spawn(fail("the task's"), "b")
            await asyncio.Event().wait()

    with pytest.raises(ValueError, match="the task's"):
        run(block())
    assert seen == ["ended"]


def test_the_first_error_is_the_one_that_is_raised() -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("while ending")

    async def block() -> None:
        async with TaskScope() as scope:
            scope.spawn(fail_when_cancelled(), "a")
            scope.spawn(fail("the first"), "b")
            await asyncio.Event().wait()

    with pytest.raises(ValueError, match="the first"):
        run(block())


def test_an_error_of_the_block_is_raised_and_ends_the_tasks() -> None:
    seen: list[str] = []

    async def block() -> None:
        async with TaskScope() as scope:
            scope.spawn(forever(seen), "a")
            await fail("the block's")

    with pytest.raises(ValueError, match="the block's"):
        run(block())
    assert seen == ["ended"]


def test_cancelling_the_block_from_outside_stays_a_cancellation() -> None:
    seen: list[str] = []

    async def block() -> None:
        async with TaskScope() as scope:
            scope.spawn(forever(seen), "a")
            await asyncio.Event().wait()

    async def outside() -> None:
        task = asyncio.create_task(block())
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        run(outside())
    assert seen == ["ended"]


def test_a_task_that_ends_by_itself_leaves_the_block_alone() -> None:
    async def block() -> int:
        async with TaskScope() as scope:
            scope.spawn(asyncio.sleep(0), "a")
            await asyncio.sleep(0.01)
            return 7

    assert run(block()) == 7


def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    seen: list[str] = []

    async def deaf_once() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        seen.append("deaf")
        await forever(seen)

    async def block() -> None:
        async with TaskScope() as scope:
            scope.spawn(deaf_once(), "a")
            await asyncio.sleep(0.01)

    run(block())
    assert seen == ["deaf", "ended"]


def test_together_is_side_by_side() -> None:
    left, right = asyncio.Event(), asyncio.Event()

    async def set_and_wait(mine: asyncio.Event, other: asyncio.Event) -> None:
        mine.set()
        await other.wait()

    run(together(set_and_wait(left, right), set_and_wait(right, left)))
    assert run(together()) == []


def test_together_returns_the_results_in_the_order_of_the_work() -> None:
    work = (asyncio.sleep(delay_s, delay_s) for delay_s in (0.03, 0.01, 0.02))
    assert run(together(*work)) == [0.03, 0.01, 0.02]


def test_an_error_of_one_is_raised_when_the_others_have_ended() -> None:
    seen: list[str] = []
    with pytest.raises(ValueError, match="the first"):
        run(together(forever(seen), fail("the first"), forever(seen)))
    assert seen == ["ended", "ended"]


def test_a_wait_says_what_it_waited_for() -> None:
    assert run(within(5, asyncio.sleep(0, "x"), "nothing")) == "x"
    with pytest.raises(StallError, match="waited 0 s for the teacher's scores"):
        run(within(0.01, asyncio.sleep(5), "the teacher's scores"))


def test_together_is_cancelled_once_and_waits_for_what_cleans_up() -> None:
    seen: list[str] = []

    async def cleans_up() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            seen.append("clean")

    async def cancel_them() -> None:
        both = asyncio.ensure_future(together(forever(seen), cleans_up()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        both.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await both

    run(cancel_them())
    assert seen == ["ended", "clean"]


@pytest.mark.parametrize("error", [None, ConnectionError("it ended")])
def test_a_cancellation_together_with_the_result_is_not_lost(error: Exception | None) -> None:
    """A start that polls a server went on for ever when the server died in the same moment."""

    async def poll(reply: "asyncio.Future[None]") -> None:
        for _ in range(1000):
            with contextlib.suppress(ConnectionError):
                await result_within(5, reply)
            await asyncio.sleep(0)

    async def cancel_it() -> None:
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        polling = asyncio.ensure_future(poll(reply))
        await asyncio.sleep(0.01)
        if error is None:
            reply.set_result(None)
        else:
            reply.set_exception(error)
        # One turn of the loop later the wait has its result, and its task does not know yet.
        await asyncio.sleep(0)
        polling.cancel()
        await asyncio.wait([polling])
        assert polling.cancelled()

    run(cancel_it())


def test_a_result_within_its_time_is_returned_and_a_late_one_is_cancelled() -> None:
    seen: list[str] = []
    assert run(result_within(5, asyncio.sleep(0, "x"))) == "x"
    with pytest.raises(asyncio.TimeoutError):
        run(result_within(0.01, forever(seen)))
    assert seen == ["ended"]
    with pytest.raises(ValueError, match="by hand"):
        run(result_within(5, fail("by hand")))


def test_what_is_cancelled_meanwhile_ends_before_the_wait_does() -> None:
    seen: list[str] = []

    async def cancel_it() -> None:
        waiting = asyncio.ensure_future(result_within(5, forever(seen)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert seen == ["ended"]

    run(cancel_it())
