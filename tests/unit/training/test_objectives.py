"""Objectives on micro-batches: padding, splits, baselines, memory of the head."""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen3_distill.config import (
    ObjectiveConfig,
    ObjectiveSchema,
    RunConfig,
    candidates_per_token,
    needs_hidden_states,
)
from qwen3_distill.errors import AlignmentError, ConfigError
from qwen3_distill.modeling.head import TokenStatistics, TokenStats, token_stats
from qwen3_distill.training.batching import MicroBatch, collate
from qwen3_distill.training.objectives.base import (
    LossTerms,
    Objective,
    read_scalars,
)
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.training.objectives.sampled import SampledObjective
from qwen3_distill.types import (
    Batch,
    FinishReason,
    HiddenRequest,
    HiddenScore,
    Metric,
    Prompt,
    Rollout,
    SampledRequest,
    SamplingSpec,
    ScoredRollout,
    ScoreRequest,
    TopKRequest,
    TopKScore,
    VersionSpan,
    WeightVersion,
)

V, D, K = 11, 6, 4
ROWS = [(2, 5), (4, 1), (1, 7), (3, 3)]
GENERATOR = torch.Generator().manual_seed(0)
HEAD = torch.randn(V, D, generator=GENERATOR)
TEACHER_HEAD = torch.randn(V, D, generator=GENERATOR)
TEACHER_HIDDEN = [torch.randn(size, D, generator=GENERATOR) for _, size in ROWS]
STUDENT_HIDDEN = [torch.randn(prompt + size, D, generator=GENERATOR) for prompt, size in ROWS]

OBJECTIVES: list[dict[str, Any]] = [
    {"kind": "sampled_reverse_kl"},
    {"kind": "sampled_reverse_kl", "discount": 0.5},
    {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "full"}},
    {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "top_k", "k": K}},
    {"kind": "top_k", "k": K, "tail": "bin"},
    {"kind": "top_k", "k": K, "tail": "renormalize", "divergence": "forward_kl"},
    {"kind": "full"},
    {"kind": "full", "divergence": "jsd", "beta": 0.4},
]


def objective_config(values: dict[str, Any]) -> ObjectiveConfig:
    field = RunConfig.model_fields["objective"]
    from pydantic import TypeAdapter  # noqa: PLC0415 - only to validate one union

    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    return adapter.validate_python(values, strict=False)


def make_batch(values: dict[str, Any]) -> Batch:
    """Four rollouts, scored by the teacher's head in the form the objective needs."""
    scored = []
    for row, (prompt, size) in enumerate(ROWS):
        rng = np.random.default_rng(row)
        ids = rng.integers(0, V, size)
        teacher_RV = (TEACHER_HIDDEN[row] @ TEACHER_HEAD.T).log_softmax(-1)
        common = {
            "teacher_id": "t",
            "logprobs": teacher_RV[torch.arange(size), torch.from_numpy(ids)].numpy(),
        }
        if values["kind"] == "top_k" or values.get("kl_baseline", {}).get("kind") == "top_k":
            top = teacher_RV.topk(K)
            score = TopKScore(
                **common, candidate_ids=top.indices.numpy(), candidate_logprobs=top.values.numpy()
            )
        else:
            score = HiddenScore(**common, hidden=TEACHER_HIDDEN[row].numpy())
        rollout = Rollout(
            rollout_id=f"r{row}",
            prompt=Prompt(prompt_id="p", token_ids=np.arange(prompt)),
            sampling=SamplingSpec(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=9, seed=0),
            response_ids=ids,
            behavior_logprobs=-rng.uniform(0.5, 3, size),
            versions=(VersionSpan(start=0, stop=size, version=WeightVersion(step=0, digest="d")),),
            finish_reason=FinishReason.LENGTH,
        )
        scored.append(ScoredRollout(rollout=rollout, score=score))
    return Batch(
        scored=tuple(scored),
        importance_weights=np.array([1.0, 0.5, 2.0, 1.5]),
        task_advantages=np.array([0.5, -0.5, 0.0, 1.0]),
    )


def hidden_rows(indices: Sequence[int], width: int, scale: Tensor) -> Tensor:
    """[B, T, D] student states; ``scale`` stands for the model below the head."""
    out_BTD = torch.zeros(len(indices), width, D)
    for b, row in enumerate(indices):
        values = STUDENT_HIDDEN[row][:-1]
        out_BTD[b, : len(values)] = values
    return out_BTD * scale


def run(
    values: dict[str, Any], groups: Sequence[Sequence[int]], *, chunk_tokens: int = 1000
) -> tuple[float, Tensor, list[Metric]]:
    """Loss, gradient (head, and what lies below it) and metrics over the micro-batches."""
    batch = make_batch(values)
    head, below = HEAD.clone().requires_grad_(), torch.ones(D, requires_grad=True)
    total, metrics = 0.0, list[Metric]()
    for group in groups:
        micro = collate(batch, group)
        terms = terms_of(values, micro, group, head, batch.denominator, below, chunk_tokens)
        terms.loss.backward()
        total += float(terms.loss.detach())
        metrics.extend(read(terms))
    assert head.grad is not None
    assert below.grad is not None
    return total, torch.cat([head.grad, below.grad.unsqueeze(0)]), metrics


def read(terms: LossTerms) -> list[Metric]:
    totals = read_scalars([metric.total for metric in terms.metrics])
    return [metric.read(total) for metric, total in zip(terms.metrics, totals, strict=True)]


def terms_of(
    values: dict[str, Any],
    micro: MicroBatch,
    group: Sequence[int],
    head: Tensor,
    denominator: float,
    below: Tensor = torch.ones(D),  # noqa: B008 - never written to
    chunk_tokens: int = 1000,
) -> LossTerms:
    hidden_BTD = hidden_rows(group, micro.input_BT.shape[1], below)
    return objective_of(values, chunk_tokens).terms(micro, hidden_BTD, head, denominator)


def objective_of(
    values: dict[str, Any],
    chunk_tokens: int = 1000,
    token_statistics: TokenStatistics | None = None,
    exact: bool = True,
) -> Objective:
    return build_objective(
        objective_config(values),
        teacher_head_VD=TEACHER_HEAD,
        chunk_tokens=chunk_tokens,
        token_statistics=token_statistics,
        has_exact_statistics=exact,
    )


@pytest.mark.parametrize("values", OBJECTIVES)
@pytest.mark.parametrize("groups", [[[0], [1], [2], [3]], [[3, 0], [2, 1]], [[2], [0, 1, 3]]])
def test_any_split_into_micro_batches_gives_the_same_step(values, groups) -> None:
    whole_loss, whole_gradient, _ = run(values, [[0, 1, 2, 3]])
    loss, gradient, _ = run(values, groups)
    assert loss == pytest.approx(whole_loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("values", OBJECTIVES)
def test_chunks_of_the_head_give_the_same_step(values) -> None:
    whole_loss, whole_gradient, _ = run(values, [[0, 1, 2, 3]])
    loss, gradient, _ = run(values, [[0, 1, 2, 3]], chunk_tokens=3)
    assert loss == pytest.approx(whole_loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("values", OBJECTIVES)
def test_metrics_combine_to_the_same_values_over_a_split(values) -> None:
    def combined(metrics: list[Metric]) -> dict[str, float]:
        merged: dict[str, Metric] = {}
        for metric in metrics:
            known = merged.get(metric.key)
            merged[metric.key] = metric if known is None else known.combined(metric)
        return {key: metric.value for key, metric in merged.items()}

    _, _, whole = run(values, [[0, 1, 2, 3]])
    _, _, split = run(values, [[0], [1, 2], [3]])
    assert combined(split) == pytest.approx(combined(whole), rel=1e-4)


@pytest.mark.parametrize("values", OBJECTIVES)
def test_nan_off_the_loss_tokens_reaches_neither_loss_nor_gradient(values) -> None:
    batch = make_batch(values)
    micro = collate(batch, [0, 1, 2, 3])
    objective = objective_of(values)
    clean_BTD = hidden_rows([0, 1, 2, 3], micro.input_BT.shape[1], torch.ones(D))
    dirty_BTD = torch.full_like(clean_BTD, torch.nan)
    dirty_BTD.view(-1, D)[micro.loss_index_N] = clean_BTD.view(-1, D)[micro.loss_index_N]
    losses, gradients, metrics = [], [], []
    for hidden_BTD in (clean_BTD.requires_grad_(), dirty_BTD.requires_grad_()):
        terms = objective.terms(micro, hidden_BTD, HEAD, batch.denominator)
        losses.append(terms.loss)
        metrics.append(read(terms))
        gradients.append(torch.autograd.grad(terms.loss, hidden_BTD)[0])
    assert torch.equal(*losses)
    assert torch.equal(*gradients)
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("values", OBJECTIVES)
def test_a_packed_row_gives_the_same_step(values) -> None:
    batch = make_batch(values)
    objective = objective_of(values)
    rows = [2, 0, 3]
    padded, packed = (collate(batch, rows, packed=packed) for packed in (False, True))
    hidden_BTD = hidden_rows(rows, padded.input_BT.shape[1], torch.ones(D))
    packed_1TD = torch.cat([STUDENT_HIDDEN[row][:-1] for row in rows]).unsqueeze(0)
    one = objective.terms(padded, hidden_BTD, HEAD, batch.denominator)
    other = objective.terms(packed, packed_1TD, HEAD, batch.denominator)
    assert torch.equal(one.loss, other.loss)
    assert read(one) == read(other)


def test_other_token_statistics_are_used_where_they_are_given() -> None:
    def doubled(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> TokenStats:
        stats = token_stats(hidden_ND, head_VD, target_N, chunk_tokens=1000)
        return TokenStats(stats.logprob_N, 2 * stats.entropy_N)

    batch = make_batch({"kind": "full"})
    micro = collate(batch, [0, 1])
    hidden_BTD = hidden_rows([0, 1], micro.input_BT.shape[1], torch.ones(D))
    own, given = (
        objective_of({"kind": "sampled_reverse_kl"}, token_statistics=statistics)
        for statistics in (None, doubled)
    )
    entropies = [
        next(
            m.value
            for m in read(objective.terms(micro, hidden_BTD, HEAD, batch.denominator))
            if m.key == "loss/entropy_nats"
        )
        for objective in (own, given)
    ]
    assert entropies[1] == pytest.approx(2 * entropies[0])


TOP_K_OBJECTIVES = [
    {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "top_k", "k": K}},
    *(
        {"kind": "top_k", "k": K, "tail": tail, **divergence}
        for tail in ("bin", "renormalize")
        for divergence in (
            {"divergence": "reverse_kl"},
            {"divergence": "forward_kl"},
            {"divergence": "jsd", "beta": 0.4},
        )
    ),
]


def exact_stats(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> TokenStats:
    return token_stats(hidden_ND, head_VD, target_N, chunk_tokens=1000)


@pytest.mark.parametrize("values", TOP_K_OBJECTIVES)
@pytest.mark.parametrize("is_frozen", [True, False])
def test_candidates_beside_other_statistics_give_the_same_step(values, is_frozen, monkeypatch):
    """Statistics of another kernel, and the logits of the candidates alone."""
    monkeypatch.setattr("qwen3_distill.modeling.head._GATHERED_ROWS", 3 * (K + 1))
    batch = make_batch(values)
    micro = collate(batch, [0, 1, 2, 3])
    found = []
    for statistics in (None, exact_stats):
        below = torch.ones(D, requires_grad=True)
        head = HEAD.clone().requires_grad_(not is_frozen)
        hidden_BTD = hidden_rows([0, 1, 2, 3], micro.input_BT.shape[1], below)
        objective = objective_of(values, token_statistics=statistics)
        terms = objective.terms(micro, hidden_BTD, head, batch.denominator)
        terms.loss.backward()
        gradients = [below.grad] if is_frozen else [below.grad, head.grad]
        found.append((terms.loss, terms.magnitude_N, gradients, read(terms)))
    (loss, magnitude_N, gradients, metrics), (loss_, magnitude_N_, gradients_, metrics_) = found
    torch.testing.assert_close(loss_, loss)
    torch.testing.assert_close(magnitude_N_, magnitude_N)
    torch.testing.assert_close(gradients_, gradients)
    assert [m.key for m in metrics_] == [m.key for m in metrics]
    assert [m.value for m in metrics_] == pytest.approx([m.value for m in metrics], rel=1e-5)


def test_statistics_that_are_given_spare_all_other_logits(monkeypatch) -> None:
    """With a frozen head no [tokens, vocabulary] logits are made for the teacher's candidates."""
    values = {"kind": "top_k", "k": K}
    batch = make_batch(values)
    micro = collate(batch, [0, 1])
    hidden_BTD = hidden_rows([0, 1], micro.input_BT.shape[1], torch.ones(D)).requires_grad_()
    stats = exact_stats(micro.at_loss_tokens(hidden_BTD), HEAD, micro.target_N)

    def refused(*_: Tensor) -> Tensor:
        raise AssertionError("logits of the whole vocabulary")

    monkeypatch.setattr("qwen3_distill.training.objectives.divergences.logits_of", refused)
    objective = objective_of(values, token_statistics=lambda *_: stats)
    assert objective.terms(micro, hidden_BTD, HEAD, batch.denominator).loss.isfinite()


@pytest.mark.parametrize("values", [TOP_K_OBJECTIVES[0], TOP_K_OBJECTIVES[1]])
def test_candidates_do_not_take_the_rounding_of_other_statistics(values) -> None:
    """In bfloat16 a kernel's logits may be rounded to 0.1; the candidates have their own then."""
    shift = 0.1
    batch = make_batch(values)
    micro = collate(batch, [0, 1])
    hidden_BTD = hidden_rows([0, 1], micro.input_BT.shape[1], torch.ones(D))

    def rounded(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> TokenStats:
        stats = exact_stats(hidden_ND, head_VD, target_N)
        return TokenStats(stats.logprob_N + shift, stats.entropy_N)

    def of_candidates(statistics: TokenStatistics, exact: bool) -> float:
        """Return the loss, or of the sampled token's the candidates' part."""
        objective = objective_of(values, token_statistics=statistics, exact=exact)
        if isinstance(objective, SampledObjective):
            hidden_ND = micro.at_loss_tokens(hidden_BTD)
            stats = statistics(hidden_ND, HEAD, micro.target_N)
            return float(objective._baseline(micro, hidden_ND, HEAD, stats).sum())
        return float(objective.terms(micro, hidden_BTD, HEAD, batch.denominator).loss)

    assert of_candidates(rounded, exact=False) == pytest.approx(
        of_candidates(exact_stats, exact=False)
    )
    moved = of_candidates(rounded, exact=True)
    assert moved != pytest.approx(of_candidates(exact_stats, exact=True), rel=1e-2)


def test_the_full_baseline_is_the_exact_kl() -> None:
    """With b = KL, E_a[signal] = 0 at every state, so the mean signal needs no samples."""
    values = {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "full"}}
    plain = {"kind": "sampled_reverse_kl"}
    settings = {"advantage_clip": None, "ratio_cap": None}
    with_baseline = run(values | settings, [[0]])[0]
    without = run(plain | settings, [[0]])[0]
    batch = make_batch(values)
    student_RV = (STUDENT_HIDDEN[0][1:-1] @ HEAD.T).log_softmax(-1)
    teacher_RV = (TEACHER_HIDDEN[0] @ TEACHER_HEAD.T).log_softmax(-1)
    kl_R = (student_RV.exp() * (student_RV - teacher_RV)).sum(-1)
    ids = torch.from_numpy(batch.scored[0].rollout.response_ids.astype(np.int64))
    logprob_R = student_RV[torch.arange(5), ids]
    expected = -float((kl_R * logprob_R).sum()) / batch.denominator
    assert with_baseline - without == pytest.approx(expected, rel=1e-4)


def test_a_divergence_is_the_weighted_mean_over_the_steps_tokens() -> None:
    loss = run({"kind": "full"}, [[0, 1, 2, 3]])[0]
    batch = make_batch({"kind": "full"})
    total = 0.0
    for row, (prompt, size) in enumerate(ROWS):
        student_RV = (STUDENT_HIDDEN[row][prompt - 1 : -1] @ HEAD.T).log_softmax(-1)
        teacher_RV = (TEACHER_HIDDEN[row] @ TEACHER_HEAD.T).log_softmax(-1)
        assert len(student_RV) == size
        kl = (student_RV.exp() * (student_RV - teacher_RV)).sum()
        total += float(batch.importance_weights[row]) * float(kl)
    assert loss == pytest.approx(total / (5 * 1.0 + 1 * 0.5 + 7 * 2.0 + 3 * 1.5), rel=1e-5)


def test_an_objective_over_hidden_states_without_a_teacher_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="full distribution"):
        build_objective(objective_config({"kind": "full"}), teacher_head_VD=None, chunk_tokens=8)


def test_a_batch_without_the_teachers_candidates_is_refused() -> None:
    batch = make_batch({"kind": "full"})
    micro = collate(batch, [0])
    with pytest.raises(AlignmentError, match="top 4"):
        terms_of({"kind": "top_k", "k": K}, micro, [0], HEAD, batch.denominator)


def every_member() -> list[type[ObjectiveSchema]]:
    """The classes in the union `ObjectiveConfig`."""
    union, _ = get_args(ObjectiveConfig)
    return list(get_args(union))


@pytest.mark.parametrize("member", every_member(), ids=lambda member: member.__name__)
def test_every_member_of_the_union_is_built_by_the_class_it_names(
    member: type[ObjectiveSchema],
) -> None:
    kind = get_args(member.model_fields["kind"].annotation)[0]
    config = objective_config({"kind": kind})
    assert type(config) is member
    built = build_objective(config, teacher_head_VD=TEACHER_HEAD, chunk_tokens=8)
    assert f"{type(built).__module__}:{type(built).__name__}" == member.implementation


NEEDS: list[tuple[dict[str, Any], ScoreRequest, bool, bool]] = [
    ({"kind": "sampled_reverse_kl"}, SampledRequest(), False, False),
    ({"kind": "sampled_reverse_kl", "ratio_cap": None}, SampledRequest(), True, False),
    ({"kind": "sampled_reverse_kl", "discount": 0.5}, SampledRequest(), False, True),
    ({"kind": "sampled_reverse_kl", "task_reward_weight": 0.5}, SampledRequest(), False, True),
    (
        {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "top_k", "k": 3}},
        TopKRequest(k=3),
        False,
        False,
    ),
    (
        {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "full"}},
        HiddenRequest(),
        False,
        False,
    ),
    ({"kind": "top_k", "k": 5}, TopKRequest(k=5), False, False),
    ({"kind": "full"}, HiddenRequest(), False, False),
]


@pytest.mark.parametrize(("values", "request_", "lacks_ratio", "credits_later"), NEEDS)
def test_an_objective_states_what_it_needs(values, request_, lacks_ratio, credits_later) -> None:
    config = objective_config(values)
    assert config.score_request == request_
    assert config.lacks_ratio == lacks_ratio
    assert config.credits_later_tokens == credits_later
    assert config.reward_weight == values.get("task_reward_weight", 0)
    assert candidates_per_token(config) == getattr(request_, "k", 0)
    assert needs_hidden_states(config) == isinstance(request_, HiddenRequest)
