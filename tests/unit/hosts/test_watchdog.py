"""Noticing that something stands still."""

import asyncio
from collections.abc import Callable
from itertools import count

import pytest

from qwen3_distill.hosts.watchdog import wait_until_idle


def ends(progress: Callable[[], object | None], within_s: float = 60.0) -> bool:
    async def watch() -> bool:
        try:
            await asyncio.wait_for(wait_until_idle(progress, 0.05), within_s)
        except asyncio.TimeoutError:
            return False
        return True

    return asyncio.run(watch())


def test_what_stands_still_is_noticed() -> None:
    assert ends(lambda: 7)


@pytest.mark.parametrize("progress", [count().__next__, lambda: None], ids=["moves", "idle"])
def test_what_moves_or_has_nothing_to_do_is_left_alone(progress: Callable[[], object]) -> None:
    assert not ends(progress, within_s=1.0)


def test_the_time_begins_anew_with_every_move() -> None:
    values = iter([*([1] * 9), *([2] * 9), *([None] * 15), *([2] * 100)])
    seen: list[object] = []

    def progress() -> object:
        seen.append(next(values))
        return seen[-1]

    assert ends(progress)
    assert 9 + 9 + 15 + 10 <= len(seen) <= 9 + 9 + 15 + 12
