"""Applies the output head in chunks: no [tokens, vocabulary] tensor ever exists as a whole.

Shape letters: N selected tokens, C tokens of one chunk, D hidden size, V vocabulary, K candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

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


def candidate_logits(hidden_ND: Tensor, head_VD: Tensor, id_NK: Tensor) -> Tensor:
    """Compute [N, K] float32 logits of some ids, with a gradient for the hidden states only.

    Other rows of the head are not read. Operands are rounded as a matrix product would round them,
    under autocast or not; their products are added up in float32.
    """
    return _CandidateLogits.apply(hidden_ND, head_VD.detach(), id_NK)  # pyright: ignore[reportReturnType]


class _CandidateLogits(torch.autograd.Function):
    """Gathers the rows again for the backward pass: they are K times the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, id_NK: Tensor) -> Tensor:
        device = hidden_ND.device.type
        on = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if on else head_VD.dtype
        ctx.save_for_backward(head_VD, id_NK)
        ctx.hidden_dtype = hidden_ND.dtype
        with torch.autocast(device, enabled=False):
            parts = [
                torch.bmm(
                    _rows_CKD(head_VD, id_CK, ctx.dtype), _wide(hidden_CD, ctx.dtype)[..., None]
                )
                for hidden_CD, id_CK in _in_gathered_chunks(hidden_ND, id_NK)
            ]
        return torch.cat(parts).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        head_VD, id_NK = ctx.saved_tensors
        with torch.autocast(gradients[0].device.type, enabled=False):
            parts = [
                torch.bmm(gradient_CK[:, None], _rows_CKD(head_VD, id_CK, ctx.dtype)).squeeze(1)
                for gradient_CK, id_CK in _in_gathered_chunks(gradients[0], id_NK)
            ]
        return torch.cat(parts).to(ctx.hidden_dtype), None, None


_GATHERED_ROWS = 1 << 14
"""Rows of the head that are gathered at a time: of 2,560 values 250 MB, in bfloat16 and float32."""


def _in_gathered_chunks(*per_token: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors, the last one [N, K] ids, into chunks of tokens."""
    tokens = max(1, _GATHERED_ROWS // per_token[-1].shape[-1])
    return zip(*(tensor.split(tokens) for tensor in per_token), strict=True)


def _rows_CKD(head_VD: Tensor, id_CK: Tensor, dtype: torch.dtype) -> Tensor:
    return _wide(head_VD[id_CK], dtype)


def _wide(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a dtype, then widen to at least float32."""
    return values.to(dtype).to(torch.promote_types(dtype, torch.float32))


def entropy(logprob_CV: Tensor) -> Tensor:
    """[C] nats, without gradient."""
    detached_CV = logprob_CV.detach()
    return -(detached_CV.exp() * detached_CV).sum(-1)
