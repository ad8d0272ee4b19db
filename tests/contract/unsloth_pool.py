"""Many learners in one unsloth process, for tests: importing unsloth takes 10 s, opening 0.2 s."""

import inspect
from collections import OrderedDict
from typing import Any

from qwen3_distill.hosts.process import serve_worker
from qwen3_distill.training.unsloth.worker import UnslothWorker

KEPT = 6
"""A test holds a few at a time."""


class UnslothPool:
    """The real workers by number, opened and called as the only one of a process would be."""

    def __init__(self) -> None:
        self._workers: OrderedDict[int, UnslothWorker] = OrderedDict()

    async def call(self, number: int, method: str, *arguments: Any) -> Any:
        worker = self._workers.setdefault(number, UnslothWorker())
        self._workers.move_to_end(number)
        while len(self._workers) > KEPT:
            self._workers.popitem(last=False)
        result = getattr(worker, method)(*arguments)
        return await result if inspect.isawaitable(result) else result

    def drop(self, number: int) -> None:
        self._workers.pop(number, None)


if __name__ == "__main__":
    serve_worker(UnslothPool())
