"""Many workers of one kind in one process, for tests: imports take seconds, an `open` does not."""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class WorkerPool:
    """Workers by number, opened and called as the only one of a process would be.

    Args:
        kept: the newest so many are kept: a test holds a few learners at a time.
    """

    def __init__(self, make: Callable[[], Any], *, kept: int = 6) -> None:
        self._make = make
        self._kept = kept
        self._workers: OrderedDict[int, Any] = OrderedDict()

    async def call(self, number: int, method: str, *arguments: Any) -> Any:
        worker = self._workers.setdefault(number, self._make())
        self._workers.move_to_end(number)
        while len(self._workers) > self._kept:
            self._workers.popitem(last=False)
        result = getattr(worker, method)(*arguments)
        return await result if inspect.isawaitable(result) else result

    def drop(self, number: int) -> None:
        self._workers.pop(number, None)
