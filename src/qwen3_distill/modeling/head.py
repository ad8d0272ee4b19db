"""Applies the output head in chunks: no [tokens, vocabulary] tensor ever exists as a whole.

Shape letters: N selected tokens, C tokens of one chunk, D hidden size, V vocabulary, K candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class TokenStats(NamedTuple):
    """Logprob and entropy of every token's distribution."""

    logprob_N: Tensor
    """float32 nats of the target tokens."""
    entropy_N: Tensor
    """float32 nats; carries no gradient."""


TokenStatistics: TypeAlias = Callable[[Tensor, Tensor, Tensor], TokenStats]
"""From hidden states [N, D], output head [V, D] and target ids [N]."""


def logits_of(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    """[C, V] float32 logits.

    Outside autocast: logits of magnitude 16 to 32 have steps of 0.125 in bfloat16, which would
    be 0.06 nats of noise in every logprob.
    """
    with torch.autocast(hidden_CD.device.type, enabled=False):
        return F.linear(hidden_CD.to(head_VD.dtype), head_VD).float()


def map_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    per_token: Sequence[Tensor],
    *,
    chunk_tokens: int,
) -> tuple[Tensor, ...]:
    """Apply ``function`` to chunks of rows and concatenate the results.

    With gradients and more than one chunk, each chunk is recomputed in the backward pass, so that
    its logits are freed after the forward pass.
    """
    num_tokens = per_token[0].shape[0]
    if num_tokens <= chunk_tokens:
        return function(*per_token)
    parts = list(_chunked(function, per_token, chunk_tokens))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _chunked(
    function: Callable[..., tuple[Tensor, ...]], per_token: Sequence[Tensor], chunk_tokens: int
) -> Iterator[tuple[Tensor, ...]]:
    for rows in zip(*(tensor.split(chunk_tokens) for tensor in per_token), strict=True):
        if torch.is_grad_enabled():
            yield checkpoint(function, *rows, use_reentrant=False)
        else:
            yield function(*rows)


def token_stats(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, *, chunk_tokens: int
) -> TokenStats:
    """Compute the targets' logprobs (with gradient, if enabled) and each distribution's entropy."""

    def chunk(hidden_CD: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
        logprob_CV = torch.log_softmax(logits_of(hidden_CD, head_VD), dim=-1)
        logprob_C = logprob_CV.gather(-1, target_C.unsqueeze(-1)).squeeze(-1)
        return logprob_C, entropy(logprob_CV)

    logprob_N, entropy_N = map_chunks(chunk, (hidden_ND, target_N), chunk_tokens=chunk_tokens)
    return TokenStats(logprob_N, entropy_N)


def entropy(logprob_CV: Tensor) -> Tensor:
    """[C] nats, without gradient."""
    detached_CV = logprob_CV.detach()
    return -(detached_CV.exp() * detached_CV).sum(-1)
