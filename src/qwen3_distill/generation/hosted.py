"""A rollout engine in a host, as the controller sees it; the same code for every engine.

A worker that dies or hangs is started again, loads the version that it served, and samples its
unfinished requests anew: every request has its own seed, and no rollout is yielded twice.
"""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_distill.errors import EngineLost, EngineStartError, WeightVersionError
from qwen3_distill.generation.context import check_context
from qwen3_distill.hosts.host import Host
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.hosts.supervision import Restarts
from qwen3_distill.ports import WeightChannel, reaches
from qwen3_distill.types import Rollout, RolloutPrefix, RolloutRequest, WeightVersion
from qwen3_distill.weights.directory import DirectoryChannel

_LOAD_TIMEOUT_S = 300.0
_CALL_TIMEOUT_S = 60.0


class HostedRolloutEngine:
    """A `StreamingRolloutEngine` whose worker serves one.

    Args:
        host: runs the worker.
        opening: opens the engine in it.
        max_model_tokens: longest prompt plus response.
        max_restarts: how often the worker may die and be started again.
    """

    def __init__(
        self, host: Host, opening: Opening, *, max_model_tokens: int, max_restarts: int
    ) -> None:
        self._host = host
        self._opening = opening
        self._max_model_tokens = max_model_tokens
        self._restarts = Restarts(
            start=self._start, end=host.close, restore=self._restore, limit=max_restarts
        )
        self._served: WeightVersion | None = None
        self._wanted: tuple[WeightVersion, WeightChannel] | None = None
        """The version that a worker loads after a restart, and its channel."""
        self._not_restored: WeightVersionError | None = None
        """Why a worker serves nothing after a restart."""
        self._paused = False
        self._missing: list[dict[str, RolloutRequest]] = []
        """Per call of `generate`: the requests it has yet to answer, by id."""
        self._starting = asyncio.Lock()
        self._is_prepared = False
        self._loading = asyncio.Lock()
        self._own_channel: _PrivateChannel | None = None

    @property
    def counters(self) -> Mapping[str, float]:
        """Cumulative figures by metric key."""
        return {"health/rollout_engine_restarts": self._restarts.count}

    @property
    def host(self) -> Host:
        return self._host

    @property
    def version(self) -> WeightVersion:
        if self._served is None:
            if self._not_restored is not None:
                raise self._not_restored
            raise WeightVersionError(
                "the rollout engine has no weights yet: load a published version before the "
                "first rollout"
            )
        return self._served

    async def prepare(self) -> None:
        """Start the worker, which imports its libraries; `start` opens the engine in it.

        Raises:
            EngineStartError: not installed, or the worker does not start.
        """
        async with self._starting:
            try:
                await self._host.start(self._opening.environment())
            except EngineStartError as error:
                raise self._opening.explained(error, self._host) from None
            except BaseException:
                await self._host.close()
                raise
            self._is_prepared = True

    async def start(self) -> None:
        """Start the worker, unless `prepare` has, and open the engine in it.

        Raises:
            EngineStartError: not installed, or the engine does not start.
        """
        await self._restarts.start()

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        async with self._loading:
            self._served = self._wanted = self._not_restored = None
            if not reaches(channel, "machine"):
                payload = channel.fetch(version)
                self._own_channel = self._own_channel or _PrivateChannel()
                channel = self._own_channel.channel
                channel.publish(version, payload)
            start = await self._restarts.current()
            self._wanted = (version, channel)
            try:
                await self._load_wanted()
            except EngineLost as error:
                await self._restarts.recover(start, error)
            finally:
                if self._served != version:
                    self._wanted = None
            if self._served is None and self._not_restored is not None:
                raise self._not_restored

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        check_context(requests, self._max_model_tokens)
        with self._followed(requests) as missing:
            while True:
                async with self._loading:  # wait for a load under way
                    _ = self.version  # nothing is sampled without weights
                if not missing:
                    return
                start = await self._restarts.current()
                stream = self._host.stream("generate", list(missing.values()))
                try:
                    async with contextlib.aclosing(stream):
                        async for rollout in stream:
                            if missing.pop(rollout.rollout_id, None) is not None:
                                yield rollout
                    return  # what is missing now was aborted
                except EngineLost as error:
                    await self._restarts.recover(start, error)

    async def prefixes(self) -> list[RolloutPrefix]:
        return await self._ask("prefixes")

    async def abort(self, rollout_ids: Sequence[str]) -> None:
        for missing in self._missing:
            for rollout_id in rollout_ids:
                missing.pop(rollout_id, None)
        await self._ask("abort", list(rollout_ids))

    async def pause(self) -> None:
        self._paused = True
        await self._ask("pause")

    async def resume(self) -> None:
        self._paused = False
        await self._ask("resume")

    async def close(self) -> None:
        self._paused = False
        self._served = self._wanted = None
        await self._restarts.close()
        if self._own_channel is not None:
            self._own_channel.remove()
            self._own_channel = None

    @contextlib.contextmanager
    def _followed(self, requests: Sequence[RolloutRequest]) -> Iterator[dict[str, RolloutRequest]]:
        """Keep the requests, by id, where `abort` finds them."""
        missing = {request.rollout_id: request for request in requests}
        self._missing.append(missing)
        try:
            yield missing
        finally:
            self._missing = [other for other in self._missing if other is not missing]

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the worker; repeat the call once if the worker dies before it answers."""
        start = await self._restarts.current()
        try:
            return await self._host.call(method, *arguments, timeout_s=_CALL_TIMEOUT_S)
        except EngineLost as error:
            await self._restarts.recover(start, error)
            return await self._host.call(method, *arguments, timeout_s=_CALL_TIMEOUT_S)

    async def _load_wanted(self) -> None:
        assert self._wanted is not None
        version, channel = self._wanted
        await self._host.call("load", version, channel, timeout_s=_LOAD_TIMEOUT_S)
        self._served = version

    async def _start(self) -> None:
        try:
            async with self._starting:  # wait for a `prepare` under way
                was_prepared, self._is_prepared = self._is_prepared, False
                if was_prepared and not self._host.is_running:  # it has died since
                    await self._host.close()
                    was_prepared = False
                if not was_prepared:
                    await self._host.start(self._opening.environment())
            await self._opening.open(self._host)
        except EngineStartError as error:
            raise self._opening.explained(error, self._host) from None

    async def _restore(self) -> None:
        """Give a worker that was started again the state of the lost one."""
        if self._paused:
            await self._host.call("pause", timeout_s=_CALL_TIMEOUT_S)
        if self._wanted is not None:
            try:
                await self._load_wanted()
            except WeightVersionError as error:
                # As a rule the next version has replaced it in the channel and is loaded at once.
                # Until then `generate` finds no weights.
                self._served = self._wanted = None
                self._not_restored = error


class _PrivateChannel:
    """Files for versions whose own channel does not leave this process."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="qwen3-distill-weights-"))
        self.channel = DirectoryChannel(self._directory)

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
