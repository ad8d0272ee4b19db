"""A rollout engine in a process of its own: what the controller does, whichever engine it is.

When the process dies or hangs it is started again, gets the version that it served, and samples
anew what it had not finished: every request has its own seed, and no rollout is given twice.
"""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_distill.errors import DataError, EngineLost, EngineStartError, WeightVersionError
from qwen3_distill.hosts.process import WorkerProcess
from qwen3_distill.hosts.supervision import Restarts
from qwen3_distill.ports import WeightChannel
from qwen3_distill.types import Rollout, RolloutPrefix, RolloutRequest, WeightVersion
from qwen3_distill.weights.directory import DirectoryChannel

_LOAD_TIMEOUT_S = 300.0
_CALL_TIMEOUT_S = 60.0


class HostedRolloutEngine:
    """A `StreamingRolloutEngine` over a worker that serves one.

    Subclasses open the engine in the worker (`_open`), and may explain why that failed
    (`_explained`).

    Args:
        max_model_tokens: longest prompt plus response.
        max_restarts: how often the process may die and be started again.
    """

    def __init__(self, worker: WorkerProcess, *, max_model_tokens: int, max_restarts: int) -> None:
        self._worker = worker
        self._max_model_tokens = max_model_tokens
        self._restarts = Restarts(
            start=self._start, end=worker.close, restore=self._restore, limit=max_restarts
        )
        self._served: WeightVersion | None = None
        self._wanted: tuple[WeightVersion, WeightChannel] | None = None
        """What a process that is started again is given."""
        self._not_restored: WeightVersionError | None = None
        """Why a process that was started again serves nothing."""
        self._paused = False
        self._missing: list[dict[str, RolloutRequest]] = []
        """By call of `generate`: what it has yet to yield, by id."""
        self._loading = asyncio.Lock()
        self._own_channel: _PrivateChannel | None = None

    async def _open(self) -> None:
        """Start the engine in the worker, which runs."""
        raise NotImplementedError

    def _explained(self, error: EngineStartError) -> EngineStartError:
        """The error with its cause, where more is known."""
        return error

    @property
    def counters(self) -> Mapping[str, float]:
        """Cumulative figures by metric key."""
        return {"health/rollout_engine_restarts": self._restarts.count}

    @property
    def worker(self) -> WorkerProcess:
        return self._worker

    @property
    def pid(self) -> int | None:
        """Leader of the process group of the engine's processes."""
        return self._worker.pid

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

    async def start(self) -> None:
        """Start the process and the engine in it.

        Raises:
            EngineStartError: not installed, or the engine does not start.
        """
        await self._restarts.start()

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        async with self._loading:
            self._served = self._wanted = self._not_restored = None
            if not channel.crosses_processes:
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
        self._check_context(requests)
        with self._followed(requests) as missing:
            while True:
                async with self._loading:  # weights that are on their way
                    _ = self.version  # nothing is sampled without weights
                if not missing:
                    return
                start = await self._restarts.current()
                stream = self._worker.stream("generate", list(missing.values()))
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

    def kill(self) -> None:
        """SIGKILL the engine's processes, for tests of the recovery."""
        self._worker.kill()

    @contextlib.contextmanager
    def _followed(self, requests: Sequence[RolloutRequest]) -> Iterator[dict[str, RolloutRequest]]:
        """The requests by id, where `abort` finds them."""
        missing = {request.rollout_id: request for request in requests}
        self._missing.append(missing)
        try:
            yield missing
        finally:
            self._missing = [other for other in self._missing if other is not missing]

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the worker; once more if it is lost before it answers."""
        start = await self._restarts.current()
        try:
            return await self._worker.call(method, *arguments, timeout_s=_CALL_TIMEOUT_S)
        except EngineLost as error:
            await self._restarts.recover(start, error)
            return await self._worker.call(method, *arguments, timeout_s=_CALL_TIMEOUT_S)

    async def _load_wanted(self) -> None:
        assert self._wanted is not None
        version, channel = self._wanted
        await self._worker.call("load", version, channel, timeout_s=_LOAD_TIMEOUT_S)
        self._served = version

    async def _start(self) -> None:
        try:
            await self._worker.start()
            await self._open()
        except EngineStartError as error:
            raise self._explained(error) from None

    async def _restore(self) -> None:
        """Give a process that was started again what the lost one had."""
        if self._paused:
            await self._worker.call("pause", timeout_s=_CALL_TIMEOUT_S)
        if self._wanted is not None:
            try:
                await self._load_wanted()
            except WeightVersionError as error:
                # As a rule the next version has taken its place in the channel, and comes at once;
                # until it is there, `generate` finds that there are no weights.
                self._served = self._wanted = None
                self._not_restored = error

    def _check_context(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            prompt_tokens = request.prompt.token_ids.size
            if prompt_tokens + request.sampling.max_new_tokens > self._max_model_tokens:
                raise DataError(
                    f"rollout {request.rollout_id}: {prompt_tokens} prompt tokens + max_new_tokens "
                    f"{request.sampling.max_new_tokens} exceed the model's context of "
                    f"{self._max_model_tokens}"
                )


class _PrivateChannel:
    """Files for versions that come through a channel which does not cross processes."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="qwen3-distill-weights-"))
        self.channel = DirectoryChannel(self._directory)

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
