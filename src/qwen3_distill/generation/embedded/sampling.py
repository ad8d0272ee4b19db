"""From logits to one sampled token per row, with the log-probability it was sampled with.

Shape letters: B rows decoded together, V vocabulary, R new tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from qwen3_distill.types import SamplingSpec


class RowSampler:
    """Samples token after token for some rows, each by its own `SamplingSpec`.

    The random numbers of a row depend on its seed and the token's position alone, never on the
    other rows.
    """

    def __init__(self, specs: Sequence[SamplingSpec], device: torch.device) -> None:
        self._uniform_BR = torch.from_numpy(_uniforms(specs)).to(device)
        self._position_B1 = torch.zeros(len(specs), 1, dtype=torch.long, device=device)
        self._temperature_B1 = torch.tensor(
            [[spec.temperature or 1.0] for spec in specs], dtype=torch.float32, device=device
        )
        self._greedy = [spec.is_greedy for spec in specs]
        self._top_k = [spec.top_k for spec in specs]
        self._top_p = [spec.top_p for spec in specs]

    def select(self, rows: Sequence[int]) -> "RowSampler":
        """A sampler for some of the rows."""
        chosen = object.__new__(RowSampler)
        index = torch.tensor(rows, device=self._uniform_BR.device)
        chosen._uniform_BR = self._uniform_BR[index]
        chosen._position_B1 = self._position_B1[index]
        chosen._temperature_B1 = self._temperature_B1[index]
        chosen._greedy = [self._greedy[row] for row in rows]
        chosen._top_k = [self._top_k[row] for row in rows]
        chosen._top_p = [self._top_p[row] for row in rows]
        return chosen

    def joined(self, other: "RowSampler") -> "RowSampler":
        """A sampler for the rows of both; each goes on at its own position."""
        both = object.__new__(RowSampler)
        longest = max(self._uniform_BR.shape[1], other._uniform_BR.shape[1])
        both._uniform_BR = torch.cat(
            [
                pad(part._uniform_BR, (0, longest - part._uniform_BR.shape[1]))
                for part in (self, other)
            ]
        )
        both._position_B1 = torch.cat([self._position_B1, other._position_B1])
        both._temperature_B1 = torch.cat([self._temperature_B1, other._temperature_B1])
        both._greedy = [*self._greedy, *other._greedy]
        both._top_k = [*self._top_k, *other._top_k]
        both._top_p = [*self._top_p, *other._top_p]
        return both

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
        if any(self._greedy):
            greedy_B1 = torch.tensor(self._greedy, device=ids_B1.device).unsqueeze(1)
            ids_B1 = torch.where(greedy_B1, logits_BV.argmax(dim=-1, keepdim=True), ids_B1)
            logprobs_B1 = logprobs_B1.masked_fill(greedy_B1, 0.0)
        return ids_B1.squeeze(1), logprobs_B1.squeeze(1)

    def _next_uniform_B1(self) -> Tensor:
        last = self._uniform_BR.shape[1] - 1
        uniform_B1 = self._uniform_BR.gather(1, self._position_B1.clamp(max=last))
        self._position_B1 = self._position_B1 + 1
        return uniform_B1

    def _truncated(self, logits_BV: Tensor) -> Tensor:
        """Logits over temperature, with -inf for what top-k and top-p exclude."""
        logits_BV = logits_BV / self._temperature_B1
        if any(top_k > 0 for top_k in self._top_k):
            logits_BV = _keep_top_k(logits_BV, self._top_k)
        if any(top_p < 1 for top_p in self._top_p):
            logits_BV = _keep_top_p(logits_BV, self._top_p)
        return logits_BV


def _uniforms(specs: Sequence[SamplingSpec]) -> NDArray[np.float64]:
    """[B, R] numbers in [0, 1): row b is the counter-based stream of seed b."""
    longest = max(spec.max_new_tokens for spec in specs)
    return np.stack(
        [np.random.Generator(np.random.Philox(key=spec.seed)).random(longest) for spec in specs]
    )


def _keep_top_k(logits_BV: Tensor, top_k: Sequence[int]) -> Tensor:
    vocab_size = logits_BV.shape[-1]
    keep = [min(k, vocab_size) if k > 0 else vocab_size for k in top_k]
    sorted_BV = logits_BV.sort(dim=-1, descending=True).values
    index_B1 = torch.tensor(keep, device=logits_BV.device).unsqueeze(1) - 1
    return logits_BV.masked_fill(logits_BV < sorted_BV.gather(1, index_B1), -torch.inf)


def _keep_top_p(logits_BV: Tensor, top_p: Sequence[float]) -> Tensor:
    """Keep the most likely tokens until their mass reaches top_p; always at least one."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    mass_before_BV = probs_BV.cumsum(dim=-1) - probs_BV
    limit_B1 = torch.tensor(top_p, dtype=logits_BV.dtype, device=logits_BV.device).unsqueeze(1)
    drop_sorted_BV = (mass_before_BV >= limit_B1) & (limit_B1 < 1)
    drop_sorted_BV[:, 0] = False
    drop_BV = torch.zeros_like(drop_sorted_BV).scatter(1, order_BV, drop_sorted_BV)
    return logits_BV.masked_fill(drop_BV, -torch.inf)
