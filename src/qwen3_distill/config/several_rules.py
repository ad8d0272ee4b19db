"""Rules between the sections of a `RunConfig` that has several teachers, one function each."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from qwen3_distill.config.objective import candidates_per_token, needs_hidden_states
from qwen3_distill.config.self_teacher import STUDENT
from qwen3_distill.config.several import EnsembleScoring, NamedTeacher, SeveralScoring

if TYPE_CHECKING:
    from qwen3_distill.config.run import RunConfig


def several_teachers_have_no_common_head(config: "RunConfig") -> None:
    objective, scoring = config.objective, config.scoring
    is_one = not isinstance(scoring, SeveralScoring | EnsembleScoring)
    if is_one or not needs_hidden_states(objective):
        return
    raise ValueError(
        f"objective.kind={objective.kind} over the full vocabulary with "
        f"scoring.kind={scoring.kind}: the learner rebuilds the distribution with the output head "
        "of one teacher, and every teacher has its own; use objective.kind=top_k, or "
        "objective.kl_baseline.kind=top_k or none"
    )


def ensembles_average_what_they_know(config: "RunConfig") -> None:
    """Candidates are averaged exactly only where every member's whole distribution is at hand."""
    if not candidates_per_token(config.objective):
        return
    for setting, members in _ensembles(config).items():
        for member in members:
            section = member.section
            if section.kind == "embedded" and not section.own_process:
                continue
            change = "own_process=false" if section.kind == "embedded" else "kind=embedded"
            raise ValueError(
                f"objective.kind={config.objective.kind} asks for the most likely tokens of an "
                f"ensemble, and {member.setting} gives only its own most likely ones: for the "
                "others' candidates its logprobs are not known, so there is no mean. Use "
                f"{change} for all members of {setting}, or an objective over the sampled token"
            )


def ensembles_sample_nothing(config: "RunConfig") -> None:
    ensembles = _ensembles(config)
    if not ensembles:
        return
    setting = next(iter(ensembles))
    if "teacher" in config.rollouts.samplers:
        raise ValueError(
            f"rollouts.source={config.rollouts.source} with {setting}.kind=ensemble: a mean of "
            "several models is not sampled from; use rollouts.source=student, or one teacher"
        )
    if config.evaluation is not None and config.evaluation.teacher:
        raise ValueError(
            f"evaluation.teacher=true with {setting}.kind=ensemble: a mean of several models is "
            "not sampled from, so it has no accuracy; set evaluation.teacher=false"
        )


def _ensembles(config: "RunConfig") -> dict[str, list[NamedTeacher]]:
    """Return the members of every ensemble, by its setting."""
    found: dict[str, list[NamedTeacher]] = {}
    for teacher in config.teachers:
        setting, _, is_member = teacher.setting.partition(".members.")
        if is_member:
            found.setdefault(setting, []).append(teacher)
    return found


def several_teachers_read_the_students_tokens(config: "RunConfig") -> None:
    """Refuse what only a single teacher can have: other tokens to read, or the student's weights.

    Raises:
        ValueError: one of several teachers has such a setting.
    """
    for teacher in config.teachers if config.only_teacher is None else ():
        section, setting = teacher.section, teacher.setting
        given = {
            f"{setting}.context": section.context is not None,
            f"{setting}.tokenizer=own": section.has_own_tokenizer,
            f"{setting}.model={STUDENT}": section.model == STUDENT,
            f"{setting}.refresh": section.refresh is not None,
        }
        for name, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"{name} with several teachers: each of them reads the student's own tokens "
                    "and keeps its own weights; drop it, or make this teacher the only one, as "
                    "`scoring`"
                )


def several_teachers_need_tagged_rows(config: "RunConfig") -> None:
    scoring, evaluation = config.scoring, config.evaluation
    if not isinstance(scoring, SeveralScoring):
        return
    sections = {"prompts": config.prompts}
    if evaluation is not None:
        sections["evaluation.prompts"] = evaluation.prompts
    for name, prompts in sections.items():
        if prompts.kind == "task":
            raise ValueError(
                f"scoring.kind=several with {name}.kind=task: a procedural task's problems have no "
                f"field {scoring.by!r} that names a teacher; write them to a file whose rows have "
                "it, and use kind=jsonl"
            )


def cluster_teachers_are_one_teacher(config: "RunConfig") -> None:
    scoring, cluster = config.scoring, config.cluster
    if cluster is None or cluster.teachers is None:
        return
    if isinstance(scoring, SeveralScoring | EnsembleScoring):
        raise ValueError(
            f"cluster.teachers with scoring.kind={scoring.kind}: a fleet is of one teacher. Drop "
            "cluster.teachers, so that all run on this machine, or start servers elsewhere and "
            "name them in each teacher's urls"
        )


SEVERAL_RULES: tuple[Callable[["RunConfig"], None], ...] = (
    several_teachers_read_the_students_tokens,
    several_teachers_have_no_common_head,
    ensembles_average_what_they_know,
    ensembles_sample_nothing,
    several_teachers_need_tagged_rows,
    cluster_teachers_are_one_teacher,
)
