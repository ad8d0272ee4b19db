"""Several teachers as one: started and closed together, with the sums of their counters."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from qwen3_distill.ports import TeacherScorer
from qwen3_distill.types import ModelIdentity
from qwen3_distill.utils.concurrency import forever, in_turn, together


class _Closable(Protocol):
    async def close(self) -> None: ...


class TeacherGroup:
    """Teachers that are started and closed as one. A subclass says which of them scores a job.

    Args:
        members: at least one.
    """

    def __init__(self, members: Sequence[TeacherScorer]) -> None:
        self.members = tuple(members)
        self._memory_taken = asyncio.Event()

    @property
    def identity(self) -> ModelIdentity:
        """The first member's; what the student must share with it, all of them share."""
        return self.members[0].identity

    @property
    def max_dropped_fraction(self) -> float:
        return min(teacher.max_dropped_fraction for teacher in self.members)

    @property
    def starts_first(self) -> bool:
        return any(teacher.starts_first for teacher in self.members)

    async def memory_taken(self) -> None:
        await self._memory_taken.wait()

    async def start(self) -> None:
        """Start all; those whose memory share is of what is free take it first, in turn.

        If one does not start, those that have started are closed.
        """
        first = [teacher for teacher in self.members if teacher.starts_first]
        self._memory_taken.clear()

        async def start_others() -> None:
            self._memory_taken.set()
            await together(*(one.start() for one in self.members if one not in first))

        try:  # each must see what the ones before it have left
            await in_turn(
                *((one.start, one.memory_taken) for one in first), (start_others, forever)
            )
        except BaseException:
            await asyncio.gather(*(one.close() for one in self.members), return_exceptions=True)
            raise

    async def close(self) -> None:
        await closed_together(self.members)


async def closed_together(parts: Iterable[_Closable]) -> None:
    """Close all, also when one of them fails to close."""
    results: list[Any] = await asyncio.gather(
        *(part.close() for part in parts), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException):
            raise result


def merged(counters: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of counters, and each one's own under its prefix.

    Args:
        counters: by prefix. ``score/cache_hits`` becomes ``{prefix}_score_cache_hits`` as well.
    """
    found: dict[str, float] = {}
    for own in counters.values():
        for key, value in own.items():
            found[key] = found.get(key, 0.0) + value
    for prefix, own in counters.items():
        found |= {f"{prefix}_{key.replace('/', '_')}": value for key, value in own.items()}
    return found
