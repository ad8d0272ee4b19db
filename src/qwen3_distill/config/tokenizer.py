"""How a teacher reads the student's answers: in the student's tokens, or in its own."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import Schema
from qwen3_distill.config.data import refuse_template_call
from qwen3_distill.types import SampledRequest

if TYPE_CHECKING:
    from qwen3_distill.config.run import RunConfig


class TeacherTokenizer(Schema):
    """Settings of every teacher: its tokenizer and chat template."""

    tokenizer: Literal["same", "own"] = "same"
    """``same``: the teacher has the student's tokenizer and chat template, and scores the student's
    own tokens; another one is refused. ``own``: it reads the prompt in its own template and the
    answer's bytes in its own tokens, and scores spans of tokens (docs/guide/teachers.md)."""
    special_tokens: dict[str, str] = Field(default_factory=dict)
    """With ``tokenizer: own``: the student's special tokens by name, and the names of the teacher's
    that stand for them, e.g. ``{"<|im_end|>": "<|eot_id|>"}``. Left out: the end of a turn is the
    teacher's end of a turn, every other one the teacher's of the same name. ``qwen3-distill config
    check`` lists the mapping."""
    template_arguments: dict[str, bool | int | str] = Field(default_factory=dict)
    """With ``tokenizer: own``: passed to the teacher's chat template, as
    ``student.template_arguments`` to the student's."""

    @field_validator("template_arguments")
    @classmethod
    def _template_arguments_reach_template(
        cls, arguments: dict[str, bool | int | str]
    ) -> dict[str, bool | int | str]:
        return refuse_template_call(arguments)

    @model_validator(mode="after")
    def _own_settings_need_own_tokenizer(self) -> Self:
        if self.tokenizer == "own":
            return self
        for name in ("special_tokens", "template_arguments"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} with tokenizer=same: a teacher that reads the student's own tokens "
                    f"has no use for it; set tokenizer=own, or drop {name}"
                )
        return self

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the teacher reads the answers in its own tokens."""
        return self.tokenizer == "own"


def own_tokenizer_reads_the_prompt(config: "RunConfig") -> None:
    """Refuse messages besides the prompt, and the student itself, with another tokenizer.

    Raises:
        ValueError: the config has a teacher with a tokenizer of its own and one of them.
    """
    scoring = config.only_teacher
    if scoring is None or not scoring.has_own_tokenizer:
        return
    if scoring.context is not None:
        raise ValueError(
            "scoring.tokenizer=own with scoring.context: a context is rendered in the student's "
            "template and tokens, and this teacher has others; set scoring.context=null, or take a "
            "teacher with the student's tokenizer"
        )
    if scoring.refresh is not None:
        raise ValueError(
            "scoring.tokenizer=own with scoring.model=student: the student itself has the "
            "student's tokenizer; drop tokenizer=own"
        )


def own_tokenizer_has_scores_of_spans(config: "RunConfig") -> None:
    """Refuse what needs a score of every token from a teacher that scores spans.

    Raises:
        ValueError: the config has such a teacher and such a setting.
    """
    teacher = config.only_teacher
    if teacher is None or not teacher.has_own_tokenizer:
        return
    request, pipeline = config.objective.score_request, config.pipeline
    baseline = getattr(config.objective, "kl_baseline", None)
    with_baseline = "" if baseline is None else f", kl_baseline.kind={baseline.kind}"
    harvest = pipeline.kind == "streaming" and pipeline.harvest is not None
    prefix = pipeline.kind == "streaming" and pipeline.prefix is not None
    evaluates = config.evaluation is not None and config.evaluation.teacher
    reasons = {
        f"objective.kind={config.objective.kind}{with_baseline}": None
        if isinstance(request, SampledRequest)
        else "it compares with the teacher's distribution over one vocabulary, or with no score at "
        "all, and the teacher has another vocabulary; use objective.kind=sampled_reverse_kl with "
        "kl_baseline.kind=none",
        f"rollouts.source={config.rollouts.source}": None
        if config.rollouts.source == "student"
        else "the teacher's own answers and those of a file have no place among the student's "
        "tokens; use rollouts.source=student",
        "replay": None
        if config.replay is None
        else "the replay buffer keeps a score per token, and a span has one for all its tokens; "
        "set replay=null",
        f"pipeline.kind={pipeline.kind}": None
        if pipeline.kind != "offline"
        else "collected files keep a score per token, and a span has one for all its tokens; use "
        "pipeline.kind=sequential or streaming",
        "pipeline.harvest": "a piece of an answer may end within one of the teacher's tokens; drop "
        "it"
        if harvest
        else None,
        "pipeline.prefix": "a piece of an answer may end within one of the teacher's tokens; drop "
        "it"
        if prefix
        else None,
        "evaluation.teacher=true": "the teacher would be asked the student's tokens; set "
        "evaluation.teacher=false, and evaluate the teacher by itself"
        if evaluates
        else None,
    }
    for setting, reason in reasons.items():
        if reason is not None:
            raise ValueError(f"scoring.tokenizer=own with {setting}: {reason}")


TOKENIZER_RULES: tuple[Callable[["RunConfig"], None], ...] = (
    own_tokenizer_reads_the_prompt,
    own_tokenizer_has_scores_of_spans,
)
