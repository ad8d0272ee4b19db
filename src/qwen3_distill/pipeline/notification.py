"""Wakes tasks."""

import asyncio


class Notification:
    """Wakes those who wait for a change."""

    def __init__(self) -> None:
        self._change: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)
        self._change = None

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Until the next ring; False when there was none in time."""
        if self._change is None:
            self._change = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait([self._change], timeout=timeout_s)
        return bool(done)
