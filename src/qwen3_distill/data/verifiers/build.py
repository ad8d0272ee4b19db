"""Builds the verifier that a config names, and checks references with it."""

from qwen3_distill.config import (
    ChoiceVerifier,
    ExactVerifier,
    PythonVerifier,
    RegexVerifier,
    TaskVerifier,
    VerifierConfig,
)
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.data.sources import PromptSource
from qwen3_distill.data.verifiers.base import Verifier
from qwen3_distill.data.verifiers.math_equality import MathEqualityVerifier
from qwen3_distill.data.verifiers.python_function import PythonFunctionVerifier
from qwen3_distill.data.verifiers.task import ChainVerifier
from qwen3_distill.data.verifiers.text_match import (
    ChoiceLetterVerifier,
    ExactTextVerifier,
    RegexGroupVerifier,
)


def build_verifier(config: VerifierConfig) -> Verifier:
    """Build the verifier that ``config`` describes."""
    if isinstance(config, TaskVerifier):
        return ChainVerifier(ChainTask())
    if isinstance(config, ExactVerifier):
        return ExactTextVerifier(config)
    if isinstance(config, ChoiceVerifier):
        return ChoiceLetterVerifier(config)
    if isinstance(config, RegexVerifier):
        return RegexGroupVerifier(config)
    if isinstance(config, PythonVerifier):
        return PythonFunctionVerifier(config)
    return MathEqualityVerifier()


def check_references(config: VerifierConfig, source: PromptSource) -> None:
    """Check every prompt of a finite source, to find a bad reference answer before the run.

    Raises:
        DataError: a prompt has no usable reference answer, or a function cannot be used.
    """
    verifier = build_verifier(config)
    if isinstance(verifier, PythonFunctionVerifier):  # an endless source has no prompt to check
        verifier.start()
    for index in range(source.num_prompts or 0):
        verifier.check(source.get(index))
