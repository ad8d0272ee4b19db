"""A worker for tests: answers, streams, fails, dies and hangs on request. Imports no engine."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

from qwen3_distill.errors import DataError
from qwen3_distill.hosts.serve import serve_worker


class Echo:
    """What the worker serves."""

    _ticking = 0

    def add(self, left: int, right: int) -> int:
        return left + right

    async def after(self, delay_s: float, value: str) -> str:
        await asyncio.sleep(delay_s)
        return value

    async def count(self, stop: int) -> AsyncIterator[int]:
        for value in range(stop):
            await asyncio.sleep(0)
            yield value

    async def ticks(self) -> AsyncIterator[int]:
        self._ticking = 1
        try:
            for tick in range(10**9):
                yield tick
                await asyncio.sleep(0.01)
        finally:
            self._ticking = 0

    def num_ticking(self) -> int:
        return self._ticking

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def size(self, data: bytes) -> int:
        return len(data)

    def pid(self) -> int:
        return os.getpid()

    def known_error(self) -> None:
        raise DataError("row 7 is odd")

    def unknown_error(self) -> None:
        raise ZeroDivisionError("by hand")

    def block(self, duration_s: float) -> str:
        """Keep the event loop from everything else."""
        time.sleep(duration_s)
        return "done"

    def die(self) -> None:
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve_worker(Echo())
