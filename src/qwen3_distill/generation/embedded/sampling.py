"""From logits to one sampled token per row, with the log-probability it was sampled with.

Shape letters: B rows decoded together, V vocabulary, R new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from qwen3_distill.types import SamplingSpec

_NO_LIMIT = 2**20


@dataclass(frozen=True)
class SamplingFeatures:
    """The kinds of sampling that some rows need; the kernels of the others are not run."""

    greedy: bool
    top_k: bool
    top_p: bool

    @classmethod
    def of(cls, specs: Sequence[SamplingSpec]) -> "SamplingFeatures":
        """Collect the kinds that the specs ask for."""
        return cls(
            greedy=any(spec.is_greedy for spec in specs),
            top_k=any(spec.top_k > 0 for spec in specs),
            top_p=any(spec.top_p < 1 for spec in specs),
        )

    def joined(self, other: "SamplingFeatures") -> "SamplingFeatures":
        """Combine the kinds of both."""
        return SamplingFeatures(
            self.greedy or other.greedy, self.top_k or other.top_k, self.top_p or other.top_p
        )


class RowSampler:
    """Samples token after token for some rows, each by its own `SamplingSpec`.

    The random numbers of a row depend on its seed and the token's position alone, never on the
    other rows.
    """

    def __init__(
        self, specs: Sequence[SamplingSpec], device: torch.device, *, num_tokens: int | None = None
    ) -> None:
        """Make a sampler at each row's first token.

        Args:
            num_tokens: new tokens that a row may have; default: the longest row's.
        """
        longest = max(spec.max_new_tokens for spec in specs)
        self._uniform_BR = torch.from_numpy(_uniforms(specs, num_tokens or longest)).to(device)
        self._position_B1 = torch.zeros(len(specs), 1, dtype=torch.long, device=device)
        self._temperature_B1 = _column([spec.temperature or 1.0 for spec in specs], device)
        self._greedy_B1 = _column([float(spec.is_greedy) for spec in specs], device).bool()
        # A k beyond any vocabulary and a p of 1 exclude nothing.
        self._top_k_B1 = _column([spec.top_k or _NO_LIMIT for spec in specs], device).long()
        self._top_p_B1 = _column([spec.top_p for spec in specs], device)
        self.uses = SamplingFeatures.of(specs)

    def select(self, rows: Sequence[int]) -> "RowSampler":
        """A sampler for some of the rows."""
        index = torch.tensor(rows, device=self._uniform_BR.device)
        return self._with([tensor[index] for tensor in self._tensors], self.uses)

    def joined(self, other: "RowSampler") -> "RowSampler":
        """A sampler for the rows of both; each goes on at its own position."""
        longest = max(self._uniform_BR.shape[1], other._uniform_BR.shape[1])
        (ours, *our_rest), (theirs, *their_rest) = self._tensors, other._tensors
        uniform_BR = torch.cat([pad(part, (0, longest - part.shape[1])) for part in (ours, theirs)])
        rest = [torch.cat(pair) for pair in zip(our_rest, their_rest, strict=True)]
        return self._with([uniform_BR, *rest], self.uses.joined(other.uses))

    def copy_(self, other: "RowSampler") -> None:
        """Take over the state of a sampler of the same shape and features, in place.

        A captured graph goes on to read and write the tensors of this one.
        """
        if other.uses != self.uses:
            raise ValueError(f"sampler of {self.uses} cannot sample with {other.uses}")
        for own, new in zip(self._tensors, other._tensors, strict=True):
            own.copy_(new)

    @property
    def _tensors(self) -> list[Tensor]:
        return [
            self._uniform_BR,
            self._position_B1,
            self._temperature_B1,
            self._greedy_B1,
            self._top_k_B1,
            self._top_p_B1,
        ]

    @staticmethod
    def _with(tensors: Sequence[Tensor], uses: "SamplingFeatures") -> "RowSampler":
        made = object.__new__(RowSampler)
        made._uniform_BR, made._position_B1, made._temperature_B1 = tensors[:3]
        made._greedy_B1, made._top_k_B1, made._top_p_B1 = tensors[3:]
        made.uses = uses
        return made

    def sample(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of every row: ids [B] int64 and logprobs [B] float32 nats.

        A row that has had its ``max_new_tokens`` gets tokens of no meaning.
        """
        logprobs_BV = torch.log_softmax(self._truncated(logits_BV.float()), dim=-1)
        # Inverse CDF: one uniform number a row. In float64, so that the sum over a large
        # vocabulary does not shift the boundaries between tokens.
        cdf_BV = logprobs_BV.double().exp().cumsum(dim=-1)
        # Just below the total: a tail of zero probability must never be reached by rounding.
        total_B1 = cdf_BV[:, -1:] * (1 - 1e-12)
        threshold_B1 = self._next_uniform_B1() * total_B1
        ids_B1 = torch.searchsorted(cdf_BV, threshold_B1, right=True)
        logprobs_B1 = logprobs_BV.gather(1, ids_B1)
        if self.uses.greedy:
            greedy_B1 = self._greedy_B1
            ids_B1 = torch.where(greedy_B1, logits_BV.argmax(dim=-1, keepdim=True), ids_B1)
            logprobs_B1 = logprobs_B1.masked_fill(greedy_B1, 0.0)
        return ids_B1.squeeze(1), logprobs_B1.squeeze(1)

    def _next_uniform_B1(self) -> Tensor:
        last = self._uniform_BR.shape[1] - 1
        uniform_B1 = self._uniform_BR.gather(1, self._position_B1.clamp(max=last))
        self._position_B1.add_(1)  # in place, so that a captured graph advances it
        return uniform_B1

    def _truncated(self, logits_BV: Tensor) -> Tensor:
        """Logits over temperature, with -inf for what top-k and top-p exclude."""
        logits_BV = logits_BV / self._temperature_B1
        if self.uses.top_k:
            logits_BV = _keep_top_k(logits_BV, self._top_k_B1)
        if self.uses.top_p:
            logits_BV = _keep_top_p(logits_BV, self._top_p_B1)
        return logits_BV


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    """[B, 1] float32."""
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)


def _uniforms(specs: Sequence[SamplingSpec], num_tokens: int) -> NDArray[np.float64]:
    """[B, R] numbers in [0, 1): row b is the counter-based stream of seed b."""
    return np.stack(
        [np.random.Generator(np.random.Philox(key=spec.seed)).random(num_tokens) for spec in specs]
    )


def _keep_top_k(logits_BV: Tensor, top_k_B1: Tensor) -> Tensor:
    sorted_BV = logits_BV.sort(dim=-1, descending=True).values
    index_B1 = top_k_B1.clamp(max=logits_BV.shape[-1]) - 1
    return logits_BV.masked_fill(logits_BV < sorted_BV.gather(1, index_B1), -torch.inf)


def _keep_top_p(logits_BV: Tensor, limit_B1: Tensor) -> Tensor:
    """Keep the most likely tokens until their mass reaches top_p; always at least one."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    mass_before_BV = probs_BV.cumsum(dim=-1) - probs_BV
    drop_sorted_BV = (mass_before_BV >= limit_B1) & (limit_B1 < 1)
    drop_sorted_BV[:, 0] = False
    drop_BV = torch.zeros_like(drop_sorted_BV).scatter(1, order_BV, drop_sorted_BV)
    return logits_BV.masked_fill(drop_BV, -torch.inf)
