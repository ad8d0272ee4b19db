"""The weights that a learner trains, whole on this rank.

`sharding` has those that are divided over ranks.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.learner_state import WHOLE, Part
from qwen3_distill.training.lora import merged_parameters
from qwen3_distill.training.ranks import Ranks


class TrainedWeights:
    """Holds the trained weights of a learner: sums and clips their gradients, yields them whole.

    Args:
        core: the student, adapters inside it when tuning is LoRA.
    """

    def __init__(self, core: PreTrainedModel) -> None:
        self._core = core
        self.part: Part = WHOLE
        """The part of the weights that this rank holds."""
        self.named: dict[str, Tensor] = {
            name: parameter
            for name, parameter in core.named_parameters()
            if parameter.requires_grad
        }
        """The tensors that the optimizer steps, by name."""
        self.shapes = {name: parameter.shape for name, parameter in self.named.items()}
        """The whole weights' shapes, by name."""

    def published(self, *, lent: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight of the model without adapters, whole, the adapters merged in.

        Args:
            lent: all of them are kept, for another process to read them where they are.
        """
        return merged_parameters(self._core, lent=lent)

    def passes(self, micros: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a step, to be passed forward and backward one by one."""
        return iter(micros)

    def add_up_gradients(self, ranks: Ranks | None) -> None:
        """Replace this rank's gradients by the sums over all ranks."""
        if ranks is not None:
            ranks.add_gradients(self.named.values())

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most ``max_norm``; return the norm before."""
        return torch.nn.utils.clip_grad_norm_(self.named.values(), max_norm)

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for parameter in self.named.values():
            parameter.grad = None
