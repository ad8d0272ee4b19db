"""The model that the shared learner trains, as each engine provides it.

Shape letters: B rows of a micro-batch, T positions, D hidden size.
"""

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.types import Metric


class Student(Protocol):
    """A model in training mode, with adapters inside it when tuning is LoRA."""

    @property
    def core(self) -> PreTrainedModel:
        """The plain Qwen3 model: parameters carry its names."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def packs(self) -> bool:
        """Whether micro-batches are packed rather than padded."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """Whether a micro-batch has a prompt once, before all of its answers."""
        ...

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the forward pass and the loss."""
        ...

    def hidden(self, micro: MicroBatch) -> Tensor:
        """[B, T, D] hidden states, the output head's input."""
        ...

    def metrics(self) -> tuple[Metric, ...]:
        """The engine's own metrics of a step."""
        ...

    def memory_report(self) -> str:
        """Memory planned and available, for an out-of-memory error."""
        ...

    def describe(self) -> dict[str, str]:
        """How the model runs, for people."""
        ...
