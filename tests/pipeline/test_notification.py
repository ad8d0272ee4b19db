"""A notification wakes those who wait, and no one later."""

import asyncio

from qwen3_distill.pipeline.notification import Notification


def test_every_waiting_task_is_woken_once() -> None:
    async def scenario() -> None:
        notification = Notification()
        waiting = [asyncio.create_task(notification.wait(5)) for _ in range(2)]
        await asyncio.sleep(0)
        notification.notify()
        assert await asyncio.gather(*waiting) == [True, True]
        assert await notification.wait(0.01) is False

    asyncio.run(scenario())


def test_a_wait_that_timed_out_leaves_the_next_one_intact() -> None:
    async def scenario() -> None:
        notification = Notification()
        assert await notification.wait(0.01) is False
        waiting = asyncio.create_task(notification.wait(5))
        await asyncio.sleep(0)
        notification.notify()
        notification.notify()
        assert await waiting is True

    asyncio.run(scenario())
