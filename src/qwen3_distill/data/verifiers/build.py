"""Builds the verifier that a config names, and checks references with it."""

from qwen3_distill.config import (
    ChoiceVerifier,
    ExactVerifier,
    MathVerifier,
    PythonVerifier,
    RegexVerifier,
    TaskVerifier,
    VerifierConfig,
)
from qwen3_distill.data.sources import PromptSource
from qwen3_distill.data.tasks import TASKS
from qwen3_distill.data.verifiers.base import Verifier
from qwen3_distill.data.verifiers.math_equality import MathEqualityVerifier
from qwen3_distill.data.verifiers.python_function import PythonFunctionVerifier
from qwen3_distill.data.verifiers.task import ProceduralVerifier
from qwen3_distill.data.verifiers.text_match import (
    ChoiceLetterVerifier,
    ExactTextVerifier,
    RegexGroupVerifier,
)


def build_verifier(config: VerifierConfig) -> Verifier:
    """Build the verifier that ``config`` describes."""
    match config:
        case TaskVerifier():
            return ProceduralVerifier(TASKS[config.task])
        case MathVerifier():
            return MathEqualityVerifier()
        case ExactVerifier():
            return ExactTextVerifier(config)
        case ChoiceVerifier():
            return ChoiceLetterVerifier(config)
        case RegexVerifier():
            return RegexGroupVerifier(config)
        case PythonVerifier():
            return PythonFunctionVerifier(config)


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
