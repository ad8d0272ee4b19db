"""Rules of `objective.support: student` between the sections of a `RunConfig`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3_distill.config.run import RunConfig

_SERVED = {
    "sglang": "SGLang scores one list of tokens at all positions (token_ids_logprob), and these "
    "differ from position to position",
    "vllm": "vLLM gives its own most likely tokens and the prompt's (prompt_logprobs), never those "
    "of a list",
}


def given_candidates_need_an_embedded_teacher(config: "RunConfig") -> None:
    if not config.objective.student_candidates:
        return
    for teacher in config.teachers:
        kind = teacher.section.kind
        if kind != "embedded":
            raise ValueError(
                f"objective.support=student with {teacher.setting}.kind={kind}: {_SERVED[kind]}. "
                "Use objective.support=teacher, or scoring.kind=embedded"
            )
        if teacher.section.has_own_tokenizer:
            raise ValueError(
                f"objective.support=student with {teacher.setting}.tokenizer=own: the student's "
                "tokens are none of the teacher's; use objective.kind=sampled_reverse_kl"
            )


def the_student_chooses_candidates_while_it_samples(config: "RunConfig") -> None:
    if not config.objective.student_candidates:
        return
    source = config.rollouts.source
    if source != "student":
        raise ValueError(
            f"objective.support=student with rollouts.source={source}: its most likely tokens are "
            "known only where the student itself sampled; use rollouts.source=student, or "
            "objective.support=teacher"
        )
    if config.pipeline.kind == "offline":
        raise ValueError(
            "objective.support=student with pipeline.kind=offline: collected files hold rollouts "
            "without their candidates; use pipeline.kind=sequential or streaming, or "
            "objective.support=teacher"
        )


STUDENT_SUPPORT_RULES: tuple[Callable[["RunConfig"], None], ...] = (
    given_candidates_need_an_embedded_teacher,
    the_student_chooses_candidates_while_it_samples,
)
