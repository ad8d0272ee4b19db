"""Builds prompts, checkers and held-out problems."""

from collections.abc import Callable

from qwen3_distill.config import (
    EvaluationConfig,
    RunConfig,
    SamplingConfig,
    StudentConfig,
    VerifierConfig,
)
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.data.sources import PromptSource, build_source
from qwen3_distill.data.verifiers import build_verifier, check_references
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.types import Prompt, Rollout


def build_prompts(config: RunConfig, text: TextTools) -> PromptStream:
    """Open the training prompts, in the order of the run.

    Raises:
        DataError: one does not fit the student's context, or has no usable reference answer.
    """
    source = build_source(config.prompts)
    prompts = _stream(config.student, source, text, config.sampling, seed=config.seed)
    prompts.check()
    if config.verifier is not None:
        check_references(config.verifier, source)
    return prompts


def build_checker(verifier: VerifierConfig, text: TextTools) -> Callable[[Rollout], bool]:
    """Build the check of a rollout's text."""
    check = build_verifier(verifier)

    def is_correct(rollout: Rollout) -> bool:
        return check.correct(rollout.prompt, text.decode(rollout.response_ids.tolist()))

    return is_correct


def check_problems(student: StudentConfig, evaluation: EvaluationConfig, text: TextTools) -> None:
    """Check all held-out problems before a run, which would meet a bad one only in its middle.

    Raises:
        DataError: one does not fit the student's context, or has no usable reference answer.
    """
    source = build_source(evaluation.prompts)
    _stream(student, source, text, evaluation.sampling, seed=0).check()
    check_references(evaluation.verifier, source)


def build_problems(
    student: StudentConfig, evaluation: EvaluationConfig, text: TextTools
) -> Callable[[int], list[Prompt]]:
    """Open the held-out problems. The result gives the first ``n``, always the same ones."""
    source = build_source(evaluation.prompts)
    stream = _stream(student, source, text, evaluation.sampling, seed=0)
    available = source.num_prompts

    def problems(count: int) -> list[Prompt]:
        return stream.take(0, count if available is None else min(count, available))

    return problems


def _stream(
    student: StudentConfig,
    source: PromptSource,
    text: TextTools,
    sampling: SamplingConfig,
    *,
    seed: int,
) -> PromptStream:
    return PromptStream(
        source,
        text.tokenizer,
        seed=seed,
        context_length=load_identity(student.model, weights=False).context_length,
        max_new_tokens=sampling.max_new_tokens,
        template_arguments=student.template_arguments,
    )
