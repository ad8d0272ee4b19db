"""The learner in this process: full or LoRA training on PyTorch and peft.

Shape letters: B rows of a micro-batch, T positions, D hidden size.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.config import EmbeddedTraining, LoraTuning
from qwen3_distill.modeling.loading import load_model, resolve_device, resolve_dtype
from qwen3_distill.modeling.step_memory import autocasts
from qwen3_distill.replay.buffer import ReplayBuffer, build_replay
from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.fp8_base import check_gradient, freeze_in_fp8
from qwen3_distill.training.gradient_probe import Probe, probe_rows
from qwen3_distill.training.learner import TorchLearner
from qwen3_distill.training.lora import add_adapters
from qwen3_distill.training.objectives.base import Objective
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.training.prompt_attention import PromptAttention, hidden_states, share_prompts
from qwen3_distill.training.ranks import Ranks
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.training.sharding import ShardedWeights, shard_layers
from qwen3_distill.types import Metric


class EmbeddedLearner(TorchLearner):
    """A `Learner` on plain PyTorch: exact and small, the reference for the other engines."""

    def __init__(
        self,
        settings: LearnerSettings[EmbeddedTraining],
        objective: Objective,
        replay: ReplayBuffer | None = None,
        shards: Ranks | None = None,
    ) -> None:
        student = _EmbeddedStudent(settings, shards)
        weights = None if shards is None else ShardedWeights(student, shards)
        super().__init__(settings, student, objective, replay, weights)
        if shards is not None:
            self.join(shards)


def build_embedded_learner(
    settings: LearnerSettings[EmbeddedTraining],
    *,
    teacher_head_VD: Tensor | None = None,
    shards: Ranks | None = None,
) -> EmbeddedLearner:
    """Build a learner with the objective and the replay buffer of its settings.

    Args:
        teacher_head_VD: the teacher's output head, for objectives over hidden states.
        shards: the ranks over which weights, gradients and moments are divided; None: whole here.
    """
    training, objective = settings.training, settings.objective
    buffer = None
    if settings.replay is not None:
        device = resolve_device(training.device)
        buffer = build_replay(settings.replay, objective, device=device, seed=settings.seed)
    built = build_objective(
        objective, teacher_head_VD=teacher_head_VD, chunk_tokens=training.chunk_tokens
    )
    return EmbeddedLearner(settings, built, buffer, shards)


class _EmbeddedStudent:
    packs = False

    def __init__(
        self, settings: LearnerSettings[EmbeddedTraining], shards: Ranks | None = None
    ) -> None:
        config = self._config = settings.training
        self.device = resolve_device(config.device)
        loads_on = self.device if shards is None else torch.device("cpu")
        base = load_model(settings.model_dir, device=loads_on, dtype=resolve_dtype(config.dtype))
        self.core: PreTrainedModel = base
        if shards is not None:
            shard_layers(base, shards, computes_in=torch.bfloat16 if self._autocasts else None)
        if isinstance(config.tuning, LoraTuning):
            self.core = add_adapters(base, config.tuning, settings.seed)
        as_loaded = self._freeze(settings.model_dir)
        if config.gradient_checkpointing:
            self.core.gradient_checkpointing_enable({"use_reentrant": False})
            self.core.enable_input_require_grads()
        if config.shared_prompts:
            share_prompts(base)
        self.core.train()
        if config.compiled:
            for layer in self.core.model.layers:
                layer.compile()
        self._base = "as loaded"
        if as_loaded is not None:
            with self.autocast():
                gap = check_gradient(probe_rows(self.core), as_loaded, config.base_precision)
            self._base = (
                f"{config.base_precision}; gradients moved by {gap:.1e} of their norms at most"
            )

    def _freeze(self, model_dir: Path) -> Probe | None:
        """Freeze layers in FP8, if asked; return what the model gave before."""
        precision = self._config.base_precision
        if precision == "as_loaded":
            return None
        self.core.train()
        with self.autocast():
            before = probe_rows(self.core)
        freeze_in_fp8(self.core, model_dir, precision)
        return before

    @property
    def shares_prompts(self) -> bool:
        return self._config.shared_prompts

    @property
    def _autocasts(self) -> bool:
        return autocasts(self._config, on_gpu=self.device.type == "cuda")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocasts)

    def hidden(self, micro: MicroBatch) -> Tensor:
        if micro.shared is not None:
            attention = PromptAttention(micro.shared, self.device)
            return hidden_states(self.core, micro.input_BT, micro.position_BT, attention)
        # Right padding needs no attention mask: causal attention never looks at what follows, and
        # positions after the response carry no loss.
        return self.core.model(input_ids=micro.input_BT, use_cache=False).last_hidden_state

    def metrics(self) -> tuple[Metric, ...]:
        layers = self.core.config.num_hidden_layers if self._config.gradient_checkpointing else 0
        return (Metric.last("train/recomputed_layers", layers),)

    def memory_report(self) -> str:
        recomputes = "every layer" if self._config.gradient_checkpointing else "no layer"
        return (
            f"micro-batches of {self._config.micro_batch_tokens} tokens, {recomputes} recomputed, "
            "no memory plan"
        )

    def describe(self) -> dict[str, str]:
        return {
            "device": str(self.device),
            "frozen layers": self._base,
            "memory": self.memory_report(),
        }
