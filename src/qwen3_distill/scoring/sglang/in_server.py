"""Adjusts the processes of an SGLang server, as functions for its interface of plugins.

This file is copied for the server (`plugin`), whose environment need not have this package: it
imports nothing but what every SGLang has.
"""

import gc
import importlib
import multiprocessing
from typing import Any, NamedTuple

THRESHOLDS = (50_000, 20, 100)
"""Objects made before the youngest generation is collected, and collections of one generation
before the next is."""
BLOCK = 128
"""Columns of a block. The vocabularies of Qwen3, Qwen2.5 and Llama 3 are multiples of it."""
_MAX_SHARE = 4  # blocks are not worth two selections if a quarter of them is kept


class Selected(NamedTuple):
    """Holds what `torch.topk` returns."""

    values: Any
    indices: Any


class Rows:
    """Selects the largest of every row by blocks; everything else is the tensor's own."""

    def __init__(self, values_RV: Any) -> None:
        self._values_RV = values_RV

    def __getattr__(self, name: str) -> Any:
        return getattr(self._values_RV, name)

    def topk(self, k: int, dim: int = -1) -> Any:
        """Return values and columns of the k largest of every row, in descending order.

        The k largest lie in the k blocks with the largest maxima, so a selection among the
        maxima and one among k blocks do for one over the whole vocabulary. Of equal values others
        may be named than `torch.topk` would, which promises none either.
        """
        values_RV = self._values_RV
        size = values_RV.shape[-1]
        is_by_row = values_RV.dim() == 2 and dim in (1, -1)
        if not is_by_row or size % BLOCK or size < k * BLOCK * _MAX_SHARE:
            return values_RV.topk(k, dim=dim)
        blocks_RCB = values_RV.unflatten(-1, (size // BLOCK, BLOCK))  # also of no rows
        block_RK = blocks_RCB.amax(dim=-1).topk(k, dim=-1).indices
        kept_RKB = blocks_RCB.gather(1, block_RK.unsqueeze(-1).expand(-1, -1, BLOCK))
        values_RK, place_RK = kept_RKB.flatten(1).topk(k, dim=-1)
        return Selected(values_RK, block_RK.gather(1, place_RK // BLOCK) * BLOCK + place_RK % BLOCK)


def collect_rarely() -> None:
    """Let the garbage collection of this process begin rarely."""
    gc.set_threshold(*THRESHOLDS)
    _say(f"garbage collection: thresholds {gc.get_threshold()}")


def select_by_blocks() -> None:
    """Let SGLang find the candidates of every place by blocks of the vocabulary."""
    if multiprocessing.parent_process() is None:
        return  # the process that answers requests has no logits, and would import the model's code
    hooks: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    target = "sglang.srt.layers.logprob_processor.get_top_logprobs_chunk"
    hooks.HookRegistry.register(target, _with_rows, hooks.HookType.BEFORE)
    _say("candidates: selected by blocks")


def _with_rows(logprobs: Any, *rest: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (Rows(logprobs), *rest), named


def _say(what: str) -> None:
    # Not through logging: SGLang sets that up later.
    print(what, "in", multiprocessing.current_process().name, flush=True)  # noqa: T201
