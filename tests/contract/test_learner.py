"""The contract of `Learner`: what a step is, which weights it makes, how it goes on after a crash.

Shape letters: R response tokens, V vocabulary, X outcomes of a closed set.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qwen3_distill.config import (
    CrossEntropy,
    FullBaseline,
    FullDivergence,
    FullTuning,
    GroupRelativePolicy,
    LoraTuning,
    ObjectiveConfig,
    OptimizerConfig,
    ReplayConfig,
    SampledReverseKL,
    TopKBaseline,
    TopKDivergence,
    TuningConfig,
    WarmupCosineSchedule,
)
from qwen3_distill.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import Learner, LoraWeights, ReplayingLearner
from qwen3_distill.scoring.handshake import check_compatible
from qwen3_distill.types import (
    Batch,
    Rollout,
    ScoredRollout,
    TrainingRollout,
    Update,
    VersionSpan,
)
from qwen3_distill.weights.directory import DirectoryChannel
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.adapters import (
    LEARNERS,
    EmbeddedLearnerAdapter,
    LearnerAdapter,
    LearnerCase,
)
from tests.contract.builders import (
    VERSION,
    generate,
    make_prompt,
    ragged_requests,
    run,
    synthetic_rollout,
)
from tests.contract.reference import (
    head_of,
    largest_gap,
    naive_loss,
    reference_model,
    reference_score,
    scored_of,
    token_logprobs,
)
from tests.tiny_models import CONTEXT_LENGTH, TinyModels

PARITY_NATS = 1e-4
"""Between two float32 forward passes; 5e-6 was seen. One optimizer step was 0.5 or more."""
FAR_NATS = 0.1
WORST, DRIFT = 3e-4, 1e-6
"""Of a step's outcome, see `assert_same_weights`; 3e-5 and 5e-8 were seen. One token left out
of 114 gave 0.1 and 7e-5."""

FULL = FullTuning(kind="full")
LORA = LoraTuning(kind="lora", rank=4, alpha=8.0)
TUNINGS = {"full": FULL, "lora": LORA}

# eps is large, so that the step is a smooth function of the gradient: with the usual 1e-8 Adam's
# first step is the gradient's sign, and rounding in a gradient near zero would show at full size.
SMOOTH = OptimizerConfig(learning_rate=1e-2, eps=1e-2, weight_decay=0.1, max_grad_norm=1.0)

STILL = SMOOTH.model_copy(update={"learning_rate": 1e-12, "weight_decay": 0.0})
"""Steps that change nothing, so that the same rollouts have the same loss again."""

sampled = partial(SampledReverseKL, kind="sampled_reverse_kl", advantage_clip=2.0)
top_k = partial(TopKDivergence, kind="top_k", k=8)
full = partial(FullDivergence, kind="full")
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "sampled": sampled(),
    "sampled_plain": sampled(ratio_cap=None, advantage_clip=None),
    "sampled_discount": sampled(discount=0.9),
    "sampled_top_k_baseline": sampled(kl_baseline=TopKBaseline(kind="top_k", k=8)),
    "sampled_full_baseline": sampled(kl_baseline=FullBaseline(kind="full")),
    "top_k_bin_reverse": top_k(tail="bin"),
    "top_k_bin_forward": top_k(tail="bin", divergence="forward_kl"),
    "top_k_bin_jsd": top_k(tail="bin", divergence="jsd", beta=0.3),
    "top_k_renormalize_reverse": top_k(tail="renormalize"),
    "top_k_renormalize_forward": top_k(tail="renormalize", divergence="forward_kl"),
    "top_k_renormalize_jsd": top_k(tail="renormalize", divergence="jsd", beta=0.3),
    "full_reverse": full(),
    "full_forward": full(divergence="forward_kl"),
    "full_jsd": full(divergence="jsd", beta=0.3),
    "sft": CrossEntropy(kind="sft"),
    "grpo": GroupRelativePolicy(kind="grpo", clip=0.2, clip_high=0.4),
    "grpo_open": GroupRelativePolicy(kind="grpo", clip=None),
}
ONE_OF_EACH = ("sampled", "top_k_bin_reverse", "full_reverse")
each_objective = pytest.mark.parametrize("name", OBJECTIVES)
each_tuning = pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS.keys())


@pytest.fixture(scope="module", params=LEARNERS)
def adapter(request: pytest.FixtureRequest) -> LearnerAdapter:
    return request.param


# --- Builders -----------------------------------------------------------------------------------


def taught(rollout: Rollout) -> Rollout:
    """The rollout as if a teacher had sampled it."""
    return replace(rollout, versions=(), teacher_id="reference")


@dataclass(frozen=True)
class Bench:
    """Student and teacher directories and what the tests need of them."""

    student_dir: Path
    student: PreTrainedModel
    teacher: PreTrainedModel

    @property
    def teacher_head_VD(self) -> Tensor:
        return head_of(self.teacher).weight.detach()

    def learner(
        self,
        adapter: LearnerAdapter,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig = SMOOTH,
        **settings: Any,
    ) -> ReplayingLearner:
        if not adapter.supports(objective):
            pytest.skip("this learner cannot have the teacher's hidden states")
        return adapter.build(
            self.student_dir,
            LearnerCase(
                objective=objective,
                teacher_head_VD=self.teacher_head_VD,
                optimizer=optimizer,
                **settings,
            ),
        )

    def batch(self, objective: ObjectiveConfig, rollouts: Sequence[Rollout], **parts: Any) -> Batch:
        """Rollouts under the reference teacher's scores."""
        request = objective.score_request
        if "student" not in objective.learns_from:
            rollouts = [taught(rollout) for rollout in rollouts]
        scored = tuple(
            TrainingRollout(rollout=r)
            if request is None
            else ScoredRollout(rollout=r, score=reference_score(self.teacher, r, request))
            for r in rollouts
        )
        return replace(Batch.uniform(scored), **parts)

    def ragged_batch(
        self, objective: ObjectiveConfig, sampled: Mapping[int, Sequence[tuple[int, int]]] = {}
    ) -> Batch:
        """Stale samples of many lengths, with weights and task rewards that are all different.

        Args:
            sampled: spans of the response that were sampled, by the rollout's index; default: all.
        """
        shapes = [(1, 1), (9, 30), (40, 2), (3, 17), (12, 1), (1, 55), (25, 8)]
        drafts = [
            synthetic_rollout(prompt, response, seed, sampled=sampled.get(seed, ()))
            for seed, (prompt, response) in enumerate(shapes)
        ]
        return self._noisy_batch(objective, drafts)

    def grouped_batch(self, objective: ObjectiveConfig) -> Batch:
        """Like `ragged_batch`, with several answers to a prompt."""
        drafts = [
            replace(synthetic_rollout(size, response, 10 * size + sample), prompt=prompt)
            for size, responses in [(9, (30, 2, 17)), (40, (12, 12)), (3, (1,)), (1, (8, 1, 25))]
            for prompt in [make_prompt(size)]
            for sample, response in enumerate(responses)
        ]
        return self._noisy_batch(
            objective, [drafts[index] for index in (4, 0, 8, 2, 6, 1, 7, 3, 5)]
        )

    def _noisy_batch(self, objective: ObjectiveConfig, drafts: Sequence[Rollout]) -> Batch:
        rng = np.random.default_rng(5)
        rollouts = []
        for draft in drafts:
            noisy = token_logprobs(self.student, draft) + rng.normal(size=draft.num_loss_tokens)
            rollouts.append(replace(draft, behavior_logprobs=np.minimum(noisy, 0)))
        return self.batch(
            objective,
            rollouts,
            importance_weights=rng.uniform(0.3, 2.0, size=len(rollouts)),
            task_advantages=rng.normal(size=len(rollouts)) * 0.3,
        )


@pytest.fixture(scope="module")
def bench(tiny_models: TinyModels) -> Bench:
    return Bench(
        tiny_models.student,
        reference_model(tiny_models.student),
        reference_model(tiny_models.teacher),
    )


def weights_of(learner: Learner) -> dict[str, Tensor]:
    """A copy of what the learner publishes."""
    channel = MemoryChannel()
    fetched = channel.fetch(run(learner.publish(channel)))
    return {name: tensor.cpu() for name, tensor in fetched.tensors.items()}


def steps(learner: Learner, batch: Batch, count: int) -> list[Update]:
    return [run(learner.update(batch)) for _ in range(count)]


def metric(update: Update, key: str) -> float:
    """The largest value of a metric over the step's micro-batches."""
    return max(m.value for m in update.metrics if m.key == key)


# --- The loss and its gradient ----------------------------------------------------------------


@each_objective
def test_a_step_is_adamw_on_the_clipped_gradient_of_the_loss(
    adapter: LearnerAdapter, bench: Bench, name: str
) -> None:
    check_adamw_step(adapter, bench, OBJECTIVES[name], bench.ragged_batch(OBJECTIVES[name]))


SAMPLED_SPANS = {1: [(0, 4), (9, 10), (22, 30)], 3: [(5, 12)], 5: [(2, 3), (30, 54)]}
"""Cases of `Bench.ragged_batch`: responses that begin, end or are interrupted with other tokens."""


@pytest.mark.parametrize(
    "name", [*ONE_OF_EACH, "sampled_discount", "sampled_top_k_baseline", "sft", "grpo"]
)
def test_a_step_learns_from_sampled_tokens_only(
    adapter: LearnerAdapter, bench: Bench, name: str
) -> None:
    batch = bench.ragged_batch(OBJECTIVES[name], SAMPLED_SPANS)
    assert batch.num_loss_tokens == 114 - 30 - 17 - 55 + 13 + 7 + 25
    check_adamw_step(adapter, bench, OBJECTIVES[name], batch)


@pytest.mark.parametrize("name", ["top_k_bin_forward", "full_reverse"])
def test_a_divergence_is_the_same_whoever_sampled(
    adapter: LearnerAdapter, bench: Bench, name: str
) -> None:
    batch = bench.ragged_batch(OBJECTIVES[name])
    mixed = [
        replace(item, rollout=taught(item.rollout)) if row % 2 else item
        for row, item in enumerate(batch.scored)
    ]
    check_adamw_step(adapter, bench, OBJECTIVES[name], replace(batch, scored=tuple(mixed)))
    students = replace(batch, scored=tuple(mixed[::2]), **parts_of(batch, slice(0, None, 2)))
    learner = bench.learner(adapter, OBJECTIVES[name], micro_batch_tokens=10**6)
    other = bench.learner(adapter, OBJECTIVES[name], micro_batch_tokens=10**6)
    both = run(learner.update(replace(batch, scored=tuple(mixed))))
    alone = run(other.update(students))
    for key in ("loss/reverse_kl_nats", "health/learner_vs_engine_max_nats"):
        assert metric(both, key) == pytest.approx(metric(alone, key), rel=1e-4 * adapter.slack)
    assert math.isfinite(metric(both, "loss/forward_kl_nats"))


def parts_of(batch: Batch, rows: slice) -> dict[str, Any]:
    names = ("importance_weights", "task_advantages")
    return {name: getattr(batch, name)[rows] for name in names}


@pytest.mark.parametrize("name", ["sampled", "grpo", "sft"])
def test_samples_of_the_wrong_model_are_refused(
    adapter: LearnerAdapter, bench: Bench, name: str
) -> None:
    batch = bench.ragged_batch(OBJECTIVES[name])
    *others, last = batch.scored
    version = VersionSpan(start=0, stop=last.rollout.num_loss_tokens, version=VERSION)
    wrong = (
        replace(last.rollout, versions=(version,), teacher_id=None)
        if name == "sft"
        else taught(last.rollout)
    )
    learner = bench.learner(adapter, OBJECTIVES[name])
    with pytest.raises(DataError, match="does not learn from that"):
        run(learner.update(replace(batch, scored=(*others, replace(last, rollout=wrong)))))


def check_adamw_step(
    adapter: LearnerAdapter, bench: Bench, objective: ObjectiveConfig, batch: Batch
) -> None:
    model = reference_model(bench.student_dir).double()
    loss = naive_loss(model, batch, objective, bench.teacher_head_VD)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))

    learner = bench.learner(adapter, objective)
    before = weights_of(learner)
    update = run(learner.update(batch))

    slack = adapter.slack
    assert update.loss == pytest.approx(loss.item(), rel=1e-4 * slack, abs=1e-5 * slack)
    assert update.grad_norm == pytest.approx(norm, rel=1e-4 * slack)
    assert update.num_loss_tokens == batch.num_loss_tokens
    clip = min(1.0, SMOOTH.max_grad_norm / norm)
    expected = {n: adamw_first_step(w, clip * gradients[n]) for n, w in before.items()}
    limits = {"worst": WORST * slack, "drift": DRIFT * slack}
    assert_same_weights(weights_of(learner), expected, before, **limits)


def adamw_first_step(weight: Tensor, gradient: Tensor) -> Tensor:
    """Both moments, corrected for their bias, are those of the one gradient."""
    lr, decay, eps = SMOOTH.learning_rate, SMOOTH.weight_decay, SMOOTH.eps
    return (weight * (1 - lr * decay) - lr * gradient / (gradient.abs() + eps)).float()


def assert_same_weights(
    left: dict[str, Tensor],
    right: dict[str, Tensor],
    before: dict[str, Tensor],
    *,
    worst: float,
    drift: float,
) -> None:
    """Two outcomes of a step agree, in units of the step's size.

    Args:
        worst: limit of the largest difference, over the largest change of a weight.
        drift: limit of the mean signed difference, over the mean absolute change. A token left
            out moves everything a little one way, long before any one weight stands out.
    """
    assert left.keys() == right.keys() == before.keys()
    change, residual = flat_difference(right, before), flat_difference(left, right)
    assert change.abs().max() > 0
    assert residual.abs().max() / change.abs().max() < worst
    assert residual.mean().abs() / change.abs().mean() < drift


def flat_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    return torch.cat([(left[n].double() - right[n].double()).flatten() for n in sorted(left)])


def test_the_loss_of_a_lora_step_is_that_of_its_published_weights(
    adapter: LearnerAdapter, bench: Bench
) -> None:
    objective = OBJECTIVES["top_k_bin_reverse"]
    batch = bench.ragged_batch(objective)
    learner = bench.learner(adapter, objective, tuning=LORA)
    steps(learner, batch, 3)
    merged = reference_model(bench.student_dir, weights_of(learner)).double()
    loss = naive_loss(merged, batch, objective, bench.teacher_head_VD)
    expected = pytest.approx(loss.item(), rel=1e-4 * adapter.slack)
    assert run(learner.update(batch)).loss == expected


def test_the_ragged_batch_reaches_cap_and_clip(adapter: LearnerAdapter, bench: Bench) -> None:
    update = run(bench.learner(adapter, sampled()).update(bench.ragged_batch(sampled())))
    assert 0.05 < metric(update, "health/ratio_capped_fraction") < 0.95
    assert 0.05 < metric(update, "health/advantage_clipped_fraction") < 0.95


# --- The split into micro-batches and chunks ----------------------------------------------------


SPLITS: dict[str, dict[str, Any]] = {
    "one_by_one": {"micro_batch_tokens": 1, "chunk_tokens": 1},
    "one_batch_in_chunks": {"micro_batch_tokens": 10**6, "chunk_tokens": 7},
    "checkpointed": {"gradient_checkpointing": True},
}


def assert_split_changes_nothing(
    adapter: LearnerAdapter, bench: Bench, name: str, tuning: TuningConfig, **split: Any
) -> None:
    objective = OBJECTIVES[name]
    batch = bench.ragged_batch(objective)
    whole = bench.learner(
        adapter, objective, tuning=tuning, micro_batch_tokens=10**6, chunk_tokens=10**6
    )
    parted = bench.learner(adapter, objective, tuning=tuning, **split)
    before = weights_of(whole)
    slack = adapter.slack
    for ours, theirs in zip(steps(parted, batch, 2), steps(whole, batch, 2), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4 * slack, abs=1e-5 * slack)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4 * slack)
    limits = {"worst": WORST * slack, "drift": DRIFT * slack}
    assert_same_weights(weights_of(parted), weights_of(whole), before, **limits)


@each_objective
def test_a_step_does_not_depend_on_its_split(
    adapter: LearnerAdapter, bench: Bench, name: str
) -> None:
    split = {"micro_batch_tokens": 90, "chunk_tokens": 7}
    assert_split_changes_nothing(adapter, bench, name, FULL, **split)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@each_tuning
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_step_does_not_depend_on_any_split(
    adapter: LearnerAdapter,
    bench: Bench,
    name: str,
    tuning: TuningConfig,
    split: dict[str, Any],
) -> None:
    assert_split_changes_nothing(adapter, bench, name, tuning, **split)


def per_sequence_means(batch: Batch) -> Batch:
    """Every rollout counts the same: what a denominator per micro-batch would give."""
    lengths = np.array([scored.rollout.num_tokens for scored in batch.scored])
    return replace(batch, importance_weights=batch.importance_weights / lengths)


def without_one_token(batch: Batch) -> Batch:
    """The longest response without its last token."""
    *others, longest = sorted(scored_of(batch), key=lambda scored: scored.rollout.num_tokens)
    size = longest.rollout.num_tokens - 1
    span = replace(longest.rollout.versions[0], stop=size)
    rollout = replace(
        longest.rollout,
        response_ids=longest.rollout.response_ids[:size],
        behavior_logprobs=longest.rollout.behavior_logprobs[:size],
        versions=(span,),
        sampled=(),
    )
    score = replace(longest.score, logprobs=longest.score.logprobs[:size])
    return replace(batch, scored=(*others, ScoredRollout(rollout=rollout, score=score)))


@pytest.mark.parametrize("damage", [per_sequence_means, without_one_token])
def test_another_weighting_would_fail_the_split_check(
    adapter: LearnerAdapter, bench: Bench, damage: Any
) -> None:
    objective = OBJECTIVES["sampled"]
    lengths_ascend = sorted(
        bench.ragged_batch(objective).scored, key=lambda scored: scored.rollout.num_tokens
    )
    batch = Batch.uniform(lengths_ascend)
    right, wrong = (bench.learner(adapter, objective) for _ in range(2))
    before = weights_of(right)
    steps(right, batch, 1)
    steps(wrong, damage(batch), 1)
    worst, drift = WORST * adapter.slack, DRIFT * adapter.slack
    for limits in ({"worst": worst, "drift": math.inf}, {"worst": math.inf, "drift": drift}):
        with pytest.raises(AssertionError):
            assert_same_weights(weights_of(wrong), weights_of(right), before, **limits)


# --- Student and teacher alike ------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.score_request])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    adapter: LearnerAdapter, bench: Bench, name: str
) -> None:
    objective = OBJECTIVES[name]
    alike = Bench(bench.student_dir, bench.student, bench.student)
    rollouts = [scored.rollout for scored in bench.ragged_batch(objective).scored]
    update = run(alike.learner(adapter, objective).update(alike.batch(objective, rollouts)))
    assert abs(update.loss) < 1e-5 * adapter.slack
    assert update.grad_norm < 1e-5 * adapter.slack
    unlike = run(bench.learner(adapter, objective).update(bench.batch(objective, rollouts)))
    assert unlike.grad_norm > 0.01


# --- Versions and weights -----------------------------------------------------------------------


@each_tuning
def test_every_step_makes_a_version(
    adapter: LearnerAdapter, bench: Bench, tuning: TuningConfig
) -> None:
    learner = bench.learner(adapter, sampled(), tuning=tuning)
    batch, seen = bench.ragged_batch(sampled()), [learner.version]
    for _ in range(3):
        update = run(learner.update(batch))
        assert update.version == learner.version
        seen.append(update.version)
    assert [version.step for version in seen] == [0, 1, 2, 3]
    assert len({version.digest for version in seen}) == 4


@each_tuning
def test_an_engine_serves_what_the_learner_publishes(
    adapter: LearnerAdapter, bench: Bench, tuning: TuningConfig
) -> None:
    learner = bench.learner(adapter, sampled(), tuning=tuning)
    batch = bench.ragged_batch(sampled())
    engine = EmbeddedRolloutEngine(
        bench.student_dir, device="cpu", dtype="float32", max_sequences=64
    )
    channel, parity = MemoryChannel(), PARITY_NATS * adapter.slack
    for _ in range(2):
        version = run(learner.publish(channel))
        run(engine.load(version, channel))
        assert engine.version == version == learner.version
        fresh = bench.batch(sampled(), generate(engine, ragged_requests()))
        update = run(learner.update(fresh))
        assert metric(update, "health/learner_vs_engine_max_nats") < parity
        assert metric(update, "health/ratio_max") == pytest.approx(1, abs=parity)
        # One step later the same rollouts are stale, and the gap says so.
        stale = run(learner.update(fresh))
        assert metric(stale, "health/learner_vs_engine_max_nats") > 20 * parity
        steps(learner, batch, 1)


def test_published_weights_do_not_change_with_the_next_step(
    adapter: LearnerAdapter, bench: Bench
) -> None:
    learner = bench.learner(adapter, sampled())
    channel = MemoryChannel()
    version = run(learner.publish(channel))
    held = {name: tensor.clone() for name, tensor in channel.fetch(version).tensors.items()}
    steps(learner, bench.ragged_batch(sampled()), 1)
    assert all(torch.equal(tensor, held[n]) for n, tensor in channel.fetch(version).tensors.items())


def test_lora_publishes_merged_weights(adapter: LearnerAdapter, bench: Bench) -> None:
    learner = bench.learner(adapter, sampled(), tuning=LORA)
    batch = bench.ragged_batch(sampled())
    steps(learner, batch, 3)
    merged = reference_model(bench.student_dir, weights_of(learner))
    # The learner's own forward, through its adapters, reports its gap to these logprobs.
    rollouts = [
        replace(s.rollout, behavior_logprobs=token_logprobs(merged, s.rollout))
        for s in batch.scored
    ]
    update = run(learner.update(bench.batch(sampled(), rollouts)))
    assert metric(update, "health/learner_vs_engine_max_nats") < 1e-5 * adapter.slack
    base = max(largest_gap(token_logprobs(bench.student, r), r.behavior_logprobs) for r in rollouts)
    assert base > FAR_NATS


def test_lora_leaves_the_base_weights_alone(
    adapter: LearnerAdapter, bench: Bench, tmp_path: Path
) -> None:
    learner = bench.learner(adapter, sampled(), tuning=LORA)
    start, before = learner.version, weights_of(learner)
    run(learner.save_state(tmp_path))
    steps(learner, bench.ragged_batch(sampled()), 3)
    adapted = {n for n, tensor in weights_of(learner).items() if not torch.equal(tensor, before[n])}
    leaves = {n.split(".")[-2] for n in adapted}
    assert leaves == set(LORA.target_modules)
    # With the first step's adapters back, every bit is that of the start: the base never moved.
    run(learner.load_state(tmp_path, start))
    assert all(torch.equal(tensor, before[n]) for n, tensor in weights_of(learner).items())


def test_adapters_may_be_published_by_themselves(
    adapter: LearnerAdapter, bench: Bench, tmp_path: Path
) -> None:
    batch = bench.ragged_batch(sampled())
    alone, merged = (
        bench.learner(adapter, sampled(), tuning=LORA, publish_adapter=alone)
        for alone in (True, False)
    )
    steps(merged, batch, 2)
    versions = [alone.version, *(update.version for update in steps(alone, batch, 2))]
    assert len({version.digest for version in versions}) == 3
    channel = DirectoryChannel(tmp_path)
    assert run(alone.publish(channel)) == versions[-1]

    payload = channel.fetch(versions[-1])
    assert isinstance(payload, LoraWeights)
    assert (payload.rank, payload.alpha) == (LORA.rank, LORA.alpha)
    assert set(payload.target_modules) == set(LORA.target_modules)
    assert weights_digest(payload.tensors) == versions[-1].digest
    assert {tensor.dtype for tensor in payload.tensors.values()} == {torch.float32}
    # peft reads the directory, and the base with these adapters is the merged student.
    base = reference_model(bench.student_dir)
    directory = channel.adapter_directory(versions[-1], tmp_path)
    adapted = PeftModel.from_pretrained(base, str(directory))
    expected = weights_of(merged)
    got = dict(adapted.merge_and_unload().named_parameters())
    own = dict(bench.student.named_parameters())
    assert largest_difference(got, expected) < 1e-5 * adapter.slack
    assert largest_difference(own, expected) > 1e-3


def largest_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[n].detach() - right[n].detach()).abs().max()) for n in left)


def test_adapters_begin_alike_for_one_seed_and_differ_for_another(
    adapter: LearnerAdapter, bench: Bench
) -> None:
    def first(seed: int) -> str:
        settings = {"tuning": LORA, "publish_adapter": True, "seed": seed}
        return bench.learner(adapter, sampled(), **settings).version.digest

    assert first(3) == first(3) != first(4)
    # Every learner begins with the same ones, so that two of them can be compared.
    embedded = EmbeddedLearnerAdapter("cpu")
    settings = {"tuning": LORA, "publish_adapter": True, "seed": 3}
    assert bench.learner(embedded, sampled(), **settings).version.digest == first(3)


def test_fresh_lora_adapters_change_nothing(adapter: LearnerAdapter, bench: Bench) -> None:
    own = dict(bench.student.named_parameters())
    for name, tensor in weights_of(bench.learner(adapter, sampled(), tuning=LORA)).items():
        assert torch.equal(tensor, own[name])


@pytest.mark.parametrize("target", ["q_prj", "W_pack", "embed_tokens", "lm_head", "mlp"])
def test_a_lora_target_that_is_no_linear_layer_of_a_block_is_refused_by_name(
    adapter: LearnerAdapter, bench: Bench, target: str
) -> None:
    tuning = LoraTuning(kind="lora", target_modules=("q_proj", target))
    with pytest.raises(ConfigError, match=rf"target_modules: {target} is no linear layer"):
        bench.learner(adapter, sampled(), tuning=tuning)


# --- Resume -------------------------------------------------------------------------------------

COSINE = WarmupCosineSchedule(kind="warmup_cosine", warmup_steps=2, final_fraction=0.1)
RESUMABLE = {
    "full": FULL,
    "lora": LORA,
    "lora_dropout": LoraTuning(kind="lora", rank=4, dropout=0.3),
}


@pytest.mark.parametrize("tuning", RESUMABLE.values(), ids=RESUMABLE.keys())
def test_a_resumed_learner_goes_on_bit_for_bit(
    adapter: LearnerAdapter, bench: Bench, tuning: TuningConfig, tmp_path: Path
) -> None:
    if not adapter.bitwise_repeatable:
        pytest.skip("this learner's kernels add up in any order")
    batch = bench.ragged_batch(sampled())
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule=COSINE)
    build = partial(
        bench.learner, adapter, sampled(), tuning=tuning, optimizer=optimizer, total_steps=6
    )
    unbroken = build()
    run(unbroken.publish(MemoryChannel()))
    head = steps(unbroken, batch, 3)
    run(unbroken.save_state(tmp_path))
    tail = steps(unbroken, batch, 3)

    resumed = build()
    run(resumed.load_state(tmp_path, head[-1].version))
    assert resumed.version == head[-1].version
    again = steps(resumed, batch, 3)
    assert [(u.version, u.loss, u.grad_norm) for u in again] == [
        (u.version, u.loss, u.grad_norm) for u in tail
    ]


@each_tuning
def test_a_state_of_other_weights_is_refused(
    adapter: LearnerAdapter, bench: Bench, tuning: TuningConfig, tmp_path: Path
) -> None:
    learner = bench.learner(adapter, sampled(), tuning=tuning)
    versions = [u.version for u in steps(learner, bench.ragged_batch(sampled()), 2)]
    run(learner.save_state(tmp_path))
    other = bench.learner(adapter, sampled(), tuning=tuning)
    with pytest.raises(CheckpointError, match=versions[0].digest):
        run(other.load_state(tmp_path, versions[0]))


def test_a_state_of_another_tuning_is_refused(
    adapter: LearnerAdapter, bench: Bench, tmp_path: Path
) -> None:
    learner = bench.learner(adapter, sampled(), tuning=LORA)
    run(learner.save_state(tmp_path))
    other = bench.learner(adapter, sampled())
    with pytest.raises(CheckpointError):
        run(other.load_state(tmp_path, learner.version))


@each_tuning
def test_the_saved_student_is_the_published_one(
    adapter: LearnerAdapter, bench: Bench, tuning: TuningConfig, tmp_path: Path
) -> None:
    learner = bench.learner(adapter, sampled(), tuning=tuning)
    steps(learner, bench.ragged_batch(sampled()), 2)
    run(learner.save_student(tmp_path / "student"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    expected = weights_of(learner)
    own = dict(saved.named_parameters())
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())
    check_compatible(load_identity(bench.student_dir), load_identity(tmp_path / "student"))
    messages = [{"role": "user", "content": "1 + 1?"}]
    old, new = (
        AutoTokenizer.from_pretrained(path).apply_chat_template(messages, tokenize=False)
        for path in (bench.student_dir, tmp_path / "student")
    )
    assert old == new == "<|user|>1 + 1?<|end|>"


# --- Replay -------------------------------------------------------------------------------------

REPLAY = ReplayConfig(capacity_tokens=2000, max_age_steps=9, coverage_first=True)
PRIORITIZED = ReplayConfig.model_validate(
    {
        "capacity_tokens": 2000,
        "max_age_steps": 9,
        "law": {"kind": "proportional", "alpha": 1.0, "age_decay_steps": 3.0},
    }
)
REPLAYABLE = ("sampled", "sampled_top_k_baseline", "top_k_bin_reverse")


def replayed(learner: ReplayingLearner, count: int, num_rollouts: int) -> list[Update]:
    return [run(learner.update_replayed(num_rollouts)) for _ in range(count)]


@each_tuning
@pytest.mark.parametrize("name", REPLAYABLE)
@pytest.mark.parametrize("micro_batch_tokens", [90, 10**6])
def test_a_replayed_batch_has_the_gradient_of_the_batch(
    adapter: LearnerAdapter,
    bench: Bench,
    name: str,
    tuning: TuningConfig,
    micro_batch_tokens: int,
) -> None:
    objective = OBJECTIVES[name]
    batch = Batch.uniform(bench.ragged_batch(objective).scored)
    settings = {"tuning": tuning, "micro_batch_tokens": micro_batch_tokens}
    direct = bench.learner(adapter, objective, **settings)
    replaying = bench.learner(adapter, objective, replay=REPLAY, **settings)
    before = weights_of(direct)
    (expected,) = steps(direct, batch, 1)
    run(replaying.admit(scored_of(batch)))
    (update,) = replayed(replaying, 1, len(batch.scored))
    assert update.loss == pytest.approx(expected.loss, rel=1e-5 * adapter.slack)
    assert update.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5 * adapter.slack)
    assert update.num_loss_tokens == expected.num_loss_tokens
    limits = {"worst": WORST * adapter.slack, "drift": DRIFT * adapter.slack}
    assert_same_weights(weights_of(replaying), weights_of(direct), before, **limits)
    for key in ("loss/reverse_kl_nats", "health/learner_vs_engine_max_nats", "weights/lag_steps"):
        slack = 1e-4 * adapter.slack
        assert metric(update, key) == pytest.approx(metric(expected, key), rel=slack, abs=slack)


def test_importance_weights_reach_the_gradient(adapter: LearnerAdapter, bench: Bench) -> None:
    """Four of seven were used before and five are drawn: the used count more, once drawn."""
    objective = OBJECTIVES["sampled"]
    scored = scored_of(bench.ragged_batch(objective))
    full_correction = REPLAY.model_copy(update={"beta_start": 1.0})
    learner = bench.learner(adapter, objective, replay=full_correction, optimizer=STILL)
    run(learner.admit(scored[:4]))
    replayed(learner, 1, 4)
    run(learner.admit(scored[4:]))
    (update,) = replayed(learner, 1, 5)
    # Three unused for certain, two of the four used with probability 1/2 and so twice the weight.
    fraction = (3 * 1 + 2 * 2) ** 2 / (3 * 1 + 2 * 4) / 5
    assert metric(update, "replay/effective_sample_fraction") == pytest.approx(fraction)
    candidates = []
    for pair in itertools.combinations(range(4), 2):
        chosen = [*(scored[i] for i in pair), *scored[4:]]
        weights = np.array([2.0, 2.0, 1.0, 1.0, 1.0])
        batch = replace(Batch.uniform(chosen), importance_weights=weights)
        other = bench.learner(adapter, objective, optimizer=STILL)
        candidates.append(run(other.update(batch)).loss)
    assert min(abs(update.loss - loss) for loss in candidates) < 1e-5 * adapter.slack


def test_a_resumed_learner_replays_on_bit_for_bit(
    adapter: LearnerAdapter, bench: Bench, tmp_path: Path
) -> None:
    if not adapter.bitwise_repeatable:
        pytest.skip("this learner's kernels add up in any order")
    scored = scored_of(bench.ragged_batch(sampled()))
    build = partial(bench.learner, adapter, sampled(), replay=PRIORITIZED)
    unbroken = build()
    run(unbroken.admit(scored))
    head = replayed(unbroken, 3, 3)
    run(unbroken.save_state(tmp_path))
    tail = replayed(unbroken, 3, 3)
    resumed = build()
    run(resumed.load_state(tmp_path, head[-1].version))
    again = replayed(resumed, 3, 3)
    assert [(u.version, u.loss) for u in again] == [(u.version, u.loss) for u in tail]
    without = build()
    run(without.admit(scored))
    (tmp_path / "replay.safetensors").unlink()
    with pytest.raises(CheckpointError, match="replay"):
        run(without.load_state(tmp_path, head[-1].version))


def test_replay_says_what_it_holds_and_ends_with_the_age_limit(
    adapter: LearnerAdapter, bench: Bench
) -> None:
    scored = scored_of(bench.ragged_batch(sampled()))
    rollouts = [entry.rollout for entry in scored]
    config = REPLAY.model_copy(update={"max_age_steps": 2})
    learner = bench.learner(adapter, sampled(), replay=config)
    run(learner.admit(scored))
    *_, last = replayed(learner, 3, 100)
    expected = {
        "replay/rollouts": len(scored),
        "replay/drawn_rollouts": len(scored),
        "replay/tokens": sum(r.prompt.token_ids.size + r.num_tokens for r in rollouts),
        "replay/age_mean_steps": 2,
        "replay/age_max_steps": 2,
        "replay/uses_mean": 3,
        "replay/added": len(scored),
        "replay/evicted_by_age": 0,
        "replay/effective_sample_fraction": 1,
        "weights/lag_steps": 2,
    }
    assert {key: metric(last, key) for key in expected} == pytest.approx(expected)
    with pytest.raises(DataError, match="max_age_steps"):
        run(learner.update_replayed(100))


def test_a_replayed_step_that_is_not_finite_uses_nothing_up(
    adapter: LearnerAdapter, bench: Bench
) -> None:
    config = REPLAY.model_copy(update={"reuse_cap": 1})
    unlikely = OBJECTIVES["sampled_plain"]
    batch = bench.ragged_batch(unlikely)
    impossible = [
        ScoredRollout(
            rollout=s.rollout, score=replace(s.score, logprobs=np.full(s.rollout.num_tokens, -3e38))
        )
        for s in scored_of(batch)
    ]
    learner = bench.learner(adapter, unlikely, replay=config)
    run(learner.admit(impossible))
    for _ in range(2):  # still there
        with pytest.raises(NonFiniteError):
            run(learner.update_replayed(3))
    assert learner.version.step == 0


def test_a_learner_without_replay_says_so(adapter: LearnerAdapter, bench: Bench) -> None:
    learner = bench.learner(adapter, sampled())
    with pytest.raises(ConfigError, match="`replay` section"):
        run(learner.admit(scored_of(bench.ragged_batch(sampled()))))
    with pytest.raises(ConfigError, match="`replay` section"):
        run(learner.update_replayed(1))


def test_what_is_too_long_is_not_admitted(adapter: LearnerAdapter, bench: Bench) -> None:
    learner = bench.learner(adapter, sampled(), replay=REPLAY)
    too_long = bench.batch(sampled(), [synthetic_rollout(7, CONTEXT_LENGTH - 6)])
    with pytest.raises(DataError, match=f"has {CONTEXT_LENGTH + 1} tokens"):
        run(learner.admit(scored_of(too_long)))


# --- What is refused ----------------------------------------------------------------------------


@each_tuning
@pytest.mark.parametrize(
    "reward", [3e38, 1e22], ids=["infinite_loss", "infinite_gradient_norm_only"]
)
def test_a_step_that_is_not_finite_changes_nothing(
    adapter: LearnerAdapter, bench: Bench, tuning: TuningConfig, reward: float
) -> None:
    batch = bench.ragged_batch(sampled())
    poisoned = replace(batch, task_advantages=np.full(len(batch.scored), reward))
    learner, spared = (bench.learner(adapter, sampled(), tuning=tuning) for _ in range(2))
    steps(learner, batch, 1)
    steps(spared, batch, 1)
    version, before = learner.version, weights_of(learner)
    with pytest.raises(NonFiniteError, match="step 1: loss="):
        run(learner.update(poisoned))
    assert learner.version == version
    assert all(torch.equal(w, before[name]) for name, w in weights_of(learner).items())
    if adapter.bitwise_repeatable:  # the optimizer's moments are untouched too
        (after,), (untouched,) = steps(learner, batch, 1), steps(spared, batch, 1)
        assert after.version == untouched.version


@each_tuning
def test_weights_that_a_step_spoils_are_never_used(
    adapter: LearnerAdapter, bench: Bench, tuning: TuningConfig, tmp_path: Path
) -> None:
    # Beyond what the config allows: what is tested is the learner, not the schema.
    optimizer = SMOOTH.model_copy(update={"weight_decay": 1e308})
    learner = bench.learner(adapter, sampled(), optimizer, tuning=tuning)
    with pytest.raises(NonFiniteError, match="step 0: weights are not finite"):
        run(learner.update(bench.ragged_batch(sampled())))
    assert learner.version.step == 0
    for use in (
        lambda: learner.publish(MemoryChannel()),
        lambda: learner.save_state(tmp_path),
        lambda: learner.save_student(tmp_path / "student"),
        lambda: learner.update(bench.ragged_batch(sampled())),
    ):
        with pytest.raises(NonFiniteError, match="step 0: weights are not finite"):
            run(use())
    assert not any(tmp_path.iterdir())


@each_tuning
def test_a_lost_step_is_made_good_by_a_checkpoint(
    adapter: LearnerAdapter, bench: Bench, tuning: TuningConfig, tmp_path: Path
) -> None:
    optimizer = SMOOTH.model_copy(update={"weight_decay": 1e308})
    learner = bench.learner(adapter, sampled(), optimizer, tuning=tuning)
    version, before = learner.version, weights_of(learner)
    run(learner.save_state(tmp_path))
    with pytest.raises(NonFiniteError):
        run(learner.update(bench.ragged_batch(sampled())))
    run(learner.load_state(tmp_path, version))
    assert all(torch.equal(w, before[name]) for name, w in weights_of(learner).items())


def test_a_sequence_may_fill_the_context_and_not_exceed_it(
    adapter: LearnerAdapter, bench: Bench
) -> None:
    learner = bench.learner(adapter, sampled())
    fits = bench.batch(sampled(), [synthetic_rollout(6, CONTEXT_LENGTH - 6)])
    assert run(learner.update(fits)).version.step == 1
    too_long = bench.batch(sampled(), [synthetic_rollout(7, CONTEXT_LENGTH - 6)])
    refused = rf"has {CONTEXT_LENGTH + 1} tokens, more than .* {CONTEXT_LENGTH}"
    with pytest.raises(DataError, match=refused):
        run(learner.update(too_long))
    assert learner.version.step == 1


def test_close_may_be_called_twice(adapter: LearnerAdapter, bench: Bench) -> None:
    learner = bench.learner(adapter, sampled())
    run(learner.close())
    run(learner.close())


# --- Learning rate ------------------------------------------------------------------------------


def test_a_constant_learning_rate_stays(adapter: LearnerAdapter, bench: Bench) -> None:
    learner = bench.learner(adapter, sampled())
    updates = steps(learner, bench.ragged_batch(sampled()), 3)
    assert [metric(u, "optim/learning_rate") for u in updates] == [SMOOTH.learning_rate] * 3


def test_the_learning_rate_warms_up_and_falls_to_its_end(
    adapter: LearnerAdapter, bench: Bench
) -> None:
    optimizer = OptimizerConfig(learning_rate=1.0e-3, schedule=COSINE)
    learner = bench.learner(adapter, sampled(), optimizer=optimizer, total_steps=7)
    updates = steps(learner, bench.ragged_batch(sampled()), 8)
    shares = [metric(u, "optim/learning_rate") / 1.0e-3 for u in updates]
    middle = 0.1 + 0.9 * 0.5  # half-way between steps 2 and 6
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert shares[4] == pytest.approx(middle)
    assert shares[6:] == pytest.approx([0.1, 0.1])
    assert shares[2:7] == sorted(shares[2:7], reverse=True)


# --- Mixed precision ----------------------------------------------------------------------------

BFLOAT16_MEAN_NATS = 0.02
"""bfloat16 keeps 8 bits; float32 forwards agree 1000 times better."""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_autocast_stays_close_to_float32(bench: Bench, device: Any) -> None:
    adapter = EmbeddedLearnerAdapter(device)

    def mean_gap(reference: PreTrainedModel, *, shift: int = 0) -> float:
        """Of a fresh learner under autocast to a float32 forward."""
        rollouts = []
        for seed in range(6):
            draft = synthetic_rollout(10, 40, seed)
            logprobs = np.roll(token_logprobs(reference, draft), shift)
            rollouts.append(replace(draft, behavior_logprobs=logprobs))
        learner = bench.learner(adapter, sampled(), autocast="bfloat16")
        update = run(learner.update(bench.batch(sampled(), rollouts)))
        return metric(update, "health/learner_vs_engine_abs_nats")

    stepped = bench.learner(adapter, sampled())
    steps(stepped, bench.ragged_batch(sampled()), 1)
    one_step_on = reference_model(bench.student_dir, weights_of(stepped))
    assert PARITY_NATS < mean_gap(bench.student) < BFLOAT16_MEAN_NATS
    assert mean_gap(bench.student, shift=1) > 20 * BFLOAT16_MEAN_NATS
    assert mean_gap(one_step_on) > 2 * BFLOAT16_MEAN_NATS
