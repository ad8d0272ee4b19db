"""The worker of vLLM: its AsyncLLM behind the methods that the controller calls.

Run with ``-m`` under the interpreter that has vLLM. Everything that crosses the socket is a record
of this package.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os

# Before vLLM is imported: it reads these once.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # on CPU: 10 s at start for no speed
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from qwen3_distill.errors import EngineError, EngineStartError, WeightVersionError
from qwen3_distill.generation.partial_rollout import PartialRollout
from qwen3_distill.generation.vllm import compat
from qwen3_distill.generation.vllm.extension import write_request
from qwen3_distill.generation.vllm.settings import VllmSettings
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.hosts.watchdog import wait_until_idle
from qwen3_distill.ports import WeightChannel
from qwen3_distill.types import (
    FinishReason,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    WeightVersion,
)

_DEATH_CHECK_S = 1.0
_DEATH_NOTICE_S = 10.0
"""Time in which vLLM notices that one of its processes died, after the first call that fails."""
_DEAD = 70
"""Exit status of this process when the engine's own process has died."""


class VllmWorker:
    """The object that the worker serves; see `engine.vllm_engine`."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._settings: VllmSettings | None = None
        self._version: WeightVersion | None = None
        self._num_loads = 0
        self._adapter_path: str | None = None
        self._running: dict[str, PartialRollout] = {}
        self._load_lock = asyncio.Lock()
        self._paused = False
        self._num_outputs = 0
        self._watching: asyncio.Task[None] | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix="weights-"))

    async def open(self, settings: VllmSettings) -> None:
        """Start the engine.

        Raises:
            EngineStartError: it does not start, e.g. for lack of memory, or is another version.
        """
        compat.check_methods(AsyncLLM)
        arguments = compat.engine_arguments(settings)
        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except Exception as error:  # vLLM raises what its libraries raise
            text = " ".join(str(error).split()) or type(error).__name__
            raise EngineStartError(f"vLLM {compat.version()} does not start: {text}") from error
        self._settings = settings
        self._watching = asyncio.create_task(self._end_if_it_hangs(settings.hang_timeout_s))

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        """Serve ``version``. Running rollouts continue; their next tokens are sampled with it.

        `extension.WeightAccess`, in vLLM's own process, fetches it and reads it back.

        Their cache of older weights is kept or computed anew (`VllmSettings.keeps_cache`). A paused
        engine stays paused.

        Raises:
            WeightVersionError: the weights in use are not ``version``; nothing is served then,
                and running rollouts were aborted.
        """
        assert self._settings is not None
        clears = not self._settings.keeps_cache
        async with self._load_lock:
            self._version = None
            await self._guarded(self._engine.pause_generation(mode="keep", clear_cache=clears))
            try:
                problem = await self._replace(version, channel)
                if problem:
                    await self.abort(list(self._running))
                    raise WeightVersionError(problem)
                # Including what was cached in between. While running rollouts keep their blocks,
                # none can be cleared, but no later request finds them (`compat.prompt`).
                if clears or not self._running:
                    cleared = await self._guarded(self._engine.reset_prefix_cache(clears))
                    if clears and not cleared:
                        raise WeightVersionError(f"{version}: vLLM did not clear its prefix cache")
                await self._mark_swap(version)
                self._version = version
                self._num_loads += 1
            finally:
                if not self._paused:
                    await self._guarded(self._engine.resume_generation())

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        """Yield each rollout when it has finished. Aborted ones are not yielded."""
        finished: asyncio.Queue[Rollout | Exception | None] = asyncio.Queue()

        async def follow(request: RolloutRequest) -> None:
            try:
                finished.put_nowait(await self._sample(request))
            except EngineDeadError as error:
                _die(error)
            except Exception as error:  # noqa: BLE001 - handed to the consumer
                finished.put_nowait(error)

        tasks = [asyncio.create_task(follow(request)) for request in requests]
        try:
            for _ in tasks:
                result = await finished.get()
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    yield result
        finally:
            for task in tasks:
                task.cancel()  # aborts what the consumer no longer wants
            await asyncio.gather(*tasks, return_exceptions=True)

    def prefixes(self) -> list[RolloutPrefix]:
        """The tokens so far of every running rollout that has any."""
        return [running.prefix() for running in self._running.values() if running.token_ids]

    async def abort(self, rollout_ids: Sequence[str]) -> None:
        """End running rollouts; their tokens are lost."""
        await self._guarded(self._engine.abort(list(rollout_ids)))

    async def pause(self) -> None:
        """Stop decoding; running rollouts and new requests wait."""
        self._paused = True
        await self._guarded(self._engine.pause_generation(mode="keep", clear_cache=False))

    async def resume(self) -> None:
        self._paused = False
        await self._guarded(self._engine.resume_generation())

    def shutdown(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._engine is not None:
            self._engine.shutdown()
        shutil.rmtree(self._scratch, ignore_errors=True)

    async def _sample(self, request: RolloutRequest) -> Rollout | None:
        """Sample one rollout; return None if it was aborted."""
        async with self._load_lock:  # wait for a load under way
            if self._settings is None or self._version is None:
                raise WeightVersionError("the rollout engine has no weights: load a version first")
        running = PartialRollout(request)
        running.begin(self._version)
        self._running[request.rollout_id] = running
        try:
            async for output in self._engine.generate(
                compat.prompt(request.prompt.token_ids.tolist(), self._num_loads),
                compat.sampling_params(
                    request.sampling, self._settings.eos_ids, request.num_candidates
                ),
                request.rollout_id,
                lora_request=self._adapter(),
            ):
                self._num_outputs += 1
                completion = output.outputs[0]
                running.add(*compat.delta(completion, request.num_candidates))
                if output.finished:
                    return _finished(running, completion.finish_reason)
        finally:
            self._running.pop(request.rollout_id, None)
        raise EngineError(f"vLLM ended rollout {request.rollout_id} without a last output")

    def _adapter(self) -> Any:
        return None if self._adapter_path is None else compat.adapter_request(self._adapter_path)

    async def _replace(self, version: WeightVersion, channel: WeightChannel) -> str:
        """Bring the version's weights into use; return a problem as text, "" if there is none."""
        assert self._settings is not None
        request = self._scratch / "request"
        write_request(request, version, channel)
        if self._settings.lora_rank is None:
            return await self._ask_engine("distill_load_full", str(request))
        path = str(channel.adapter_directory(version, self._scratch / "adapters"))
        if self._adapter_path is None:  # makes the adapter known; later ones go into its slot
            try:
                await self._engine.add_lora(compat.adapter_request(path, load=True))
            except Exception as error:  # noqa: BLE001 - a bad adapter, in vLLM's own types
                await self._end_if_dead(error)
                return f"{version}: vLLM does not take the adapter: {error}"
        problem = await self._ask_engine("distill_swap_adapter", str(request))
        if not problem:
            self._adapter_path = path
        return problem

    async def _ask_engine(self, method: str, *arguments: str) -> str:
        """Call a method in every card's process; return the first problem, "" if there is none."""
        problems = await self._guarded(self._engine.collective_rpc(method, args=arguments))
        return next(filter(None, problems), "")

    async def _mark_swap(self, version: WeightVersion) -> None:
        """Note where in each running rollout the new version begins."""
        if not self._running:
            return
        await compat.settle(self._engine)
        counts = compat.tokens_sampled(self._engine)
        for rollout_id, running in self._running.items():
            running.begin(version, at=counts.get(rollout_id, running.num_tokens))

    async def _end_if_it_hangs(self, hang_timeout_s: float) -> None:
        """End this process when rollouts run and none gets a token: vLLM's own process hangs.

        This process still answers then, so the controller would not notice.
        """
        await wait_until_idle(self._progress, hang_timeout_s)
        _die(EngineError(f"no rollout got a token for {hang_timeout_s:g} s"))

    def _progress(self) -> int | None:
        """The number of outputs so far; None while none are due."""
        is_due = self._running and not self._paused and not self._load_lock.locked()
        return self._num_outputs if is_due else None

    async def _guarded(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of ``work``; end this process if one of the engine's has died.

        vLLM leaves a call unanswered that was under way when its engine core died.
        """
        task = asyncio.create_task(work)
        while not (await asyncio.wait([task], timeout=_DEATH_CHECK_S))[0]:
            if self._engine.errored:
                _die(self._engine.dead_error)
        try:
            return task.result()
        except Exception as error:
            await self._end_if_dead(error)
            raise

    async def _end_if_dead(self, error: Exception) -> None:
        """End this process if a call failed because one of the engine's processes has died.

        If it was the model's, the call fails with "cancelled" before vLLM notices the death.
        """
        if isinstance(error, EngineDeadError):
            _die(error)
        for _ in range(round(_DEATH_NOTICE_S / 0.1)):
            if self._engine.errored:
                _die(self._engine.dead_error)
            await asyncio.sleep(0.1)


def _finished(running: PartialRollout, reason: str | None) -> Rollout | None:
    if reason == "abort":
        return None
    return running.rollout(FinishReason(reason))


def _die(error: BaseException) -> NoReturn:
    """End this process, which is useless without the engine's own: the controller restarts it."""
    print(f"vLLM's engine process is lost: {error}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(_DEAD)


if __name__ == "__main__":
    serve_worker(VllmWorker())
