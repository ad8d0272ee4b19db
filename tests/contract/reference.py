"""The reference for all engines: one plain Hugging Face forward per sequence, and loops.

Nothing here pads, batches, caches, chunks or imports the code under test.

Shape letters: S sampled tokens of one rollout, V vocabulary, K candidates, D hidden size.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwen3_distill.config import (
    CrossEntropy,
    FullDivergence,
    GroupRelativePolicy,
    ObjectiveConfig,
    SampledReverseKL,
    TopKDivergence,
)
from qwen3_distill.types import (
    Batch,
    GivenCandidatesRequest,
    HiddenRequest,
    HiddenScore,
    Rollout,
    SampledRequest,
    ScoredRollout,
    ScoreRequest,
    TeacherScore,
    TopKRequest,
    TopKScore,
    TrainingRollout,
)


def scored_of(batch: Batch) -> list[ScoredRollout]:
    """The rollouts of a batch in which all have scores."""
    found = [item for item in batch.scored if isinstance(item, ScoredRollout)]
    assert len(found) == len(batch.scored)
    return found


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


def sampled_positions(rollout: Rollout) -> list[int]:
    """[S] positions of prompt and response that predict the sampled tokens, in order."""
    prompt = rollout.prompt.token_ids.size
    return [prompt + t - 1 for span in rollout.sampled for t in range(span.start, span.stop)]


def sampled_ids(rollout: Rollout) -> list[int]:
    """[S] the sampled tokens."""
    response = rollout.response_ids.tolist()
    return [token for span in rollout.sampled for token in response[span.start : span.stop]]


def response_positions(model: PreTrainedModel, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Hidden states [S, D] and logits [S, V] that predict each sampled token."""
    ids = torch.tensor([[*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]])
    out = model(ids, output_hidden_states=True)
    positions = sampled_positions(rollout)
    return out.hidden_states[-1][0, positions], out.logits[0, positions]


def response_logprobs(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """[S, V] nats at temperature 1."""
    return torch.log_softmax(response_positions(model, rollout)[1], dim=-1)


def token_logprobs(model: PreTrainedModel, rollout: Rollout) -> NDArray[np.float32]:
    """[S] nats of the sampled tokens, at temperature 1."""
    with torch.no_grad():
        logprobs = response_logprobs(model, rollout)
    target = torch.tensor(sampled_ids(rollout)).unsqueeze(-1)
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
    """[S] nats under the distribution that the rollout's `SamplingSpec` describes.

    Args:
        top_p_shift: added to the nucleus.
        likelier_nats: added to the sampled token's logit where top-k and the nucleus choose what
            they keep, not in its own logprob.
        one_more: 1 or -1 token in the nucleus, where its last one and the next are equally likely
            up to ``tie`` times the likeliest one's probability.
    """
    spec = rollout.sampling
    with torch.no_grad():
        logits = response_positions(model, rollout)[1].double().numpy()
    logits = logits / (temperature or spec.temperature)
    top_p = spec.top_p + top_p_shift if spec.top_p < 1 else 1.0
    logprobs: list[float] = []
    for row, token in zip(logits, sampled_ids(rollout), strict=True):
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

    Whether a token at the edge of top-k or of a nucleus belongs to it depends on an engine's
    rounding. Both answers are right within ``top_p_edge`` of the nucleus, ``likelier_nats`` of a
    logit, or ``tie`` between two tokens (`behavior_logprobs`).
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

    The response was sampled as a whole: R response tokens are S sampled ones.

    Args:
        keeps_cache: keep the keys and values that ``old`` computed of earlier tokens; else ``new``
            computes them again.
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
    """The score that a teacher must return for a rollout."""
    logprobs = token_logprobs(model, rollout)
    with torch.no_grad():
        hidden_SD, _ = response_positions(model, rollout)
        logprobs_SV = response_logprobs(model, rollout)
    match request:
        case SampledRequest():
            return TeacherScore(teacher_id="reference", logprobs=logprobs)
        case TopKRequest(k=k):
            top = torch.topk(logprobs_SV, k)
            return TopKScore(
                teacher_id="reference",
                logprobs=logprobs,
                candidate_ids=top.indices.numpy().astype(np.int32),
                candidate_logprobs=top.values.numpy(),
            )
        case GivenCandidatesRequest():
            assert rollout.candidate_ids is not None
            given = torch.tensor(rollout.candidate_ids).long()
            return TopKScore(
                teacher_id="reference",
                logprobs=logprobs,
                candidate_ids=rollout.candidate_ids,
                candidate_logprobs=logprobs_SV.gather(-1, given).numpy(),
            )
        case HiddenRequest():
            return HiddenScore(teacher_id="reference", logprobs=logprobs, hidden=hidden_SD.numpy())


def largest_gap(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


# --- The loss, written down again from its formulas -----------------------------------------------


def naive_loss(
    model: PreTrainedModel, batch: Batch, objective: ObjectiveConfig, teacher_head_VD: Tensor
) -> Tensor:
    """sum_i w_i sum_s l_s / sum_i w_i S_i, over sampled tokens, one at a time, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0.0
    for index, scored in enumerate(batch.scored):
        weight = float(batch.importance_weights[index])
        logprob_SV = response_logprobs(model, scored.rollout).double()
        task = float(batch.task_advantages[index])
        losses = naive_token_losses(logprob_SV, scored, objective, task, teacher_head_VD)
        total = total + weight * torch.stack(losses).sum()
        count += weight * len(losses)
    return total / count


def naive_token_losses(
    logprob_SV: Tensor,
    scored: TrainingRollout,
    objective: ObjectiveConfig,
    task: float,
    teacher_head_VD: Tensor,
) -> list[Tensor]:
    """The loss of every sampled token of a rollout, before weight and denominator."""
    if isinstance(objective, CrossEntropy):
        ids = sampled_ids(scored.rollout)
        return [-logprob_SV[s, token] for s, token in enumerate(ids)]
    if isinstance(objective, GroupRelativePolicy):
        return naive_grpo(logprob_SV, scored.rollout, objective, task)
    assert isinstance(scored, ScoredRollout)
    if isinstance(objective, SampledReverseKL):
        return naive_sampled(logprob_SV, scored, objective, task, teacher_head_VD)
    return [
        naive_divergence(student_V, scored, s, objective, teacher_head_VD)
        for s, student_V in enumerate(logprob_SV)
    ]


def naive_grpo(
    logprob_SV: Tensor, rollout: Rollout, config: GroupRelativePolicy, advantage: float
) -> list[Tensor]:
    """-min(rho A, clip(rho) A) of every sampled token; without clip -A log pi."""
    losses = []
    for s, token in enumerate(sampled_ids(rollout)):
        if config.clip is None:
            losses.append(-advantage * logprob_SV[s, token])
            continue
        ratio = (logprob_SV[s, token] - float(rollout.behavior_logprobs[s])).exp()
        high = 1 + (config.clip if config.clip_high is None else config.clip_high)
        bound = min(max(float(ratio.detach()), 1 - config.clip), high)
        is_free = float(ratio.detach()) * advantage <= bound * advantage
        losses.append(-ratio * advantage if is_free else -bound * advantage + 0 * ratio)
    return losses


def naive_sampled(
    logprob_SV: Tensor,
    scored: ScoredRollout,
    config: SampledReverseKL,
    task: float,
    teacher_head_VD: Tensor,
) -> list[Tensor]:
    """-rho_t A_t log pi(a_t) of every sampled token; only the last factor has a gradient."""
    rollout, tokens = scored.rollout, sampled_ids(scored.rollout)
    signals: list[float] = []
    ratios: list[float] = []
    for s, token in enumerate(tokens):
        student = float(logprob_SV[s, token].detach())
        ratio = math.exp(student - float(rollout.behavior_logprobs[s]))
        ratios.append(1.0 if config.ratio_cap is None else min(ratio, config.ratio_cap))
        signal = float(scored.score.logprobs[s]) - student
        if config.kl_baseline.kind != "none":
            like = (
                TopKDivergence(kind="top_k", k=config.kl_baseline.k)
                if config.kl_baseline.kind == "top_k"
                else FullDivergence(kind="full")
            )
            baseline = naive_divergence(logprob_SV[s].detach(), scored, s, like, teacher_head_VD)
            signal += float(baseline)
        if config.advantage_clip is not None:
            signal = max(-config.advantage_clip, min(config.advantage_clip, signal))
        signals.append(signal)
    losses = []
    for s, token in enumerate(tokens):
        later = enumerate(signals[s:])
        advantage = sum(config.discount**age * signal for age, signal in later) + task
        losses.append(-ratios[s] * advantage * logprob_SV[s, token])
    return losses


def naive_divergence(
    student_V: Tensor,
    scored: ScoredRollout,
    s: int,
    config: TopKDivergence | FullDivergence,
    teacher_head_VD: Tensor,
) -> Tensor:
    """The divergence at sampled token ``s``."""
    if isinstance(config, TopKDivergence):
        assert isinstance(scored.score, TopKScore)
        ids = torch.tensor(scored.score.candidate_ids[s].tolist())
        teacher = torch.tensor(scored.score.candidate_logprobs[s]).double().exp()
        p_X, q_X = student_V[ids].exp(), teacher
        if config.tail == "bin":
            p_X = torch.cat([p_X, 1 - p_X.sum(0, keepdim=True)])
            q_X = torch.cat([q_X, 1 - q_X.sum(0, keepdim=True)])
        else:
            p_X, q_X = p_X / p_X.sum(), q_X / q_X.sum()
    else:
        assert isinstance(scored.score, HiddenScore)
        hidden_D = torch.tensor(scored.score.hidden[s]).double()
        p_X, q_X = student_V.exp(), (teacher_head_VD.double() @ hidden_D).softmax(0)
    if config.divergence == "reverse_kl":
        return naive_kl(p_X, q_X)
    if config.divergence == "forward_kl":
        return naive_kl(q_X, p_X)
    assert config.beta is not None
    mixture_X = config.beta * q_X + (1 - config.beta) * p_X
    return config.beta * naive_kl(q_X, mixture_X) + (1 - config.beta) * naive_kl(p_X, mixture_X)


def naive_kl(p_X: Tensor, q_X: Tensor) -> Tensor:
    return (p_X * (p_X / q_X).log()).sum()
