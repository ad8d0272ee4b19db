"""Builds the verifier that a config names, and checks references with it."""

from qwen3_distill.config import TaskVerifier, VerifierConfig
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.data.sources import PromptSource
from qwen3_distill.data.verifiers.base import Verifier
from qwen3_distill.data.verifiers.math_equality import MathEqualityVerifier
from qwen3_distill.data.verifiers.task import ChainVerifier


def build_verifier(config: VerifierConfig) -> Verifier:
    """Build the verifier that ``config`` describes."""
    if isinstance(config, TaskVerifier):
        return ChainVerifier(ChainTask())
    return MathEqualityVerifier()


def check_references(config: VerifierConfig, source: PromptSource) -> None:
    """Check every prompt of a finite source, to find a bad reference answer before the run.

    Raises:
        DataError: a prompt has no usable reference answer.
    """
    verifier = build_verifier(config)
    for index in range(source.num_prompts or 0):
        verifier.check(source.get(index))
