"""The shared learner where memory runs out, and the probes of the model below the head."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen3_distill.config import (
    EmbeddedTraining,
    FullTuning,
    LoraTuning,
    OptimizerConfig,
    SampledReverseKL,
    TuningConfig,
    UnslothTraining,
)
from qwen3_distill.errors import AlignmentError, EngineError, EngineStartError, NonFiniteError
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training import learner as learner_module
from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.embedded.hosted import hosted_embedded_learner
from qwen3_distill.training.embedded.student import EmbeddedLearner
from qwen3_distill.training.learner import TorchLearner
from qwen3_distill.training.learner_state import Part
from qwen3_distill.training.objectives.base import (
    LossTerms,
    Objective,
    read_scalars,
)
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.training.trained import TrainedWeights
from qwen3_distill.training.unsloth.learner import unsloth_learner
from qwen3_distill.training.unsloth.packing_probe import recompute_first_layers
from qwen3_distill.types import Batch, ScoredRollout, TeacherScore, Update
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.builders import synthetic_rollout
from tests.tiny_models import TinyModels

CPU = torch.device("cpu")


class LackingObjective:
    """The real one, which finds no memory for the micro-batches of these numbers."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.fails_in = set[int]()
        self.rollouts = list[int]()
        """Rollouts of every micro-batch that came."""

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        self.rollouts.append(len(micro.rollouts))
        if len(self.rollouts) in self.fails_in:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return self._objective.terms(micro, hidden_BTD, head_VD, denominator)


def settings_of(
    models: TinyModels, device: Literal["cpu", "cuda"] = "cpu", **changes: Any
) -> LearnerSettings[EmbeddedTraining]:
    values = {"micro_batch_tokens": 20, "optimizer": OptimizerConfig(learning_rate=1e-3)} | changes
    return LearnerSettings(
        model_dir=models.student,
        training=EmbeddedTraining(kind="embedded", device=device, **values),
        objective=SampledReverseKL(kind="sampled_reverse_kl"),
        total_steps=9,
        seed=0,
    )


def learner_of(
    models: TinyModels, device: Literal["cpu", "cuda"] = "cpu", **changes: Any
) -> tuple[EmbeddedLearner, LackingObjective]:
    settings = settings_of(models, device, **changes)
    built = build_objective(settings.objective, teacher_head_VD=None, chunk_tokens=64)
    objective = LackingObjective(built)
    return EmbeddedLearner(settings, objective), objective


def test_several_ranks_may_combine_their_gradients_between_the_last_backward_pass_and_the_clipping(
    tiny_models: TinyModels,
) -> None:
    class TwoEqualRanks(EmbeddedLearner):
        num_reductions = 0

        def _reduce(self) -> None:
            self.num_reductions += 1
            for parameter in self._weights.named.values():
                assert parameter.grad is not None
                parameter.grad.mul_(2)

    alone, objective = learner_of(tiny_models)
    ranks = TwoEqualRanks(settings_of(tiny_models), objective)
    batch = batch_of(5)  # several micro-batches
    one, two = asyncio.run(alone.update(batch)), asyncio.run(ranks.update(batch))
    assert ranks.num_reductions == 1
    assert two.grad_norm == pytest.approx(2 * one.grad_norm, rel=1e-5)
    assert two.loss == one.loss


def test_a_learner_here_is_not_started_again_and_a_hosted_one_as_often_as_its_section_says(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    settings = settings_of(tiny_models)
    training = settings.training.model_copy(update={"max_restarts": 7})
    unsloth = LearnerSettings(
        model_dir=tiny_models.student,
        training=UnslothTraining(kind="unsloth", python="python3", max_restarts=5),
        objective=settings.objective,
        total_steps=9,
        seed=0,
    )
    log = tmp_path / "log"
    assert learner_of(tiny_models)[0].max_restarts == 0
    hosted = hosted_embedded_learner(replace(settings, training=training), log=log)
    assert hosted.max_restarts == 7
    assert unsloth_learner(unsloth, log=log).max_restarts == 5


def parameters_of(learner: EmbeddedLearner) -> list[torch.nn.Parameter]:
    return list(learner.student.core.parameters())


def batch_of(count: int) -> Batch:
    rollouts = [synthetic_rollout(3, 9, seed) for seed in range(count)]
    score = TeacherScore(teacher_id="t", logprobs=np.full(9, -1.0))
    return Batch.uniform([ScoredRollout(rollout=rollout, score=score) for rollout in rollouts])


def test_a_lack_of_memory_is_an_error_that_leaves_no_half_step(tiny_models: TinyModels) -> None:
    (learner, objective), (spared, _) = (learner_of(tiny_models) for _ in range(2))
    before = learner.version
    objective.fails_in = {2, 4}  # after the first micro-batch's gradient, both times
    with pytest.raises(EngineError) as raised:
        asyncio.run(learner.update(batch_of(3)))
    message = str(raised.value)
    assert "step 0: the learner ran out of memory; nothing was stepped" in message
    assert "Planned: micro-batches of 20 tokens, no layer recomputed" in message
    assert "Found: CUDA out of memory. Tried to allocate 2.00 GiB. Begun 2 times" in message
    assert "at last with micro-batches of at most 20 tokens. Lower" in message
    assert "training.micro_batch_tokens" in message
    assert "training.gradient_checkpointing" in message
    assert learner.version == before
    assert all(p.grad is None for p in parameters_of(learner)), "gradients hold memory"
    again, undisturbed = (asyncio.run(one.update(batch_of(3))) for one in (learner, spared))
    assert (again.version, again.loss) == (undisturbed.version, undisturbed.loss)


def metrics_of(update: Update) -> dict[str, float]:
    return {metric.key: metric.value for metric in update.metrics}


def weights_of(learner: TorchLearner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.student.core.parameters()])


LORA = LoraTuning(kind="lora", rank=4, dropout=0.5)


@pytest.mark.parametrize("tuning", [FullTuning(kind="full"), LORA], ids=["full", "dropout"])
def test_a_step_that_begins_again_is_the_same_step(
    tiny_models: TinyModels, tuning: TuningConfig
) -> None:
    (learner, objective), (spared, _) = (
        learner_of(tiny_models, micro_batch_tokens=40, tuning=tuning) for _ in range(2)
    )
    objective.fails_in = {2}
    for number in range(2):
        ours, theirs = (asyncio.run(one.update(batch_of(6))) for one in (learner, spared))
        assert (ours.version, ours.loss, ours.grad_norm) == (
            theirs.version,
            theirs.loss,
            theirs.grad_norm,
        )
        assert metrics_of(ours).get("train/memory_retries") == (1 - number)
        assert "train/memory_retries" not in metrics_of(theirs)
    assert objective.rollouts == [3, 3, 3, 3, 3, 3]  # two that failed, and two steps of two
    assert torch.equal(weights_of(learner), weights_of(spared))


def test_memory_that_keeps_lacking_halves_the_micro_batches_for_good(
    tiny_models: TinyModels,
) -> None:
    (learner, objective), (spared, _) = (
        learner_of(tiny_models, micro_batch_tokens=80) for _ in range(2)
    )
    objective.fails_in = {1, 2}
    ours, theirs = (asyncio.run(one.update(batch_of(6))) for one in (learner, spared))
    assert metrics_of(ours)["train/memory_retries"] == 2
    assert metrics_of(ours)["train/micro_batch_tokens"] == 40
    assert ours.num_loss_tokens == theirs.num_loss_tokens
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    assert torch.allclose(weights_of(learner), weights_of(spared), atol=1e-6)
    again = asyncio.run(learner.update(batch_of(6)))
    assert metrics_of(again)["train/memory_retries"] == 0
    objective.fails_in = {len(objective.rollouts) + 1}  # later, and not for the first time
    asyncio.run(learner.update(batch_of(6)))
    assert objective.rollouts == [6, 6, *[3, 3], *[3, 3], 3, *[1] * 6]


def test_a_lack_for_one_rollout_is_tried_once_more_in_every_step(tiny_models: TinyModels) -> None:
    learner, objective = learner_of(tiny_models, micro_batch_tokens=1)
    for _ in range(3):
        objective.fails_in = {len(objective.rollouts) + 1}
        asyncio.run(learner.update(batch_of(1)))
    objective.fails_in = {len(objective.rollouts) + 1, len(objective.rollouts) + 2}
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(learner.update(batch_of(1)))


def test_a_rank_whose_passes_others_take_part_in_does_not_begin_again(
    tiny_models: TinyModels,
) -> None:
    built, objective = learner_of(tiny_models)
    weights = TrainedWeights(built.student.core)
    weights.part = Part(index=0, count=2, divided=frozenset())
    learner = TorchLearner(settings_of(tiny_models), built.student, objective, weights=weights)
    objective.fails_in = {2}
    with pytest.raises(EngineError, match=r"allocate 2\.00 GiB\. Lower"):
        asyncio.run(learner.update(batch_of(3)))
    assert len(objective.rollouts) == 2


def lacking(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.80 GiB.\nmore")


def test_a_lack_of_memory_to_publish_is_an_error_too(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, _ = learner_of(tiny_models)
    monkeypatch.setattr(learner, "payload", lacking)
    with pytest.raises(
        EngineError, match=r"out of memory; it was not published\. Planned: .*6\.80"
    ):
        asyncio.run(learner.publish(MemoryChannel()))


def test_a_step_without_a_digest_says_that_it_was_stepped(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, _ = learner_of(tiny_models)
    monkeypatch.setattr(learner, "_digest", lacking)
    with pytest.raises(EngineError, match=r"step 0: .* it was stepped, but cannot be published.*"):
        asyncio.run(learner.update(batch_of(3)))


def test_values_of_other_tokens_have_no_means() -> None:
    with pytest.raises(AlignmentError, match=r"3 values for rollouts of \[2, 2\] tokens"):
        learner_module._mean_per_rollout(torch.ones(3), [2, 2])


# --- The host runs ahead of the device ----------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_around_the_model_waits_for_the_device(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model transformers looks at the positions, and unsloth at the targets."""
    learner, _ = learner_of(tiny_models, "cuda")
    asyncio.run(learner.update(batch_of(3)))
    calls = list[str]()

    def may_wait(name: str, function: Any, *, afterwards: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            result = function(*args, **named)
            torch.cuda.set_sync_debug_mode(afterwards)
            calls.append(name)
            return result

        return call

    hidden = may_wait("hidden", learner.student.hidden, afterwards="error")
    monkeypatch.setattr(learner.student, "hidden", hidden)
    read = may_wait("read", read_scalars, afterwards="default")
    monkeypatch.setattr(learner_module, "read_scalars", read)
    torch.cuda.set_sync_debug_mode("error")
    try:
        asyncio.run(learner.update(batch_of(3)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == ["hidden", "hidden", "hidden", "read"]


# --- Layers that are recomputed -----------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_first_layers_run_twice_and_the_others_once(
    tiny_models: TinyModels, count: int
) -> None:
    model = load_model(tiny_models.student, device=CPU, dtype=torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recompute_first_layers(model, count)
    runs = [0, 0]

    def counting(index: int) -> Any:
        def hook(*_: Any) -> None:
            runs[index] += 1

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(counting(index))
    model.model(input_ids=torch.arange(6).unsqueeze(0), use_cache=False)[0].sum().backward()
    assert runs == [2 if index < count else 1 for index in range(2)]


def test_layers_that_were_never_armed_are_refused(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.student, device=CPU, dtype=torch.float32).train()
    with pytest.raises(EngineStartError, match="layer 0 cannot be recomputed"):
        recompute_first_layers(model, 1)


def test_a_saved_student_is_a_directory_of_its_own(tiny_models: TinyModels, tmp_path: Path) -> None:
    learner, _ = learner_of(tiny_models)
    asyncio.run(learner.update(batch_of(2)))
    asyncio.run(learner.save_student(tmp_path / "new" / "student"))
    saved = load_model(tmp_path / "new" / "student", device=CPU, dtype=torch.float32)
    expected = learner.payload().tensors
    assert all(torch.equal(p, expected[name]) for name, p in saved.named_parameters())
    names = {path.name for path in (tmp_path / "new" / "student").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names


def test_a_loss_that_is_not_a_number_names_what_it_may_be_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[bool] = []
    weights = SimpleNamespace(drop_gradients=lambda: dropped.append(True))
    learner: Any = SimpleNamespace(_weights=weights)
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "75")
    words = r"step 3: loss=nan.*PERCENTAGE=75 is set.*A lower learning_rate"
    with pytest.raises(NonFiniteError, match=words):
        TorchLearner._require_finite(learner, 3, float("nan"), 1.0)
    assert dropped == [True]
    TorchLearner._require_finite(learner, 3, 1.0, 1.0)
