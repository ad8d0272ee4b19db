"""A new objective is one config member and one class: the example of docs/extend/your-own-loss.md.

The config member, the class and the tests of its mathematics are quoted there word for word; a
test below compares them.
"""

import asyncio
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import pytest
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from qwen3_distill.config import (
    EmbeddedTraining,
    FullDivergence,
    ObjectiveSchema,
    OptimizerConfig,
    ReplayConfig,
    RunConfig,
    SampledReverseKL,
    TopKDivergence,
    candidates_per_token,
)
from qwen3_distill.config.base import PositiveFloat
from qwen3_distill.modeling.head import TokenStatistics, TokenStats
from qwen3_distill.replay.buffer import build_replay
from qwen3_distill.training.batching import MicroBatch, collate
from qwen3_distill.training.embedded.student import EmbeddedLearner
from qwen3_distill.training.objectives.base import (
    LossTerms,
    Objective,
    ObjectiveSetup,
    common_metrics,
    max_metric,
    mean_metric,
    weighted_mean,
)
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import Batch, SampledRequest, ScoredRollout, TeacherScore
from tests.contract.builders import synthetic_rollout
from tests.tiny_models import TinyModels
from tests.unit.config.test_rules import GOOD
from tests.unit.training.test_objectives import HEAD, D, V, hidden_rows, make_batch

PAGE = Path(__file__).parents[3] / "docs" / "extend" / "your-own-loss.md"


class SkewedReverseKL(ObjectiveSchema):
    """Policy gradient of KL(student || M) on the sampled tokens, M = (1 - skew) teacher +
    skew student (arXiv 2402.03898)."""

    implementation: ClassVar[str] = f"{__name__}:SkewedObjective"
    needs_ratio: ClassVar[bool] = True

    kind: Literal["skewed_reverse_kl"]
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the student in M. No token's advantage is below log(skew)."""
    ratio_cap: PositiveFloat | None = 2.0
    """Cap c of the importance ratio min(pi/mu, c); null: no ratio (mu is taken for pi)."""

    @property
    def uses_ratio(self) -> bool:
        return self.ratio_cap is not None

    @property
    def ratio_setting(self) -> str:
        return "ratio_cap=null"


def skewed_advantage(learner_logprob_N: Tensor, teacher_logprob_N: Tensor, skew: float) -> Tensor:
    """Return A_t = log m - log pi + skew (pi / m - 1) with m = (1 - skew) q + skew pi, at a_t.

    Source: the gradient of KL(pi || m), the skew reverse KL of DistiLLM (arXiv 2402.03898), by
    the log-derivative trick. m depends on pi, which gives pi / m; the constant -1 changes no
    expectation and makes A_t zero where student and teacher agree.
    """
    student_share_N = learner_logprob_N + math.log(skew)
    mixture_N = torch.logaddexp(teacher_logprob_N + math.log(1 - skew), student_share_N)
    return mixture_N - learner_logprob_N + (student_share_N - mixture_N).exp() - skew


class SkewedObjective:
    """The policy gradient of KL(pi || m)."""

    def __init__(self, setup: ObjectiveSetup[SkewedReverseKL]) -> None:
        self._config = setup.config
        self._token_stats = setup.token_stats()

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        stats = self._token_stats(micro.at_loss_tokens(hidden_BTD), head_VD, micro.target_N)
        learner_N = stats.logprob_N.detach()
        ratio_N = (learner_N - micro.behavior_logprob_N).exp()
        cap = self._config.ratio_cap
        used_ratio_N = torch.ones_like(ratio_N) if cap is None else ratio_N.clamp(max=cap)
        advantage_N = skewed_advantage(learner_N, micro.teacher_logprob_N, self._config.skew)
        loss_N = -used_ratio_N * advantage_N * stats.logprob_N
        metrics = (
            *common_metrics(micro, stats.logprob_N, stats.entropy_N),
            max_metric("health/ratio_max", ratio_N),
            mean_metric("loss/advantage_abs_nats", advantage_N.abs()),
        )
        return LossTerms(weighted_mean(micro, loss_N, denominator), metrics, advantage_N.abs())


# --- Is it right? ---------------------------------------------------------------------------------


SKEW = 0.3


def objective(
    ratio_cap: float | None = 1e6, token_statistics: TokenStatistics | None = None
) -> Objective:
    return build_objective(
        SkewedReverseKL(kind="skewed_reverse_kl", skew=SKEW, ratio_cap=ratio_cap),
        teacher_head_VD=None,
        chunk_tokens=1000,
        token_statistics=token_statistics,
    )


def tokens(
    target: Sequence[int], behavior_N: Tensor, teacher_N: Tensor, weight_N: Tensor
) -> MicroBatch:
    """Loss tokens at consecutive positions of one row."""
    size = len(target)
    return MicroBatch(
        rollouts=(0,),
        input_BT=torch.zeros(1, size, dtype=torch.int64),
        position_BT=torch.arange(size).unsqueeze(0),
        sequence_tokens=(size,),
        loss_tokens=(size,),
        loss_index_N=torch.arange(size),
        by_teacher=(False,),
        is_scored=True,
        target_N=torch.tensor(target),
        behavior_logprob_N=behavior_N,
        teacher_logprob_N=teacher_N,
        importance_weight_N=weight_N,
        task_advantage_N=torch.zeros(size),
    )


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student, teacher and an older student at one state, [V] each."""
    generator = torch.Generator().manual_seed(0)
    student_V, teacher_V, old_V = torch.randn(3, V, generator=generator)
    return student_V, teacher_V, old_V


def expected_gradient(mu_V: Tensor, ratio_cap: float | None = 1e6) -> Tensor:
    """Gradient by the student's logits, summed over every token with its probability under mu.

    The logits are the output head: one state, with a hidden size of 1.
    """
    student_V, teacher_V, _ = distributions()
    head_VD = student_V.unsqueeze(-1).requires_grad_()
    micro = tokens(range(V), mu_V.log(), teacher_V.log_softmax(-1), mu_V)
    objective(ratio_cap).terms(micro, torch.ones(1, V, 1), head_VD, 1.0).loss.backward()
    assert head_VD.grad is not None
    return head_VD.grad.squeeze(-1)


def exact_gradient() -> Tensor:
    """Gradient of KL(student || M) by the student's logits, by autograd over the vocabulary."""
    student_V, teacher_V, _ = distributions()
    leaf_V = student_V.clone().requires_grad_()
    pi_V, q_V = leaf_V.softmax(-1), teacher_V.softmax(-1)
    (pi_V * (pi_V / ((1 - SKEW) * q_V + SKEW * pi_V)).log()).sum().backward()
    assert leaf_V.grad is not None
    return leaf_V.grad


@pytest.mark.parametrize("sampled_by", ["student", "older student"])
def test_the_expected_gradient_is_exact(sampled_by: str) -> None:
    student_V, _, old_V = distributions()
    mu_V = (student_V if sampled_by == "student" else old_V).softmax(-1)
    torch.testing.assert_close(expected_gradient(mu_V), exact_gradient(), rtol=1e-4, atol=1e-6)


def test_without_the_ratio_stale_samples_give_another_gradient() -> None:
    _, _, old_V = distributions()
    biased_V = expected_gradient(old_V.softmax(-1), ratio_cap=None)
    assert torch.cosine_similarity(biased_V, exact_gradient(), dim=0).item() < 0.99


def test_each_tokens_gradient_by_hand() -> None:
    """d loss / d log pi = - w rho A / denominator. A missing detach adds terms to it."""
    pi, q, mu = (torch.tensor(values) for values in ([0.5, 0.2], [0.1, 0.6], [0.5, 0.05]))
    # m = 0.7 q + 0.3 pi; ratios 1 and 4, capped to 2
    a = math.log(0.22 / 0.5) + 0.3 * (0.5 / 0.22 - 1)
    b = math.log(0.48 / 0.2) + 0.3 * (0.2 / 0.48 - 1)
    leaf_N = pi.log().requires_grad_()
    micro = tokens([0, 0], mu.log(), q.log(), torch.tensor([1.0, 3.0]))
    given = objective(2.0, token_statistics=lambda *_: TokenStats(leaf_N, torch.zeros(2)))
    given.terms(micro, torch.ones(1, 2, 1), torch.ones(V, 1), 4.0).loss.backward()
    torch.testing.assert_close(leaf_N.grad, -torch.tensor([1 * 1 * a, 3 * 2 * b]) / 4)


def test_an_expectation_cannot_see_a_missing_detach() -> None:
    """rho (log pi - log m) with nothing detached: right in expectation, noise in every token."""
    student_V, teacher_V, old_V = distributions()
    leaf_V, mu_V = student_V.clone().requires_grad_(), old_V.softmax(-1)
    pi_V = leaf_V.log_softmax(-1)
    mixture_V = ((1 - SKEW) * teacher_V.softmax(-1) + SKEW * pi_V.exp()).log()
    wrong_V = (pi_V - mu_V.log()).exp() * (pi_V - mixture_V)
    (gradient_V,) = torch.autograd.grad((mu_V * wrong_V).sum(), leaf_V, retain_graph=True)
    torch.testing.assert_close(gradient_V, exact_gradient(), rtol=1e-4, atol=1e-6)
    (wrong_by_pi_V,) = torch.autograd.grad(wrong_V.sum(), pi_V)
    ratio_V = (pi_V.detach() - mu_V.log()).exp()
    advantage_V = skewed_advantage(pi_V.detach(), teacher_V.log_softmax(-1), SKEW)
    torch.testing.assert_close(wrong_by_pi_V, -ratio_V * advantage_V + (1 - SKEW) * ratio_V)


def test_no_advantage_is_below_the_logarithm_of_the_skew() -> None:
    learner_N, teacher_N = torch.tensor([-0.1, -0.1]), torch.tensor([-2.0, -80.0])
    assert (skewed_advantage(learner_N, teacher_N, SKEW) >= math.log(SKEW)).all()


def test_equal_student_and_teacher_give_no_advantage() -> None:
    same_N = torch.tensor([-0.1, -2.0, -9.0])
    torch.testing.assert_close(skewed_advantage(same_N, same_N, SKEW), torch.zeros(3))


# --- Does the rest of the house take it? ----------------------------------------------------------


@pytest.mark.parametrize("groups", [[[0], [1], [2], [3]], [[3, 0], [2, 1]]])
def test_any_split_into_micro_batches_gives_the_same_step(groups: list[list[int]]) -> None:
    batch = make_batch({"kind": "skewed_reverse_kl"})

    def gradient(groups: Sequence[Sequence[int]]) -> Tensor:
        head_VD = HEAD.clone().requires_grad_()
        for group in groups:
            micro = collate(batch, group)
            hidden_BTD = hidden_rows(group, micro.input_BT.shape[1], torch.ones(D))
            objective(2.0).terms(micro, hidden_BTD, head_VD, batch.denominator).loss.backward()
        assert head_VD.grad is not None
        return head_VD.grad

    torch.testing.assert_close(gradient(groups), gradient([[0, 1, 2, 3]]), rtol=1e-4, atol=1e-6)


def test_it_trains_a_step_also_from_replay(tiny_models: TinyModels) -> None:
    config = SkewedReverseKL(kind="skewed_reverse_kl")
    assert config.score_request == SampledRequest()
    replay = ReplayConfig(capacity_tokens=1000)
    training = EmbeddedTraining(
        kind="embedded", device="cpu", optimizer=OptimizerConfig(learning_rate=1e-3)
    )
    settings = LearnerSettings(
        model_dir=tiny_models.student,
        training=training,
        objective=cast(Any, config),  # no member of the union
        total_steps=9,
        seed=0,
    )
    learner = EmbeddedLearner(
        settings,
        build_objective(config, teacher_head_VD=None, chunk_tokens=64),
        build_replay(replay, config, device=torch.device("cpu"), seed=0),
    )
    score = TeacherScore(teacher_id="t", logprobs=np.full(9, -1.0))
    scored = [ScoredRollout(rollout=synthetic_rollout(3, 9, n), score=score) for n in range(3)]
    before = learner.version
    update = asyncio.run(learner.update(Batch.uniform(scored)))
    assert update.version != before
    assert {m.key for m in update.metrics} >= {"health/ratio_max", "loss/reverse_kl_nats"}
    asyncio.run(learner.admit(scored))
    again = asyncio.run(learner.update_replayed(2))
    assert again.version != update.version


class RunConfigWithIt(RunConfig):
    """`RunConfig` as it is once the member is in the union."""

    objective: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        SampledReverseKL | TopKDivergence | FullDivergence | SkewedReverseKL,
        Field(discriminator="kind"),
    ]


def test_a_run_config_takes_it_and_no_candidates_are_asked_for() -> None:
    config = RunConfigWithIt.model_validate(GOOD | {"objective": {"kind": "skewed_reverse_kl"}})
    assert isinstance(config.objective, SkewedReverseKL)
    assert candidates_per_token(config.objective) == 0
    assert config.objective.reward_weight == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"top_p": 0.9}}, "objective.kind=skewed_reverse_kl with sampling.top_p=0.9"),
        ({"sampling": {"temperature": 0.7}, "replay": None}, "ratio_cap=null .*temperature=0.7"),
        ({}, "replay with objective.ratio_cap=null"),
    ],
)
def test_the_rules_read_what_it_states(changes: dict[str, Any], message: str) -> None:
    without = {"objective": {"kind": "skewed_reverse_kl", "ratio_cap": None}}
    with pytest.raises(ValidationError, match=message):
        RunConfigWithIt.model_validate(GOOD | without | changes)


# --- The page -------------------------------------------------------------------------------------


def paragraphs(code: str) -> list[str]:
    """Blocks between blank lines, without the file's docstring, imports and the class's address."""
    dropped = (
        r'\A"""[^"]*"""\n',
        r"^from \S+ import \([^)]*\)\n",
        r"^(?:from|import) .*\n",
        r"^    implementation: .*\n",
    )
    for pattern in dropped:
        code = re.sub(pattern, "", code, flags=re.MULTILINE)
    return [block.strip("\n") for block in re.split(r"\n\s*\n", code) if block.strip()]


def test_the_page_quotes_this_file() -> None:
    page = PAGE.read_text(encoding="utf-8")
    code: list[str] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code) >= 3
    own = paragraphs(Path(__file__).read_text(encoding="utf-8"))
    quoted = [paragraph for block in code for paragraph in paragraphs(block)]
    assert [paragraph for paragraph in quoted if paragraph not in own] == []
