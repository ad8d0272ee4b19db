"""The teacher's context and a student that is its own teacher: what a config may say of them."""

from typing import Any

import pytest

from qwen3_distill.config import ContextConfig, NeverRefreshed, RunConfig
from qwen3_distill.config.load import check_config, dump_config
from qwen3_distill.errors import ConfigError

GOOD: dict[str, Any] = {
    "output_dir": "runs/x",
    "steps": 3,
    "prompts_per_step": 2,
    "student": {"model": "models/s"},
    "prompts": {"kind": "task"},
    "generation": {"kind": "embedded"},
    "scoring": {"kind": "embedded", "model": "student"},
    "training": {"kind": "embedded", "optimizer": {"betas": [0.9, 0.99]}},
    "objective": {"kind": "sampled_reverse_kl"},
}
EVERY = {"kind": "every", "steps": 5}
EMA = {"kind": "ema", "decay": 0.99}
MIXTURE = {
    "objective": {"kind": "full"},
    "rollouts": {"source": "mixture", "teacher_share": 0.5},
}
TOLD = {"user": "{{ prompt }} {{ row.answer }}"}


def config(changes: dict[str, Any] | None = None, **scoring: Any) -> RunConfig:
    values = {**GOOD, **(changes or {})}
    return check_config({**values, "scoring": {**values["scoring"], **scoring}})


def refused(words: str, changes: dict[str, Any] | None = None, **scoring: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        config(changes, **scoring)


def test_the_student_as_teacher_has_the_students_model_and_is_never_refreshed() -> None:
    scoring = config().teacher
    assert scoring.model == "models/s"
    assert scoring.refresh == NeverRefreshed(kind="never")
    assert config(refresh=EVERY).teacher.refresh.steps == 5  # type: ignore[union-attr]


def test_a_resolved_config_reads_as_itself() -> None:
    first = config(refresh=EMA, context={**TOLD, "examples": [{"user": "a", "assistant": "b"}]})
    assert check_config(dump_config(first)) == first


def test_another_teacher_is_not_the_student() -> None:
    assert config(model="models/t").teacher.refresh is None
    assert config(model="./student").teacher.model == "./student"
    assert config(model="./student").teacher.refresh is None
    refused(
        r"refresh with scoring.model=models/t.*student is models/s; set scoring.model=student",
        model="models/t",
        refresh=EMA,
    )


@pytest.mark.parametrize("refresh", [EVERY, EMA], ids=["every", "ema"])
def test_a_teacher_that_follows_needs_weights_that_reach_it(refresh: dict[str, Any]) -> None:
    kind = refresh["kind"]
    refused(
        rf"refresh.kind={kind} with scoring.kind=sglang: a server does not give the weights in use",
        kind="sglang",
        refresh=refresh,
    )
    refused(rf"kind={kind} needs the teacher in the run's own", own_process=True, refresh=refresh)
    vllm = {"generation": {"kind": "vllm", "full_weights": "auto"}}
    refused(rf"kind={kind} with .*full_weights=auto.*CUDA IPC", vllm, refresh=refresh)
    lora = {"training": {"kind": "embedded", "tuning": {"kind": "lora"}}}
    directory = {"kind": "vllm", "full_weights": "directory"}
    refused("adapters=swap", {**lora, "generation": directory}, refresh=refresh)
    merged = directory | {"adapters": "merge"}
    assert config({**lora, "generation": merged}, refresh=refresh).teacher.refresh
    assert config({"generation": directory}, refresh=refresh).teacher.refresh
    offline = {"pipeline": {"kind": "offline", "collect_steps": 2}}
    refused(rf"kind={kind} with pipeline.kind=offline", offline, refresh=refresh)
    assert config(offline).teacher.refresh
    streaming = {"objective": {"kind": "full"}, "pipeline": {"kind": "streaming"}}
    refused("would meet its output head after it", streaming, refresh=refresh)
    assert config({"objective": {"kind": "full"}}, refresh=refresh).teacher.refresh
    refused(rf"kind={kind} with rollouts.source=mixture: only a student", MIXTURE, refresh=refresh)


def test_a_server_may_be_the_student_of_the_start() -> None:
    assert config(kind="sglang").teacher.model == "models/s"


def test_a_context_needs_a_teacher_that_scores_and_does_not_sample() -> None:
    refused(
        r"scoring.context with objective.kind=sft: nothing is scored",
        {"objective": {"kind": "sft"}, "rollouts": {"source": "teacher"}},
        context=TOLD,
    )
    refused(
        r"scoring.context with rollouts.source=mixture: the teacher samples",
        MIXTURE,
        context=TOLD,
    )


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({}, "neither system, examples nor user"),
        ({"user": "{{ prompt"}, r"scoring.context.user: a Jinja template with a syntax error in l"),
        ({"user": "a\n{% if %}"}, "syntax error in line 2"),
        ({"user": "{{ hint }}"}, r"reads hint; it may read prompt.*row\.hint"),
        ({"system": "{{ promt }}"}, r"context.system: .*reads promt"),
        ({"examples": [{"user": "a", "assistant": "{{ b }}"}]}, "assistant: .*reads b"),
        ({"user": ""}, "at least 1 character"),
        ({"usr": "a"}, "did you mean `user`"),
        ({"user": "a", "compare_every_steps": 0}, "compare_every_steps"),
    ],
)
def test_a_context_that_cannot_be_rendered_is_refused(context: dict[str, Any], words: str) -> None:
    refused(words, context=context)


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("{{ prompt }}", set()),
        ("{{ row.a }} {{ row['b c'] }} {{ row.d.e }}", {"a", "b c", "d"}),
        ("{% for x in row.list %}{{ x }}{% endfor %}", {"list"}),
        ("{{ row[prompt] }}", None),
        ("{% for name in row %}{{ name }}{% endfor %}", None),
    ],
)
def test_a_context_knows_which_fields_of_the_row_it_reads(
    template: str, fields: set[str] | None
) -> None:
    assert ContextConfig(user=template, system="{{ prompt }}").row_fields == fields


@pytest.mark.parametrize("refresh", [{"kind": "ema", "decay": 1.0}, {"kind": "every", "steps": 0}])
def test_a_refresh_that_never_comes_is_refused(refresh: dict[str, Any]) -> None:
    refused("refresh", refresh=refresh)
