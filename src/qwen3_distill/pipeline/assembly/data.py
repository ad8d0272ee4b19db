"""Builds prompts, checkers and held-out problems."""

from collections.abc import Callable, Mapping

from qwen3_distill.config import (
    EvaluationConfig,
    PromptsConfig,
    RunConfig,
    SamplingConfig,
    ScoringConfig,
    StudentConfig,
    TaskPrompts,
    VerifierConfig,
)
from qwen3_distill.data.overlap import Overlap, find_overlap
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.data.sources import PromptSource, build_source
from qwen3_distill.data.teacher_context import TeacherContext
from qwen3_distill.data.verifiers import build_verifier, check_references
from qwen3_distill.modeling.loading import load_identity, load_tokenizer
from qwen3_distill.pipeline.parts import DataRecord, TextTools
from qwen3_distill.types import Prompt, Rollout


def build_prompts(config: RunConfig, text: TextTools) -> PromptStream:
    """Open the training prompts, in the order of the run.

    Raises:
        DataError: one does not fit the student's context, or has no usable reference answer.
    """
    prompts = build_training_stream(config, text)
    prompts.check()
    if config.verifier is not None:
        check_references(config.verifier, prompts.source)
    return prompts


def build_training_stream(config: RunConfig, text: TextTools) -> PromptStream:
    """Open the training prompts, with the teacher's context if it has one; nothing is checked.

    Raises:
        DataError: they cannot be read, or none is left.
    """
    return build_stream(
        config.student,
        config.prompts,
        text,
        config.sampling,
        seed=config.seed,
        scoring=config.only_teacher,
        tag_weights=config.tag_weights,
    )


def data_record(
    config: RunConfig, prompts: PromptStream, problems: PromptStream | None
) -> DataRecord:
    """Count what a run trains on and is evaluated on, with what the user should know."""
    counts = {"prompts": _counts(prompts)}
    notes = list(prompts.notes)
    if problems is not None and config.evaluation is not None:
        counts["evaluation.prompts"] = _counts(problems)
        notes += [f"evaluation: {note}" for note in problems.notes]
        overlap = overlap_of(config, prompts.source, problems.source)
        counts["evaluation.prompts"]["also_in_training"] = overlap.num_shared if overlap else 0
        notes += [str(overlap)] if overlap else []
    return DataRecord(counts=counts, notes=tuple(notes))


def overlap_of(config: RunConfig, training: PromptSource, held_out: PromptSource) -> Overlap | None:
    """Find the problems of a config's evaluation that are training prompts, too."""
    evaluation = config.evaluation
    if evaluation is None:
        return None
    return find_overlap(
        training,
        held_out,
        num_problems=max(evaluation.num_problems, evaluation.final_num_problems or 0),
        training_suffix=getattr(config.prompts, "suffix", ""),
        held_out_suffix=getattr(evaluation.prompts, "suffix", ""),
    )


def _counts(prompts: PromptStream) -> dict[str, int | None]:
    return {"used": prompts.source.num_prompts, "dropped_too_long": prompts.num_dropped}


def build_checker(verifier: VerifierConfig, text: TextTools) -> Callable[[Rollout], float]:
    """Build the check of a rollout's text: it gives a bool, or a reward in [0, 1]."""
    check = build_verifier(verifier)

    def is_correct(rollout: Rollout) -> float:
        return check.correct(rollout.prompt, text.decode(rollout.response_ids.tolist()))

    return is_correct


def check_problems(
    student: StudentConfig, evaluation: EvaluationConfig, text: TextTools
) -> PromptStream:
    """Open and check all held-out problems: a run would meet a bad one only in its middle.

    Raises:
        DataError: one does not fit the student's context, or has no usable reference answer.
    """
    problems = build_stream(student, evaluation.prompts, text, evaluation.sampling, seed=0)
    problems.check()
    check_references(evaluation.verifier, problems.source)
    return problems


def build_problems(
    student: StudentConfig, evaluation: EvaluationConfig, text: TextTools
) -> Callable[[int], list[Prompt]]:
    """Open the held-out problems. The result gives the first ``n``, always the same ones."""
    stream = build_stream(student, evaluation.prompts, text, evaluation.sampling, seed=0)
    available = stream.source.num_prompts

    def problems(count: int) -> list[Prompt]:
        return stream.take(0, count if available is None else min(count, available))

    return problems


def build_stream(
    student: StudentConfig,
    prompts: PromptsConfig,
    text: TextTools,
    sampling: SamplingConfig,
    *,
    seed: int,
    scoring: ScoringConfig | None = None,
    tag_weights: Mapping[str, float] | None = None,
) -> PromptStream:
    """Open prompts in the order of a seed, without those that are too long if they are dropped.

    Args:
        scoring: the teacher, whose context is rendered with the prompts; None: they have none.
        tag_weights: see `PromptStream`.

    Raises:
        DataError: they cannot be read, or none is left.
    """
    stream = PromptStream(
        build_source(prompts, None if scoring is None else scoring.context),
        text.tokenizer,
        seed=seed,
        context_length=load_identity(student.model, weights=False).context_length,
        max_new_tokens=sampling.max_new_tokens,
        template_arguments=student.template_arguments,
        context=build_context(student, scoring),
        tag_weights=tag_weights,
    )
    if not isinstance(prompts, TaskPrompts) and prompts.too_long == "drop":
        stream.drop_too_long()
    return stream


def teacher_context_length(scoring: ScoringConfig) -> int:
    """Return the teacher's positions: those of its model, or fewer where its server is told so."""
    positions = load_identity(scoring.model, weights=False).context_length
    stated = scoring.max_model_tokens if scoring.kind == "vllm" else None
    return positions if stated is None else min(stated, positions)


def build_context(student: StudentConfig, scoring: ScoringConfig | None) -> TeacherContext | None:
    """Build what renders the teacher's context of a prompt; None if it reads the prompt itself."""
    if scoring is None or scoring.context is None:
        return None
    return TeacherContext(
        scoring.context,
        load_tokenizer(scoring.model, weights=False),
        context_length=teacher_context_length(scoring),
        template_arguments=student.template_arguments,
    )
