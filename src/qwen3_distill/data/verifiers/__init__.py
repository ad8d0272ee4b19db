"""Verifiers judge responses: right or wrong, or a reward between 0 and 1.

`build_verifier` makes the one that a config names, `check_references` finds unusable references
before a run. `number_text` reads numbers, `answer_text` finds a response's final answer,
`reference_text` reads references. What may hang runs in a process of its own (`line_process`).
"""

from qwen3_distill.data.verifiers.base import Verifier
from qwen3_distill.data.verifiers.build import build_verifier, check_references
from qwen3_distill.data.verifiers.math_equality import MathEqualityVerifier
from qwen3_distill.data.verifiers.task import ProceduralVerifier

__all__ = [
    "MathEqualityVerifier",
    "ProceduralVerifier",
    "Verifier",
    "build_verifier",
    "check_references",
]
