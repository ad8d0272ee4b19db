"""Who samples the rollouts: what fits together, and what is refused with the reason."""

from typing import Any

import pytest
from pydantic import ValidationError

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config, dump_config
from qwen3_distill.errors import ConfigError
from tests.unit.config.test_rules import GOOD

PLAIN = {key: value for key, value in GOOD.items() if key != "replay"}
OFFLINE = {"pipeline": {"kind": "offline", "collect_steps": 2}}
TEACHER = {"rollouts": {"source": "teacher"}}
STUDENT = {"rollouts": {"source": "student"}}
MIXTURE = {"rollouts": {"source": "mixture", "teacher_share": 0.5}}
FILE = {"rollouts": {"source": "file", "file": "rollouts.parquet"}}
FILE |= {"pipeline": {"kind": "offline"}}
SAMPLED, SFT, GRPO, TOP_K, FULL = (
    {"objective": {"kind": kind}} for kind in ("sampled_reverse_kl", "sft", "grpo", "top_k", "full")
)
NO_TEACHER = {"scoring": None}
EVALUATION = {"prompts": {"kind": "task", "split": "eval"}, "verifier": {"kind": "task"}}
SGLANG = {"scoring": {"kind": "sglang", "model": "models/t"}}


def config(*changes: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = dict(PLAIN)
    for change in changes:
        values |= change
    return RunConfig.model_validate(values)


@pytest.mark.parametrize("source", [TEACHER, MIXTURE, STUDENT, FILE])
@pytest.mark.parametrize("objective", [TOP_K, FULL])
def test_divergences_learn_from_whoever_sampled(
    source: dict[str, Any], objective: dict[str, Any]
) -> None:
    assert config(source, objective).loaded_teacher is not None


@pytest.mark.parametrize("source", [TEACHER, MIXTURE])
@pytest.mark.parametrize("objective", [SAMPLED, GRPO])
def test_objectives_over_the_students_samples_refuse_the_teachers(
    source: dict[str, Any], objective: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match="expectation over the student's own samples"):
        config(source, objective)


@pytest.mark.parametrize("source", [STUDENT, MIXTURE])
def test_cross_entropy_refuses_the_students_samples(source: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected gradient of zero, so it teaches nothing"):
        config(source, SFT)


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"rollouts": {"source": "mixture"}}, TOP_K], "teacher_share=None: set teacher_share"),
    ([{"rollouts": {"teacher_share": 0.5}}], "source=student with teacher_share=0.5"),
    ([{"rollouts": {"source": "file"}} | OFFLINE], "source=file with file=None"),
    ([{"rollouts": {"file": "x.parquet"}}], "source=student with file=x.parquet"),
    ([{"rollouts": {"teacher_temperature": 0.7}}], "the teacher samples nothing"),
    ([FILE, {"pipeline": {"kind": "sequential"}}, SFT], "use pipeline.kind=offline"),
    ([FILE, {"pipeline": {"kind": "offline", "collect_steps": 3}}, SFT], "drop collect_steps"),
    ([{"pipeline": {"kind": "offline"}}], "set pipeline.collect_steps"),
    ([OFFLINE, {"objective": {"kind": "sampled_reverse_kl", "ratio_cap": None}}], "set ratio_cap"),
    ([OFFLINE, GRPO], "pipeline.kind=offline with objective.kind=grpo.*tokens after it"),
    ([OFFLINE, {"replay": GOOD["replay"]}], "both train on rollouts again"),
    ([TEACHER, TOP_K, {"replay": GOOD["replay"]}], "use pipeline.kind=offline for several epochs"),
    ([GRPO, {"replay": GOOD["replay"]}], "replay with objective.kind=grpo"),
    ([GRPO, {"verifier": None}], "objective.kind=grpo needs a `verifier` section"),
    ([GRPO, {"samples_per_prompt": 1}], "objective.kind=grpo with samples_per_prompt=1"),
    ([GRPO, {"sampling": {"temperature": 0.5}}], "sampling.temperature=0.5 with kind=grpo"),
    ([GRPO, {"sampling": {"top_p": 0.5}}], "objective.kind=grpo with sampling.top_p=0.5"),
    (
        [{"objective": {"kind": "grpo", "clip": None, "clip_high": 0.3}}],
        "clip_high=0.3 with clip=null",
    ),
    (
        [TEACHER, SFT, {"pipeline": {"kind": "streaming", "harvest": {"deadline_s": 1.0}}}],
        "pipeline.harvest with rollouts.source=teacher",
    ),
    ([NO_TEACHER], "scoring=null with objective.kind=sampled_reverse_kl"),
    ([NO_TEACHER, TEACHER, SFT], "scoring=null with rollouts.source=teacher"),
    ([NO_TEACHER, GRPO, {"evaluation": EVALUATION}], "set evaluation.teacher=false"),
    ([SGLANG, GRPO, {"evaluation": EVALUATION}], "scoring.kind=sglang would be started"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused(changes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(*changes)


def test_no_teacher_is_loaded_where_none_is_needed() -> None:
    assert config(GRPO).loaded_teacher is None
    assert config(GRPO, NO_TEACHER).loaded_teacher is None
    assert config(FILE, SFT, NO_TEACHER).loaded_teacher is None
    assert config(TEACHER, SFT).loaded_teacher is not None
    with pytest.raises(ConfigError, match="add a `scoring` section"):
        _ = config(GRPO, NO_TEACHER).teacher


@pytest.mark.parametrize("changes", [[FILE, SFT, NO_TEACHER], [MIXTURE, TOP_K], [GRPO]])
def test_a_saved_config_is_read_back(changes: list[dict[str, Any]]) -> None:
    made = config(*changes)
    assert check_config(dump_config(made)) == made


def test_a_config_of_before_has_the_student_sample() -> None:
    assert config().rollouts.source == "student"
