"""Weights, gradients and moments divided over ranks: FSDP2 on the matrices of the decoder layers.

A layer's matrices are gathered for its forward and its backward pass and dropped in between; their
gradients are summed to the rank that holds the part (Zhao et al. 2023, arXiv 2304.11277; torch's
`fully_shard`). The norms, the embedding and the output head stay whole on every rank, and their
gradients are summed like those of a group that divides nothing: objectives apply the head as a bare
weight, outside of any module's forward pass.

Gathering is a collective operation: all ranks look at whole weights together, and all take the same
number of passes.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.learner_state import Part
from qwen3_distill.training.ranks import Ranks
from qwen3_distill.training.student import Student
from qwen3_distill.training.trained import TrainedWeights

_EMPTY_PASS_TOKENS = 2


def shard_layers(core: PreTrainedModel, ranks: Ranks, *, computes_in: torch.dtype | None) -> None:
    """Divide the matrices of every decoder layer over the ranks, in place.

    The model comes in host memory and is on the ranks' device afterwards; that device holds one
    whole layer at a time.

    Args:
        computes_in: dtype to which a layer's matrices are cast before they are gathered; None:
            their own. Gradients are summed, and kept, in the matrices' own dtype.
    """
    layers: Any = core.model.layers
    divided = {p for layer in layers for p in layer.parameters() if p.dim() > 1}
    whole = {p for p in core.parameters() if p not in divided}
    for parameter in whole:
        parameter.data = parameter.data.to(ranks.device)
    policy = MixedPrecisionPolicy(
        param_dtype=computes_in,
        reduce_dtype=next(iter(divided)).dtype,
        cast_forward_inputs=False,  # autocast decides, as on one rank
    )
    # The model around the layers has nothing to divide: with it, a layer is gathered while the one
    # before computes.
    for module in (*layers, core.model):
        sharded: Any = fully_shard(
            module,
            mesh=ranks.mesh(),
            mp_policy=policy,
            reshard_after_forward=True,
            ignored_params=whole,
        )
        # Every rank has divided by the whole step's denominator, so gradients add up. By default
        # FSDP averages them.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


class ShardedWeights(TrainedWeights):
    """The trained weights of a student after `shard_layers`.

    The optimizer steps this rank's parts as plain tensors: AdamW treats every element by itself.
    """

    def __init__(self, student: Student, ranks: Ranks) -> None:
        super().__init__(student.core)
        self._student = student
        self._ranks = ranks
        self._divided = {n: p for n, p in self.named.items() if isinstance(p, DTensor)}
        place = ranks.place
        self.part = Part(index=place.index, count=place.count, divided=frozenset(self._divided))
        self._common = [p for p in self.named.values() if not isinstance(p, DTensor)]
        self.named |= {
            name: torch.nn.Parameter(_own_part(parameter))
            for name, parameter in self._divided.items()
        }

    def published(self, *, lent: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight, whole, gathered one by one. All ranks go through all of them."""
        for name, tensor in super().published(lent=lent):
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def passes(self, micros: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the micro-batches; pass nothing through as often as other ranks have more."""
        own = list(micros)
        counts_K = torch.zeros(self.part.count, device=self._ranks.device)
        counts_K[self.part.index] = len(own)
        most = int(self._ranks.add(counts_K).max())
        yield from own
        for _ in range(most - len(own)):
            self._pass_nothing()

    def add_up_gradients(self, ranks: Ranks | None) -> None:
        """Sum the gradients of what is whole on every rank; FSDP has summed the others."""
        self._ranks.add_gradients(self._common)
        for name, parameter in self._divided.items():
            own = self.named[name]
            # FSDP may have moved the part to another storage at its first pass.
            own.data = _own_part(parameter)
            own.grad = _own_part(parameter.grad)
            parameter.grad = None

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most ``max_norm``; return the norm before.

        The norm is that of the whole gradient: parts add up over the ranks, what every rank holds
        counts once.
        """
        parts = [self.named[name].grad for name in self._divided]
        squared = self._ranks.add(_squared_norm(parts))
        squared = squared + _squared_norm([parameter.grad for parameter in self._common])
        norm = squared.sqrt().to(self._common[0].dtype)
        clip_grads_with_norm_(self.named.values(), max_norm, norm)
        return norm

    def drop_gradients(self) -> None:
        super().drop_gradients()
        for parameter in self._divided.values():
            parameter.grad = None

    def _pass_nothing(self) -> None:
        """Take part in the gathers and sums of a pass, with gradients of zero."""
        student = self._student
        tokens_BT = torch.zeros((1, _EMPTY_PASS_TOKENS), dtype=torch.int64, device=student.device)
        with student.autocast():
            hidden_BTD = student.core.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        hidden_BTD.backward(torch.zeros_like(hidden_BTD))


def _squared_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    return get_total_norm([g for g in gradients if g is not None]).double().square()


@torch.no_grad()
def _own_part(tensor: Any) -> Tensor:
    """Return this rank's part of a divided tensor; both share their memory."""
    return tensor.to_local()
