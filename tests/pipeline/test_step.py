"""A step's actions with parts that only note what they are asked."""

import asyncio
from typing import Any, cast

import pytest

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.step import push_weights
from qwen3_distill.types import WeightVersion

VERSION = WeightVersion(step=3, digest="abc")


class FakeParts:
    """Learner, engine and channel in one; the engine refuses the first ``refusals`` loads."""

    def __init__(self, *, refusals: int, switches: bool) -> None:
        self.learner = self.engine = self.channel = self
        self.following = None
        self.calls: list[str] = []
        self._refusals, self._switches = refusals, switches

    async def publish(self, channel: object) -> WeightVersion:
        assert channel is self.channel
        self.calls.append("publish")
        return VERSION

    async def load(self, version: WeightVersion, channel: object) -> None:
        assert (version, channel) == (VERSION, self.channel)
        self.calls.append("load")
        if self.calls.count("load") <= self._refusals:
            raise WeightVersionError("other weights arrived")

    def switched_transport(self, version: WeightVersion) -> bool:
        assert version == VERSION
        self.calls.append("ask")
        return self._switches


def push(parts: FakeParts) -> list[str]:
    asyncio.run(push_weights(cast(Parts, cast(Any, parts))))
    return parts.calls


def test_weights_that_arrive_are_published_once() -> None:
    assert push(FakeParts(refusals=0, switches=True)) == ["publish", "load"]


def test_a_channel_that_switched_its_transport_publishes_again() -> None:
    parts = FakeParts(refusals=1, switches=True)
    assert push(parts) == ["publish", "load", "ask", "publish", "load"]


@pytest.mark.parametrize(("refusals", "switches", "calls"), [(1, False, 3), (2, True, 5)])
def test_other_weights_in_use_are_an_error(refusals: int, switches: bool, calls: int) -> None:
    parts = FakeParts(refusals=refusals, switches=switches)
    with pytest.raises(WeightVersionError, match="other weights arrived"):
        push(parts)
    assert len(parts.calls) == calls
