"""Differences in nats that rounding explains, by precision. More is a fault.

All are means over a sample's tokens: single tokens may be further apart.
"""

from qwen3_distill.config import RunConfig
from qwen3_distill.pipeline.assembly.machine_checks import quantization_of
from qwen3_distill.planning.gpu import detect_gpu

FLOAT32_NATS = 2e-3
"""On a CPU 1e-4 is usual."""
BFLOAT16_NATS = 0.1
"""Also for float32 on a GPU, where kernels round more and add up in any order."""
FP8_NATS = 0.5
QUANTIZED_NOTICEABLE_NATS = 0.2
"""Between FP8 and bfloat16; 0.04 was measured for a trained teacher (docs/measured/fp8.md)."""
QUANTIZED_BROKEN_NATS = 1.0


def engine_tolerance_nats(config: RunConfig) -> float:
    """Return how far learner and rollout engine may be apart."""
    if getattr(config.generation, "quantization", None) is not None:
        return FP8_NATS
    return _of(config.generation.dtype, config.training.dtype)


def teacher_tolerance_nats(config: RunConfig) -> float:
    """Return how far two scores of the same tokens may be apart."""
    if quantization_of(config) is not None:
        return FP8_NATS
    return _of(*(teacher.section.dtype for teacher in config.teachers))


def _of(*dtypes: str) -> float:
    exact = all(dtype == "float32" for dtype in dtypes) and detect_gpu() is None
    return FLOAT32_NATS if exact else BFLOAT16_NATS
