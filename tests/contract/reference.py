"""What the engines are compared with: one plain Hugging Face forward per sequence, and loops.

Nothing here pads, batches, caches, chunks or imports the code under test.

Shape letters: R response tokens, V vocabulary, K candidates, D hidden size.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwen3_distill.scoring.score_request import (
    HiddenRequest,
    SampledRequest,
    ScoreRequest,
    TopKRequest,
)
from qwen3_distill.types import HiddenScore, Rollout, TeacherScore, TopKScore


def reference_model(
    model_dir: Path, weights: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Hugging Face's own float32 model, with other weights where some are given."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights is not None:
                parameter.copy_(weights[name])
    return model


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head


def response_positions(model: PreTrainedModel, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Hidden states [R, D] and logits [R, V] that each response token is predicted from."""
    ids = torch.tensor([[*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]])
    out = model(ids, output_hidden_states=True)
    first = rollout.prompt.token_ids.size - 1
    return out.hidden_states[-1][0, first:-1], out.logits[0, first:-1]


def response_logprobs(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """[R, V] nats at temperature 1."""
    return torch.log_softmax(response_positions(model, rollout)[1], dim=-1)


def token_logprobs(model: PreTrainedModel, rollout: Rollout) -> NDArray[np.float32]:
    """[R] nats of the response tokens, at temperature 1."""
    with torch.no_grad():
        logprobs = response_logprobs(model, rollout)
    target = torch.tensor(rollout.response_ids.tolist()).unsqueeze(-1)
    return logprobs.gather(-1, target).squeeze(-1).numpy()


def behavior_logprobs(
    model: PreTrainedModel,
    rollout: Rollout,
    *,
    temperature: float | None = None,
    top_p_shift: float = 0.0,
    likelier_nats: float = 0.0,
    one_more: int = 0,
    tie: float = 0.0,
) -> NDArray[np.float64]:
    """[R] nats under the distribution that the rollout's `SamplingSpec` describes.

    Args:
        top_p_shift: is added to the nucleus.
        likelier_nats: by so much the sampled token counts as likelier in what top-k and the nucleus
            keep, not in its own logprob.
        one_more: 1 or -1 token in the nucleus, where its last one and the next are as likely up to
            ``tie`` times the likeliest one's probability.
    """
    spec = rollout.sampling
    with torch.no_grad():
        logits = response_positions(model, rollout)[1].double().numpy()
    logits = logits / (temperature or spec.temperature)
    top_p = spec.top_p + top_p_shift if spec.top_p < 1 else 1.0
    logprobs: list[float] = []
    for row, token in zip(logits, rollout.response_ids.tolist(), strict=True):
        ranks = row.copy()
        ranks[token] += likelier_nats
        kept_V = truncated_logprobs(row, spec.top_k, top_p, ranks, one_more, tie)
        logprobs.append(float(kept_V[token]))
    return np.array(logprobs)


def behavior_gap(
    model: PreTrainedModel,
    rollout: Rollout,
    *,
    top_p_edge: float = 0.0,
    likelier_nats: float = 0.0,
    tie: float = 0.0,
) -> float:
    """The largest difference in nats between a rollout's behavior logprobs and the model's.

    Whether a token at the edge of top-k or of a nucleus belongs to it is a matter of an engine's
    rounding. Both are right within ``top_p_edge`` of the nucleus, ``likelier_nats`` of a logit, or
    ``tie`` between two tokens (`behavior_logprobs`).
    """
    expected = np.stack(
        [
            behavior_logprobs(
                model,
                rollout,
                top_p_shift=shift,
                likelier_nats=likelier,
                one_more=one_more,
                tie=tie,
            )
            for shift in dict.fromkeys((0.0, -top_p_edge, top_p_edge))
            for likelier in dict.fromkeys((0.0, likelier_nats))
            for one_more in ((0, -1, 1) if tie else (0,))
        ]
    )
    assert expected.shape[1:] == rollout.behavior_logprobs.shape
    return float(np.abs(rollout.behavior_logprobs - expected).min(axis=0).max())


def swapped_logprobs(
    old: PreTrainedModel, new: PreTrainedModel, rollout: Rollout, start: int, *, keeps_cache: bool
) -> NDArray[np.float64]:
    """[R] nats at temperature 1 where ``new`` took over before response token ``start``.

    Args:
        keeps_cache: what ``old`` computed of the tokens before is kept; else ``new`` computes it
            again.
    """
    before = behavior_logprobs(old, rollout)[:start]
    if not keeps_cache:
        return np.concatenate([before, behavior_logprobs(new, rollout)[start:]])
    ids = torch.tensor([[*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]])
    taken_over = rollout.prompt.token_ids.size + start - 1  # this token is new's first input
    with torch.no_grad():
        cache = old(ids[:, :taken_over], use_cache=True).past_key_values
        logits = new(ids[:, taken_over:], past_key_values=cache, use_cache=True).logits[0, :-1]
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    target = ids[0, taken_over + 1 :].unsqueeze(-1)
    return np.concatenate([before, logprobs.gather(-1, target).squeeze(-1).numpy()])


def truncated_logprobs(
    logits_V: NDArray[np.float64],
    top_k: int,
    top_p: float,
    ranks_V: NDArray[np.float64],
    one_more: int = 0,
    tie: float = 0.0,
) -> NDArray[np.float64]:
    """[V]: top-k, then the fewest most likely tokens of what is left that reach top_p."""
    kept = sorted(range(len(logits_V)), key=lambda token: -ranks_V[token])
    if top_k > 0:
        kept = kept[:top_k]
    weights = {token: np.exp(logits_V[token]) for token in kept}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += weights[token] / total
    last, num_kept = nucleus[-1], len(nucleus)
    if num_kept < len(kept) and weights[last] - weights[kept[num_kept]] < tie * weights[kept[0]]:
        nucleus = kept[: num_kept + one_more]
    out = np.full(len(logits_V), -np.inf)
    total = sum(weights[token] for token in nucleus)
    for token in nucleus:
        out[token] = np.log(weights[token] / total)
    return out


def reference_score(
    model: PreTrainedModel, rollout: Rollout, request: ScoreRequest
) -> TeacherScore:
    """The score that a teacher owes for a rollout."""
    logprobs = token_logprobs(model, rollout)
    with torch.no_grad():
        hidden_RD, _ = response_positions(model, rollout)
        logprobs_RV = response_logprobs(model, rollout)
    match request:
        case SampledRequest():
            return TeacherScore(teacher_id="reference", logprobs=logprobs)
        case TopKRequest(k=k):
            top = torch.topk(logprobs_RV, k)
            return TopKScore(
                teacher_id="reference",
                logprobs=logprobs,
                candidate_ids=top.indices.numpy().astype(np.int32),
                candidate_logprobs=top.values.numpy(),
            )
        case HiddenRequest():
            return HiddenScore(teacher_id="reference", logprobs=logprobs, hidden=hidden_RD.numpy())


def largest_gap(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())
