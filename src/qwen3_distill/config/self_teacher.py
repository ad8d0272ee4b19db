"""The student as its own teacher, and the rules of a teacher's context and refresh."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qwen3_distill.config.objective import needs_hidden_states

if TYPE_CHECKING:
    from qwen3_distill.config.run import RunConfig

STUDENT = "student"
"""Value of ``scoring.model`` that makes the student its own teacher."""


def with_student_as_teacher(values: Any) -> Any:
    """Replace ``scoring.model=student`` by the student's own model, and set `refresh` with it.

    Args:
        values: a run's raw values; of another form, they are returned and refused later.
    """
    if not isinstance(values, Mapping):
        return values
    scoring, student = values.get("scoring"), values.get("student")
    if not isinstance(scoring, Mapping) or scoring.get("model") != STUDENT:
        return values
    if not isinstance(student, Mapping) or not isinstance(student.get("model"), str):
        return values
    refresh = scoring.get("refresh") or {"kind": "never"}
    return {**values, "scoring": {**scoring, "model": student["model"], "refresh": refresh}}


def refresh_names_the_student(config: "RunConfig") -> None:
    scoring = config.only_teacher
    if scoring is None or scoring.refresh is None or scoring.model == config.student.model:
        return
    raise ValueError(
        f"scoring.refresh with scoring.model={scoring.model}: only a teacher that is the student "
        f"itself follows it, and the student is {config.student.model}; set scoring.model=student, "
        "or scoring.refresh=null"
    )


def refresh_follows_a_student_in_reach(config: "RunConfig") -> None:
    """Refuse what cannot take the student's weights, bit for bit, between two steps."""
    scoring, generation = config.only_teacher, config.generation
    if scoring is None or scoring.refresh is None or scoring.refresh.kind == "never":
        return
    what = f"scoring.refresh.kind={scoring.refresh.kind}"
    if scoring.kind != "embedded":
        raise ValueError(
            f"{what} with scoring.kind={scoring.kind}: a server does not give the weights in use "
            "back, so that nobody could see that it scores with the new ones; use "
            "scoring.kind=embedded, or scoring.refresh={kind: never}"
        )
    if scoring.own_process or config.cluster is not None:
        raise ValueError(
            f"{what} needs the teacher in the run's own process, where its weights are a part of "
            "the run's state; set scoring.own_process=false and drop `cluster`"
        )
    if generation.kind != "vllm":
        return
    if generation.adapters == "swap" and config.training.tuning.kind == "lora":
        raise ValueError(
            f"{what} with generation.adapters=swap: the learner publishes adapters alone, and the "
            "teacher takes whole weights; use generation.adapters=merge"
        )
    if generation.full_weights != "directory":
        raise ValueError(
            f"{what} with generation.full_weights={generation.full_weights}: weights that are sent "
            "by CUDA IPC reach the rollout engine alone; use generation.full_weights=directory"
        )


def refresh_fits_the_pipeline(config: "RunConfig") -> None:
    scoring, pipeline = config.only_teacher, config.pipeline
    if scoring is None or scoring.refresh is None or scoring.refresh.kind == "never":
        return
    what = f"scoring.refresh.kind={scoring.refresh.kind}"
    if config.rollouts.source != "student":
        raise ValueError(
            f"{what} with rollouts.source={config.rollouts.source}: only a student that samples "
            "publishes its weights at every step, and what samples the teacher's answers does not "
            "follow; use rollouts.source=student, or scoring.refresh={kind: never}"
        )
    if pipeline.kind == "offline":
        raise ValueError(
            f"{what} with pipeline.kind=offline: rollouts are scored once, before the first step; "
            "use scoring.refresh={kind: never}, or another pipeline.kind"
        )
    if needs_hidden_states(config.objective) and pipeline.kind != "sequential":
        raise ValueError(
            f"{what} with objective.kind={config.objective.kind} over the full vocabulary and "
            f"pipeline.kind={pipeline.kind}: hidden states of the teacher before a refresh would "
            "meet its output head after it; use pipeline.kind=sequential, or objective.kind=top_k"
        )


def context_is_read_by_a_scoring_teacher(config: "RunConfig") -> None:
    scoring = config.only_teacher
    if scoring is None or scoring.context is None:
        return
    if config.objective.score_request is None:
        raise ValueError(
            f"scoring.context with objective.kind={config.objective.kind}: nothing is scored, so "
            "that the teacher reads no context; drop it, or use another objective.kind"
        )
    if "teacher" in config.rollouts.samplers:
        raise ValueError(
            f"scoring.context with rollouts.source={config.rollouts.source}: the teacher samples "
            "its answers to the student's prompt, without its context; use rollouts.source=student"
        )


TEACHER_RULES: tuple[Callable[["RunConfig"], None], ...] = (
    refresh_names_the_student,
    refresh_follows_a_student_in_reach,
    refresh_fits_the_pipeline,
    context_is_read_by_a_scoring_teacher,
)
