"""A notification from one asyncio task to others."""

import asyncio


class Notification:
    """Wakes all waiting tasks at once. Unlike a `Condition` it has no lock and may time out."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def notify(self) -> None:
        """Wake every task that waits now."""
        if self._next is not None and not self._next.done():
            self._next.set_result(None)
        self._next = None

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the next `notify`; False when it did not come within ``timeout_s``."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait([self._next], timeout=timeout_s)
        return bool(done)
