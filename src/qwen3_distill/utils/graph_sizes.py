"""Tells how large the CUDA graphs must be that vLLM is asked for: no vLLM is imported."""

from collections.abc import Mapping
from typing import Any

_VLLM_LARGEST = 512
"""Sequences of the largest graph that vLLM makes by itself on Hopper and on a GB10."""
_STEP = 16
"""Its sizes are multiples of this, from 256 on."""
_SIZES = frozenset({"max_cudagraph_capture_size", "cudagraph_capture_sizes"})
# With it a sequence has several tokens in a step, for which vLLM chooses sizes by itself.
_SPECULATIVE = frozenset({"speculative_config"})


def largest_graph(
    max_sequences: int, enforce_eager: bool, engine_arguments: Mapping[str, Any]
) -> int | None:
    """Return the size of the largest graph that vLLM must be asked for; None: its own suffice.

    By itself it decodes batches of more than `_VLLM_LARGEST` sequences without graphs.

    Args:
        max_sequences: sequences in flight.
        enforce_eager: whether there are no graphs at all.
        engine_arguments: further arguments of the engine, whose sizes stay as they are.
    """
    compilation = engine_arguments.get("compilation_config")
    given = {*engine_arguments, *(compilation if isinstance(compilation, dict) else ())}
    if enforce_eager or max_sequences <= _VLLM_LARGEST or given & (_SIZES | _SPECULATIVE):
        return None
    return -(-max_sequences // _STEP) * _STEP


def graphs_over_own(max_sequences: int, engine_arguments: Mapping[str, Any]) -> float:
    """Return the size of the largest graph over that of vLLM's own largest, at least 1."""
    largest = largest_graph(max_sequences, False, engine_arguments)
    return 1.0 if largest is None else largest / _VLLM_LARGEST
