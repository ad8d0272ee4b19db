"""Cross-entropy and the group-relative policy against torch, hand computations and enumeration."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qwen3_distill.config import (
    CrossEntropy,
    GroupRelativePolicy,
    ObjectiveConfig,
    RewardScale,
    SampledReverseKL,
)
from qwen3_distill.pipeline.requests import make_batch
from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.objectives.base import Objective
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.training.objectives.losses import group_relative_policy
from qwen3_distill.types import Batch, Rollout, TrainingRollout
from tests.contract.builders import synthetic_rollout

N, D, V = 11, 5, 7


def built(config: ObjectiveConfig) -> Objective:
    return build_objective(config, teacher_head_VD=None, chunk_tokens=4)


def row(
    targets: Tensor, behavior_N: Tensor, advantage_N: Tensor, *, by_teacher: bool = False
) -> MicroBatch:
    """One sequence whose targets are predicted at consecutive positions."""
    size = len(targets)
    return MicroBatch(
        rollouts=(0,),
        input_BT=torch.zeros(1, size, dtype=torch.int64),
        position_BT=torch.arange(size).unsqueeze(0),
        sequence_tokens=(size,),
        loss_tokens=(size,),
        loss_index_N=torch.arange(size),
        target_N=targets,
        by_teacher=(by_teacher,),
        is_scored=False,
        behavior_logprob_N=behavior_N,
        teacher_logprob_N=torch.full((size,), torch.nan),
        importance_weight_N=torch.ones(size),
        task_advantage_N=advantage_N,
    )


def test_sft_is_torchs_cross_entropy_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(1, N, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    unknown = torch.full((N,), torch.nan)
    micro = row(targets, unknown, torch.zeros(N), by_teacher=True)
    terms = built(CrossEntropy(kind="sft")).terms(micro, ours, head, float(N))
    expected = functional.cross_entropy(theirs[0] @ head.T, targets)
    terms.loss.backward()
    expected.backward()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    keys = {metric.key for metric in terms.metrics}
    assert keys == {"loss/entropy_nats", "loss/teacher_answer_nll_nats"}
    assert all(bool(metric.total.isfinite()) for metric in terms.metrics)


def test_a_ratio_with_the_teachers_answers_is_no_number() -> None:
    """Rule, learner and this: an objective that forgets who sampled cannot train unseen."""
    micro = row(torch.tensor([1, 2]), torch.full((2,), torch.nan), torch.ones(2), by_teacher=True)
    for config in (SampledReverseKL(kind="sampled_reverse_kl"), GroupRelativePolicy(kind="grpo")):
        terms = built(config).terms(micro, torch.ones(1, 2, D), torch.ones(V, D), 2.0)
        assert bool(terms.loss.isnan())


# --- The advantage --------------------------------------------------------------------------------


def group(rewards: Sequence[float], scale: RewardScale) -> Batch:
    """The samples of one prompt."""
    rollouts = [synthetic_rollout(2, 3, seed) for seed in range(len(rewards))]
    named = [
        TrainingRollout(rollout=_renamed(rollout, f"s/p/{i}")) for i, rollout in enumerate(rollouts)
    ]
    reward_of = {item.rollout.rollout_id: r for item, r in zip(named, rewards, strict=True)}
    return make_batch(
        named,
        task_reward_weight=1.0,
        is_correct=lambda rollout: reward_of[rollout.rollout_id],
        scale=scale,
    )


def _renamed(rollout: Rollout, name: str) -> Rollout:
    values = {field: getattr(rollout, field) for field in Rollout.__dataclass_fields__}
    return Rollout(**{**values, "rollout_id": name})


def test_the_advantage_by_hand() -> None:
    assert group([1, 0, 0, 0], "none").task_advantages.tolist() == [0.75, -0.25, -0.25, -0.25]
    std = 3**0.5 / 4  # of 1, 0, 0, 0
    expected = [0.75 / std, *[-0.25 / std] * 3]
    np.testing.assert_allclose(group([1, 0, 0, 0], "std").task_advantages, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0])
def test_equal_rewards_teach_nothing_exactly(reward: float, scale: RewardScale) -> None:
    advantages = group([reward] * 3, scale).task_advantages
    assert advantages.tolist() == [0.0] * 3  # the float32 mean of three 0.1 is not 0.1
    logprob_N = torch.full((3,), -1.0, requires_grad=True)
    policy = group_relative_policy(
        logprob_N,
        torch.full((3,), -1.5),
        torch.from_numpy(np.array(advantages)),
        torch.ones(3),
        denominator=3.0,
        clip_low=0.2,
        clip_high=0.2,
    )
    policy.loss.backward()
    assert logprob_N.grad is not None
    assert logprob_N.grad.abs().max() == 0


# --- The loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),  # within the clip: d rho / d log pi = rho
        (1.5, 2.0, -2.6, 0.0),  # beyond 1 + 0.3
        (0.5, 2.0, -1.0, -1.0),  # min takes the unclipped, lower one
        (0.5, -2.0, 1.6, 0.0),  # beyond 1 - 0.2
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprob_N = torch.tensor([float(np.log(ratio)) - 2.0], requires_grad=True)
    policy = group_relative_policy(
        logprob_N,
        torch.tensor([-2.0]),
        torch.tensor([advantage]),
        torch.ones(1),
        denominator=1.0,
        clip_low=0.2,
        clip_high=0.3,
    )
    policy.loss.backward()
    assert logprob_N.grad is not None
    assert float(policy.loss.detach()) == pytest.approx(loss, rel=1e-5)
    assert float(logprob_N.grad) == pytest.approx(gradient, rel=1e-5)
    assert bool(policy.is_clipped_N) == (gradient == 0)


@pytest.mark.parametrize("clip", [0.2, None])
def test_the_expected_gradient_is_that_of_the_reward(clip: float | None) -> None:
    """Over all pairs of samples: (1 - 1/G) grad E[r], since a group's mean holds its own reward."""
    generator = torch.Generator().manual_seed(1)
    logits_V = torch.randn(V, generator=generator)
    rewards_V = torch.rand(V, generator=generator)
    leaf_V = logits_V.clone().requires_grad_()
    (leaf_V.softmax(0) * rewards_V).sum().backward()
    exact_V = leaf_V.grad
    assert exact_V is not None

    total_V = torch.zeros(V)
    probs_V = logits_V.softmax(0)
    for a, b in itertools.product(range(V), repeat=2):
        leaf_V = logits_V.clone().requires_grad_()
        pair = torch.tensor([a, b])
        logprob_N = leaf_V.log_softmax(0)[pair]
        rewards_N = rewards_V[pair]
        policy = group_relative_policy(
            logprob_N,
            logprob_N.detach(),
            rewards_N - rewards_N.mean(),
            torch.ones(2),
            denominator=2.0,
            clip_low=clip,
            clip_high=clip,
        )
        policy.loss.backward()
        assert leaf_V.grad is not None
        total_V += probs_V[a] * probs_V[b] * leaf_V.grad
    torch.testing.assert_close(total_V, -0.5 * exact_V, rtol=1e-4, atol=1e-6)
