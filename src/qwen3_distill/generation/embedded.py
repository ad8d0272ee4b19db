"""Batched sampling with a KV cache, in this process, on any device PyTorch has.

Shape letters: B rows decoded together, T prompt positions (left-padded), V vocabulary.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qwen3_distill.errors import DataError, WeightVersionError
from qwen3_distill.generation.sampling import RowSampler
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import (
    load_identity,
    load_model,
    resolve_device,
    resolve_dtype,
)
from qwen3_distill.protocols import FullWeights, WeightChannel
from qwen3_distill.types import (
    FinishReason,
    Prompt,
    Rollout,
    RolloutRequest,
    VersionSpan,
    WeightVersion,
)


class EmbeddedRolloutEngine:
    """A `RolloutEngine` on PyTorch.

    The same request gives the same rollout whatever is decoded beside it, up to float rounding:
    another batch shape may change a logit in its last bits, which matters only where the random
    number falls that close to the boundary between two tokens.
    """

    def __init__(
        self, model_dir: str | Path, *, device: str, dtype: str, max_sequences: int
    ) -> None:
        self._identity = load_identity(model_dir)
        self._device = resolve_device(device)
        self._model = load_model(model_dir, device=self._device, dtype=resolve_dtype(dtype))
        self._model.requires_grad_(False)
        self._max_sequences = max_sequences
        self._version: WeightVersion | None = None
        self._num_decoding = 0

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
        if self._num_decoding:
            # Their later tokens would come from the new weights under the old version's name.
            raise WeightVersionError(f"cannot load {version} while rollouts are being sampled")
        self._version = None  # a failure half-way must not leave the old version in name
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
        self._version = version

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        self._num_decoding += 1
        try:
            for start in range(0, len(requests), self._max_sequences):
                for rollout in self._decode(requests[start : start + self._max_sequences]):
                    yield rollout
        finally:
            self._num_decoding -= 1

    async def close(self) -> None:
        return None

    @torch.inference_mode()
    def _decode(self, requests: Sequence[RolloutRequest]) -> Iterator[Rollout]:
        """Decode all requests together; rows leave when they finish."""
        version = self.version
        self._check_context(requests)
        rows = [_Row(request) for request in requests]
        sampler = RowSampler([row.request.sampling for row in rows], self._device)
        logits_BV, cache, mask_BT = self._prefill([request.prompt for request in requests])
        for position in range(max(row.request.sampling.max_new_tokens for row in rows)):
            ids_B, logprobs_B = sampler.sample(logits_BV, position)
            for row, token, logprob in zip(rows, ids_B.tolist(), logprobs_B.tolist(), strict=True):
                if row.finish_reason is None:
                    row.append(token, logprob, self._identity.eos_ids)
                    if row.finish_reason is not None:
                        yield row.rollout(version)
            alive = [index for index, row in enumerate(rows) if row.finish_reason is None]
            if not alive:
                return
            # Dropping rows copies the cache, so it is done when a quarter of them is finished.
            if len(alive) <= 0.75 * len(rows):
                index = torch.tensor(alive, device=self._device)
                rows, sampler = [rows[i] for i in alive], sampler.select(alive)
                cache.batch_select_indices(index)
                ids_B, mask_BT = ids_B[index], mask_BT[index]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
            logits_BV = self._forward(ids_B.unsqueeze(1), mask_BT, cache)

    def _check_context(self, requests: Sequence[RolloutRequest]) -> None:
        limit = self._identity.context_length
        for request in requests:
            needed = request.prompt.token_ids.size + request.sampling.max_new_tokens
            if needed > limit:
                raise DataError(
                    f"rollout {request.rollout_id}: {request.prompt.token_ids.size} prompt tokens "
                    f"+ max_new_tokens {request.sampling.max_new_tokens} exceed the model's "
                    f"context of {limit}"
                )

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Logits after each prompt, the cache and the attention mask, one row per prompt.

        Adjacent rows of one prompt share its forward pass.
        """
        distinct: list[Prompt] = []
        row_to_distinct: list[int] = []
        for prompt in prompts:
            if not distinct or not np.array_equal(prompt.token_ids, distinct[-1].token_ids):
                distinct.append(prompt)
            row_to_distinct.append(len(distinct) - 1)
        longest = max(prompt.token_ids.size for prompt in distinct)
        ids_BT = torch.zeros(len(distinct), longest, dtype=torch.long)
        mask_BT = torch.zeros(len(distinct), longest, dtype=torch.long)
        for row, prompt in enumerate(distinct):
            # Left padding: every row's last prompt token, whose logits start the response, and
            # every new token stand in the same column.
            ids_BT[row, longest - prompt.token_ids.size :] = torch.from_numpy(
                prompt.token_ids.astype(np.int64)
            )
            mask_BT[row, longest - prompt.token_ids.size :] = 1
        cache = DynamicCache(config=self._model.config)
        mask_BT = mask_BT.to(self._device)
        logits_BV = self._forward(ids_BT.to(self._device), mask_BT, cache)
        if len(distinct) < len(prompts):
            index = torch.tensor(row_to_distinct, device=self._device)
            cache.batch_select_indices(index)
            logits_BV, mask_BT = logits_BV[index], mask_BT[index]
        return logits_BV, cache, mask_BT

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache) -> Tensor:
        """[B, V] logits after the last of the new positions ``ids_BT``; extends the cache."""
        position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        return next_token_logits(self._model, ids_BT, mask_BT, position_BT, cache)


def next_token_logits(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    position_BT: Tensor,
    cache: DynamicCache,
) -> Tensor:
    """One cached forward pass; the head is applied to the last position only."""
    return model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=position_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


@dataclass
class _Row:
    """One answer in the making."""

    request: RolloutRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def append(self, token: int, logprob: float, eos_ids: frozenset[int]) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in eos_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) == self.request.sampling.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH

    def rollout(self, version: WeightVersion) -> Rollout:
        if self.finish_reason is None:
            raise AssertionError("a running row is not a rollout")
        return Rollout(
            rollout_id=self.request.rollout_id,
            prompt=self.request.prompt,
            sampling=self.request.sampling,
            response_ids=np.array(self.token_ids, dtype=np.int32),
            behavior_logprobs=np.array(self.logprobs, dtype=np.float32),
            versions=(VersionSpan(start=0, stop=len(self.token_ids), version=version),),
            finish_reason=self.finish_reason,
        )
