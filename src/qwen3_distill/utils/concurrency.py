"""Groups of tasks that end together, and waits with a time limit that name what they wait for."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from typing_extensions import Self

from qwen3_distill.errors import StallError

Result = TypeVar("Result")
Work: TypeAlias = Callable[[], Coroutine[Any, Any, None]]

_CANCEL_AGAIN_S = 0.2


class TaskScope:
    """Background tasks of one block: none outlives it, and an error of one ends the block.

    Like `asyncio.TaskGroup` of Python 3.11, except that leaving the block cancels its tasks, and
    the first error is raised by itself, not in a group.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._error: BaseException | None = None
        self._block: asyncio.Task[Any] | None = None
        self._interrupted = False

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run ``work`` until it ends or the block is left."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def __aenter__(self) -> Self:
        self._block = asyncio.current_task()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._block = None
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            # More than once: up to Python 3.11, `asyncio.wait_for`, which libraries use, loses a
            # cancellation that comes together with the result, and the task continues.
            await asyncio.wait(self._tasks, timeout=_CANCEL_AGAIN_S)
        if self._error is not None and (
            error is None or (self._interrupted and isinstance(error, asyncio.CancelledError))
        ):
            raise self._error

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None or self._error is not None:
            return
        self._error = error
        if self._block is not None:  # else it is being left anyway
            self._interrupted = True
            self._block.cancel()


async def together(*work: Coroutine[Any, Any, Result]) -> list[Result]:
    """Run all coroutines concurrently; return their results in order.

    When one fails, the others are cancelled, and its error is raised once they have ended.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    if not tasks:
        return []
    try:
        # Unlike gather it does not cancel them: a second cancellation would interrupt clean-up.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in done:
            task.result()  # raises the error of one that failed
    return [task.result() for task in tasks]


async def in_turn(*work: tuple[Work, Work]) -> None:
    """Run all work; each begins when the one before says so, at the latest when that has ended.

    When one fails, the others are cancelled, and its error is raised once they have ended.

    Args:
        work: what is to be done, and what ends when the next may begin. The second is cancelled
            when the first has ended, so it may wait for ever.
    """
    gates = [asyncio.Event() for _ in range(len(work) + 1)]
    gates[0].set()

    async def open_gate(until: Work, gate: asyncio.Event) -> None:
        await until()
        gate.set()

    async def run(index: int, do: Work, until: Work) -> None:
        await gates[index].wait()
        async with TaskScope() as scope:
            scope.spawn(open_gate(until, gates[index + 1]), "what the next one waits for")
            await do()
        gates[index + 1].set()

    await together(*(run(index, do, until) for index, (do, until) in enumerate(work)))


async def forever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


async def within(timeout_s: float, work: Awaitable[Result], what: str) -> Result:
    """Await ``work`` and return its result.

    Raises:
        StallError: it took longer than ``timeout_s``; ``what`` names it.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=timeout_s)
    finally:
        task.cancel()  # no effect once it has ended
    if not done:
        raise StallError(f"waited {timeout_s:.0f} s for {what}")
    return task.result()


async def result_within(timeout_s: float, work: Awaitable[Result]) -> Result:
    """Await ``work``, cancel it after ``timeout_s``, and return its result.

    Unlike `asyncio.wait_for` before Python 3.12 it never loses a cancellation that comes together
    with the result: a loop around it would go on for ever.

    Raises:
        asyncio.TimeoutError: it took longer; it has ended by then.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=timeout_s)
    except asyncio.CancelledError:
        await _end(task)
        raise
    if not done:
        await _end(task)
        raise asyncio.TimeoutError
    return task.result()


async def _end(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
