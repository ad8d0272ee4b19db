"""The objectives against exact references, in float64 where exactness is the point."""

import math

import pytest
import torch
from torch import Tensor

from qwen3_distill.training.objectives.losses import (
    MIN_TAIL_MASS,
    discounted_suffix_sum,
    divergence,
    renormalized,
    sampled_reverse_kl,
    with_tail_bin,
)

V = 7
DIVERGENCES = [("reverse_kl", None), ("forward_kl", None), ("jsd", 0.3), ("jsd", 0.8)]


def random_logits(seed: int, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, V, generator=generator, dtype=torch.float64)


def naive_kl(p: Tensor, q: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p_v, q_v in zip(p, q, strict=True):
        total = total + p_v * (torch.log(p_v) - torch.log(q_v))
    return total


def kl_gradient(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Gradient of KL(student || teacher) with respect to the student's logits, by autograd."""
    leaf = logits.clone().requires_grad_()
    naive_kl(leaf.softmax(-1)[0], teacher_logits.softmax(-1)[0]).backward()
    assert leaf.grad is not None
    return leaf.grad


def expected_gradient(
    logits: Tensor,
    teacher_logits: Tensor,
    behavior_logits: Tensor,
    *,
    ratio_cap: float | None = None,
    baseline: float = 0.0,
    use_ratio: bool = True,
) -> Tensor:
    """Exact expectation of the sampled gradient: every action, weighed by mu(a)."""
    leaf = logits.clone().requires_grad_()
    logprob_V = leaf.log_softmax(-1)[0]
    behavior_V = behavior_logits.log_softmax(-1)[0]
    teacher_V = teacher_logits.log_softmax(-1)[0]
    ones_V = torch.ones(V, dtype=torch.float64)
    terms = sampled_reverse_kl(
        logprob_V,
        behavior_V if use_ratio else logprob_V.detach(),
        teacher_V,
        baseline * ones_V,
        behavior_V.exp(),  # the weight of a rollout stands in for the action's probability
        0 * ones_V,
        tokens_per_row=[1] * V,
        denominator=1.0,
        ratio_cap=1e9 if ratio_cap is None else ratio_cap,
        advantage_clip=None,
    )
    terms.loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def test_expected_gradient_is_that_of_the_full_kl_on_policy() -> None:
    student, teacher = random_logits(0), random_logits(1)
    torch.testing.assert_close(
        expected_gradient(student, teacher, student), kl_gradient(student, teacher)
    )


def test_expected_gradient_is_exact_for_stale_samples() -> None:
    student, teacher, stale = random_logits(0), random_logits(1), random_logits(2)
    torch.testing.assert_close(
        expected_gradient(student, teacher, stale), kl_gradient(student, teacher)
    )


def test_without_the_ratio_stale_samples_give_another_gradient() -> None:
    student, teacher, stale = random_logits(0), random_logits(1), random_logits(2)
    biased = expected_gradient(student, teacher, stale, use_ratio=False)
    exact = kl_gradient(student, teacher)
    assert torch.cosine_similarity(biased, exact).item() < 0.99


def test_a_baseline_leaves_the_expected_gradient() -> None:
    student, teacher = random_logits(0), random_logits(1)
    torch.testing.assert_close(
        expected_gradient(student, teacher, student, baseline=0.7), kl_gradient(student, teacher)
    )


def test_the_often_quoted_formula_climbs_the_kl() -> None:
    """(log p - log q) * advantage with advantage = -(reverse KL): the sign is wrong."""
    student, teacher = random_logits(0), random_logits(1)
    leaf = student.clone().requires_grad_()
    logprob_V = leaf.log_softmax(-1)[0]
    gap_V = logprob_V - teacher.log_softmax(-1)[0]
    (logprob_V.detach().exp() * gap_V * -gap_V.detach()).sum().backward()
    assert leaf.grad is not None
    cosine = torch.cosine_similarity(leaf.grad, kl_gradient(student, teacher)).item()
    assert cosine == pytest.approx(-1.0)


def sampled(
    learner: Tensor, behavior: list[float], teacher: list[float], **changes: object
) -> tuple[Tensor, Tensor]:
    """Loss and per-token gradient for tokens of two rows (2 + 1 tokens)."""
    settings: dict[str, object] = {
        "baseline_N": torch.zeros(3),
        "importance_weight_N": torch.ones(3),
        "task_advantage_N": torch.zeros(3),
        "tokens_per_row": [2, 1],
        "denominator": 3.0,
        "ratio_cap": 2.0,
        "advantage_clip": 5.0,
    }
    leaf = learner.clone().requires_grad_()
    terms = sampled_reverse_kl(
        leaf,
        torch.tensor(behavior),
        torch.tensor(teacher),
        **(settings | changes),  # pyright: ignore[reportArgumentType]
    )
    terms.loss.backward()
    assert leaf.grad is not None
    return terms.loss.detach(), leaf.grad


LEARNER = torch.tensor([-1.0, -2.0, -0.5])


def test_per_token_gradient_by_hand() -> None:
    # ratios exp(-1 + 1) = 1, exp(-2 + 2.5) = 1.6487, exp(-0.5 + 2.5) = 7.39 capped to 2;
    # advantages -3 + 1 = -2, -1 + 2 = 1, -9 + 0.5 = -8.5 clipped to -5.
    loss, gradient = sampled(LEARNER, [-1.0, -2.5, -2.5], [-3.0, -1.0, -9.0])
    weights = torch.tensor([1.0 * -2.0, math.exp(0.5) * 1.0, 2.0 * -5.0])
    torch.testing.assert_close(gradient, -weights / 3)
    torch.testing.assert_close(loss, -(weights * LEARNER).sum() / 3)


def test_importance_weight_baseline_and_task_advantage_by_hand() -> None:
    _, gradient = sampled(
        LEARNER,
        [-1.0, -2.0, -0.5],
        [-3.0, -1.0, -1.0],
        importance_weight_N=torch.tensor([2.0, 2.0, 0.5]),
        baseline_N=torch.tensor([0.5, 0.0, 0.25]),
        task_advantage_N=torch.tensor([0.0, 1.0, -1.0]),
        denominator=4.5,
    )
    expected = -torch.tensor([2 * -1.5, 2 * (1.0 + 1.0), 0.5 * (-0.25 - 1.0)]) / 4.5
    torch.testing.assert_close(gradient, expected)


def test_no_ratio_and_no_clip_when_switched_off() -> None:
    _, gradient = sampled(
        LEARNER, [-9.0, -9.0, -9.0], [-3.0, -1.0, -9.0], ratio_cap=None, advantage_clip=None
    )
    torch.testing.assert_close(gradient, -torch.tensor([-2.0, 1.0, -8.5]) / 3)


def test_discount_adds_later_tokens_of_the_same_row_only() -> None:
    _, gradient = sampled(LEARNER, [-1.0, -2.0, -0.5], [-3.0, -1.0, -1.0], discount=0.5)
    torch.testing.assert_close(gradient, -torch.tensor([-2.0 + 0.5 * 1.0, 1.0, -0.5]) / 3)


def test_discounted_suffix_sum_equals_the_double_loop() -> None:
    values = torch.arange(1.0, 8.0)
    rows = [3, 1, 3]
    expected, start = [], 0
    for size in rows:
        for t in range(size):
            tail = values[start + t : start + size].tolist()
            expected.append(sum(0.9**k * value for k, value in enumerate(tail)))
        start += size
    torch.testing.assert_close(discounted_suffix_sum(values, rows, 0.9), torch.tensor(expected))


def test_equal_student_and_teacher_give_zero_loss_and_gradient() -> None:
    loss, gradient = sampled(LEARNER, LEARNER.tolist(), LEARNER.tolist())
    assert loss.item() == 0
    assert gradient.abs().max().item() == 0


@pytest.mark.parametrize(("kind", "beta"), DIVERGENCES)
def test_divergence_and_gradient_equal_the_naive_form(kind, beta) -> None:
    student, teacher = random_logits(3, 4), random_logits(4, 4)
    fast, naive = student.clone().requires_grad_(), student.clone().requires_grad_()
    value_N = divergence(fast.log_softmax(-1), teacher.log_softmax(-1), kind, beta)
    references = []
    for p, q in zip(naive.softmax(-1), teacher.softmax(-1), strict=True):
        if kind == "reverse_kl":
            references.append(naive_kl(p, q))
        elif kind == "forward_kl":
            references.append(naive_kl(q, p))
        else:
            mixture = beta * q + (1 - beta) * p
            references.append(beta * naive_kl(q, mixture) + (1 - beta) * naive_kl(p, mixture))
    reference_N = torch.stack(references)
    torch.testing.assert_close(value_N, reference_N)
    value_N.sum().backward()
    reference_N.sum().backward()
    torch.testing.assert_close(fast.grad, naive.grad)


@pytest.mark.parametrize(("kind", "beta"), DIVERGENCES)
def test_divergence_of_equal_distributions_has_no_gradient(kind, beta) -> None:
    leaf = random_logits(5, 3).requires_grad_()
    value_N = divergence(leaf.log_softmax(-1), leaf.detach().log_softmax(-1), kind, beta)
    value_N.sum().backward()
    assert leaf.grad is not None
    assert value_N.abs().max().item() < 1e-12
    assert leaf.grad.abs().max().item() < 1e-12


@pytest.mark.parametrize("close", [with_tail_bin, renormalized])
@pytest.mark.parametrize(("kind", "beta"), DIVERGENCES)
def test_top_k_over_the_whole_vocabulary_is_the_full_divergence(close, kind, beta) -> None:
    student, teacher = random_logits(6, 3), random_logits(7, 3)
    top, full = student.clone().requires_grad_(), student.clone().requires_grad_()
    ids = teacher.topk(V).indices
    top_N = divergence(
        close(top.log_softmax(-1).gather(-1, ids)),
        close(teacher.log_softmax(-1).gather(-1, ids)),
        kind,
        beta,
    )
    full_N = divergence(full.log_softmax(-1), teacher.log_softmax(-1), kind, beta)
    torch.testing.assert_close(top_N, full_N, atol=5 * MIN_TAIL_MASS, rtol=0)
    top_N.sum().backward()
    full_N.sum().backward()
    torch.testing.assert_close(top.grad, full.grad, atol=5 * MIN_TAIL_MASS, rtol=0)


@pytest.mark.parametrize("close", [with_tail_bin, renormalized])
def test_truncated_distributions_sum_to_one(close) -> None:
    logprob_NK = random_logits(8, 4).log_softmax(-1)[:, :3]
    torch.testing.assert_close(close(logprob_NK).exp().sum(-1), torch.ones(4, dtype=torch.float64))


def test_a_truncated_sum_without_a_tail_points_away_from_the_teacher() -> None:
    """Why it is not offered: p log(p / q) on too few outcomes falls when p does."""
    student = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ids = teacher.topk(1).indices

    def gradient(with_tail: bool) -> Tensor:
        leaf = student.clone().requires_grad_()
        ours = leaf.log_softmax(-1).gather(-1, ids)
        theirs = teacher.log_softmax(-1).gather(-1, ids)
        if with_tail:
            ours, theirs = with_tail_bin(ours), with_tail_bin(theirs)
        divergence(ours, theirs, "reverse_kl", None).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    exact = kl_gradient(student, teacher)
    assert torch.cosine_similarity(gradient(with_tail=True), exact).item() > 0.99
    assert torch.cosine_similarity(gradient(with_tail=False), exact).item() < 0


def test_a_tail_without_mass_keeps_gradients_finite() -> None:
    leaf = torch.tensor([[30.0, 0.0, -30.0]]).requires_grad_()
    value_N = divergence(
        with_tail_bin(leaf.log_softmax(-1)[:, :2]),
        with_tail_bin(torch.tensor([[0.0, -30.0]])),
        "reverse_kl",
        None,
    )
    value_N.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
