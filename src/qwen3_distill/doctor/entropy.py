"""Computes the entropy of a teacher's distributions from what its scores hold.

Shape letters: S scored tokens, K candidates, D hidden size, V vocabulary.
"""

import math

import numpy as np
import torch

from qwen3_distill.modeling.head import logits_of, map_chunks
from qwen3_distill.types import FloatArray, HiddenScore, TopKScore

_TINY = 1e-12
_CHUNK_TOKENS = 256


def lowest_entropy(score: TopKScore) -> FloatArray:
    """Return [S] nats: a lower bound of each distribution's entropy.

    No token outside of the K candidates is more likely than the last of them, p_K. So the rest
    r = 1 - sum p_k adds at least -r ln p_K to -sum p_k ln p_k.
    """
    logprob_SK = score.candidate_logprobs.astype(np.float64)
    p_SK = np.exp(logprob_SK)
    rest_S = np.clip(1 - p_SK.sum(axis=1), 0, 1)
    return -(p_SK * logprob_SK).sum(axis=1) - rest_S * np.maximum(
        logprob_SK.min(axis=1), math.log(_TINY)
    )


@torch.inference_mode()
def full_entropy(score: HiddenScore, head_VD: torch.Tensor) -> FloatArray:
    """Return [S] nats: each distribution's entropy, from the teacher's last hidden states."""
    hidden_SD = torch.from_numpy(score.hidden.copy()).to(head_VD.device)

    def entropy(hidden_CD: torch.Tensor) -> tuple[torch.Tensor]:
        logprob_CV = torch.log_softmax(logits_of(hidden_CD, head_VD), dim=-1)
        return (-(logprob_CV.exp() * logprob_CV).sum(dim=-1),)

    (entropy_S,) = map_chunks(entropy, (hidden_SD,), chunk_tokens=_CHUNK_TOKENS)
    return entropy_S.cpu().numpy()
