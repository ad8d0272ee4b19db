"""Continuous batching with a KV cache, in this process, on any device of PyTorch."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from qwen3_distill.errors import EngineError, WeightVersionError
from qwen3_distill.generation.context import check_context
from qwen3_distill.generation.embedded.decode_batch import DecodeBatch, DecodeRow
from qwen3_distill.generation.embedded.static_batch import StaticBatch
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import (
    load_identity,
    load_model,
    resolve_device,
    resolve_dtype,
)
from qwen3_distill.ports import FullWeights, WeightChannel
from qwen3_distill.types import Rollout, RolloutPrefix, RolloutRequest, WeightVersion


class EmbeddedRolloutEngine:
    """A `StreamingRolloutEngine` on PyTorch.

    All calls of `generate` share one batch: rows leave when they have finished, and waiting rows
    replace them. The decode loop is a task that exists while there is something to decode; other
    tasks run between two steps, and a step is never interrupted.

    The same request gives the same rollout whatever else is decoded, up to float rounding: another
    batch shape may change a logit in its last bits, which matters only where the random number
    falls that close to the boundary between two tokens. A single call of at most ``max_sequences``
    requests gives the same bits every time.

    Args:
        max_sequences: rows decoded together.
        batching: ``static``: waiting rows join when all others have finished, and on CUDA a decode
            step is one graph.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        device: str,
        dtype: str,
        max_sequences: int,
        batching: Literal["continuous", "static"] = "continuous",
    ) -> None:
        self._identity = load_identity(model_dir)
        self._device = resolve_device(device)
        self._model = load_model(model_dir, device=self._device, dtype=resolve_dtype(dtype))
        self._model.requires_grad_(False)
        self._max_sequences = max_sequences
        self._version: WeightVersion | None = None
        batch = StaticBatch if batching == "static" else DecodeBatch
        self._batch = batch(self._model, self._device, self._identity.eos_ids)
        self._waiting: deque[DecodeRow] = deque()
        self._idle_row_steps = 0
        self._paused = False
        self._decoding: asyncio.Task[None] | None = None

    async def start(self) -> None:
        return None

    @property
    def counters(self) -> Mapping[str, float]:
        return {}

    @property
    def version(self) -> WeightVersion:
        if self._version is None:
            raise WeightVersionError(
                "the rollout engine has no weights yet: load a published version before the "
                "first rollout"
            )
        return self._version

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        self._version = None  # after a failure half-way, no version may be named
        try:
            self._replace_weights(version, channel)
        except Exception:
            self._end_all(None)  # there are no weights to continue with
            raise
        self._version = version
        for row in self._batch.rows:
            row.running.begin(version)

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        if not requests:
            return
        _ = self.version  # nothing is sampled without weights
        check_context(requests, self._identity.context_length)
        outbox: asyncio.Queue[Rollout | Exception | None] = asyncio.Queue()
        rows = [DecodeRow(request, outbox) for request in requests]
        self._waiting.extend(rows)
        self._keep_decoding()
        try:
            for _ in rows:
                result = await outbox.get()
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    yield result
        finally:
            for row in rows:
                row.deliver(None)  # what the consumer no longer wants

    async def prefixes(self) -> list[RolloutPrefix]:
        return [row.running.prefix() for row in self._batch.rows]

    async def abort(self, rollout_ids: Sequence[str]) -> None:
        ended = set(rollout_ids)
        for row in (*self._batch.rows, *self._waiting):
            if row.request.rollout_id in ended:
                row.deliver(None)

    async def pause(self) -> None:
        self._paused = True

    async def resume(self) -> None:
        self._paused = False
        self._keep_decoding()

    async def close(self) -> None:
        self._version = None
        self._paused = False
        self._end_all(EngineError("the rollout engine was closed while it sampled"))
        if self._decoding is not None and not self._decoding.done():
            await asyncio.wait([self._decoding])  # it has nothing left to decode
        self._decoding = None

    def _replace_weights(self, version: WeightVersion, channel: WeightChannel) -> None:
        payload = channel.fetch(version)
        if not isinstance(payload, FullWeights):
            raise WeightVersionError(f"{version} was published as adapters; publish whole weights")
        published = payload.tensors
        if weights_digest(published) != version.digest:
            raise WeightVersionError(f"the channel's weights are not {version}: digests differ")
        own = dict(self._model.named_parameters())
        if own.keys() != published.keys():
            odd = sorted(own.keys() ^ published.keys())[:3]
            raise WeightVersionError(
                f"{version}: published and served parameters have different names, e.g. {odd}"
            )
        for name, parameter in own.items():
            if parameter.shape != published[name].shape:  # copy_ would raise, or broadcast
                raise WeightVersionError(
                    f"{version}: {name} was published with shape {tuple(published[name].shape)}, "
                    f"served with {tuple(parameter.shape)}"
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(published[name])
        expected = {name: published[name].to(own[name].dtype) for name in own}
        if weights_digest(own) != weights_digest(expected):
            raise WeightVersionError(f"{version}: the weights in use are not the published ones")

    # --- The decode loop --------------------------------------------------------------------------

    def _keep_decoding(self) -> None:
        """Start the decode loop unless it runs or there is nothing to decode."""
        if self._may_decode() and (self._decoding is None or self._decoding.done()):
            self._decoding = asyncio.create_task(self._decode())

    def _may_decode(self) -> bool:
        if self._paused:
            return False
        return any(not row.is_over for row in self._waiting) or bool(self._batch.rows)

    async def _decode(self) -> None:
        """Step until all rows have ended; an error reaches every caller that waits."""
        try:
            while self._may_decode():
                self._step()
                if self._may_decode():
                    await asyncio.sleep(0)
            if not self._paused:
                self._batch.clear()
        except Exception as error:  # noqa: BLE001 - passed to the callers
            self._end_all(error)
        except BaseException:
            self._end_all(EngineError("sampling was ended from outside"))
            raise

    def _step(self) -> None:
        joining = self._take_joining()
        for row in joining:
            row.running.begin(self.version)
        self._batch.step(joining)

    def _take_joining(self) -> list[DecodeRow]:
        """Return the waiting rows that join the batch now.

        Joining costs about half a step: a forward pass over the prompts, and a copy of the cache.
        Rows with free places wait for others to share that cost, until the places have been idle
        for as long: half a step of the whole batch.
        """
        self._waiting = deque(row for row in self._waiting if not row.is_over)
        running = len(self._batch.rows)
        if running and self._batch.begins_together:
            return []
        joining = min(self._max_sequences - running, len(self._waiting))
        self._idle_row_steps += joining
        if self._idle_row_steps < running / 2:
            return []
        self._idle_row_steps = 0
        return [self._waiting.popleft() for _ in range(joining)]

    def _end_all(self, result: Exception | None) -> None:
        """Deliver ``result`` to every caller that waits, and forget all rows."""
        for row in (*self._batch.rows, *self._waiting):
            row.deliver(result)
        self._batch.clear()
        self._waiting.clear()
