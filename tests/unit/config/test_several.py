"""Sections of several teachers and of ensembles: what is refused, and how each is named."""

import json
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config, config_differences, dump_config
from qwen3_distill.config.overrides import apply_override
from qwen3_distill.config.redaction import recordable
from qwen3_distill.config.several import as_of_one_teacher, teacher_values
from qwen3_distill.errors import ConfigError

EMBEDDED = {"kind": "embedded", "model": "models/m"}
SGLANG = {"kind": "sglang", "model": "models/c"}
ENSEMBLE = {"kind": "ensemble", "members": [EMBEDDED, SGLANG]}
SEVERAL = {"kind": "several", "by": "task", "teachers": {"math": EMBEDDED, "code": SGLANG}}
ROWS = {"kind": "jsonl", "path": "rows.jsonl", "answer_field": "answer"}
CONTEXT = {"user": "{{ prompt }}!"}
TOP_K = {"kind": "top_k", "k": 4}


def values(scoring: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {
        "output_dir": "runs/x",
        "steps": 3,
        "prompts_per_step": 2,
        "student": {"model": "models/s"},
        "prompts": ROWS,
        "generation": {"kind": "embedded"},
        "scoring": scoring,
        "training": {"kind": "embedded"},
        "objective": {"kind": "sampled_reverse_kl"},
    }
    return json.loads(json.dumps(base | changes))


def several(**changes: Any) -> dict[str, Any]:
    return SEVERAL | changes


EVALUATION = {"prompts": ROWS, "verifier": {"kind": "exact"}}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (values(several(teachers={"math": EMBEDDED})), "at least 2 items"),
    (values(several(teachers={"math": EMBEDDED, "a b": SGLANG})), "pattern"),
    (values(several(teachers={"math": EMBEDDED, "x": SEVERAL})), "'several' is not one of"),
    (values(several(weights={"math": 1.0})), "weights is for math, and teachers has code, math"),
    (
        values(several(teachers={t: {**SGLANG, "port": 30000} for t in ("math", "code")})),
        "port=30000 is given to math and code",
    ),
    (values({**ENSEMBLE, "weights": [1.0]}), "weights has 1 numbers for 2 members"),
    (values({**ENSEMBLE, "members": [EMBEDDED]}), "at least 2 items"),
    (values(SEVERAL, objective={"kind": "full"}), "every teacher has its own; use .*top_k"),
    (values(ENSEMBLE, objective={"kind": "full"}), "every teacher has its own; use .*top_k"),
    (
        values(ENSEMBLE, objective=TOP_K),
        "scoring.members.1 gives only its own most likely ones.*kind=embedded",
    ),
    (
        values(
            several(
                teachers={
                    "math": EMBEDDED,
                    "code": {
                        "kind": "ensemble",
                        "members": [EMBEDDED, {**EMBEDDED, "own_process": True}],
                    },
                }
            ),
            objective=TOP_K,
        ),
        "scoring.teachers.code.members.1 gives .*own_process=false",
    ),
    (values(ENSEMBLE, evaluation=EVALUATION), "evaluation.teacher=true with scoring.kind=ensemble"),
    (
        values(ENSEMBLE, objective={"kind": "sft"}, rollouts={"source": "teacher"}),
        "rollouts.source=teacher with scoring.kind=ensemble",
    ),
    (
        values(several(teachers={"math": {**EMBEDDED, "context": CONTEXT}, "code": SGLANG})),
        "scoring.teachers.math.context with several teachers: .*as `scoring`",
    ),
    (
        values(several(teachers={"math": EMBEDDED, "code": {**SGLANG, "tokenizer": "own"}})),
        "scoring.teachers.code.tokenizer=own with several",
    ),
    (
        values(several(teachers={"math": EMBEDDED, "code": {**EMBEDDED, "model": "student"}})),
        "scoring.teachers.code.model=student with several",
    ),
    (
        values({**ENSEMBLE, "members": [SGLANG, {**EMBEDDED, "refresh": {"kind": "never"}}]}),
        "scoring.members.1.refresh with several",
    ),
    (values(SEVERAL, prompts={"kind": "task"}), "prompts.kind=task: .*no field 'task'"),
    (
        values(SEVERAL, evaluation={"prompts": {"kind": "task"}, "verifier": {"kind": "task"}}),
        "evaluation.prompts.kind=task",
    ),
    (
        values(SEVERAL, cluster={"teachers": {"cards": 0}}),
        "cluster.teachers with scoring.kind=several: a fleet is of one teacher",
    ),
    (
        values(
            SEVERAL,
            objective={"kind": "sft"},
            rollouts={"source": "file", "file": "r.parquet"},
            pipeline={"kind": "offline"},
            evaluation=EVALUATION,
        ),
        "evaluation.teacher=true with objective.kind=sft",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(given)


@pytest.mark.parametrize("scoring", [SEVERAL, ENSEMBLE, several(weights={"math": 1, "code": 3.0})])
def test_the_sections_are_good_without_their_change(scoring: dict[str, Any]) -> None:
    config = check_config(values(scoring))
    assert check_config(dump_config(config)) == config
    assert recordable(dump_config(config))["scoring"] == dump_config(config)["scoring"]


def test_every_teacher_has_a_name_a_role_and_a_setting() -> None:
    config = check_config(values(several(teachers={"math": EMBEDDED, "code": ENSEMBLE})))
    assert [(t.name, t.role, t.setting, t.suffix) for t in config.teachers] == [
        ("math", "teacher.math", "scoring.teachers.math", "-math"),
        ("code.0", "teacher.code.0", "scoring.teachers.code.members.0", "-code-0"),
        ("code.1", "teacher.code.1", "scoring.teachers.code.members.1", "-code-1"),
    ]
    single = check_config(values(EMBEDDED))
    assert [(t.name, t.role, t.setting, t.suffix) for t in single.teachers] == [
        ("", "teacher", "scoring", "")
    ]
    assert single.tags == ()


def test_sections_are_replaced_by_name() -> None:
    config = check_config(values(several(teachers={"math": EMBEDDED, "code": ENSEMBLE})))
    changed = config.with_sections(
        {t.name: t.section.model_copy(update={"model": f"new-{t.name}"}) for t in config.teachers}
    )
    assert [t.section.model for t in changed.teachers] == ["new-math", "new-code.0", "new-code.1"]


def test_what_needs_one_teacher_says_so() -> None:
    config = check_config(values(SEVERAL))
    for ask in (lambda c: c.teacher, lambda c: c.loaded_teacher):
        with pytest.raises(ConfigError, match=r"needs one teacher, .*scoring\.teachers\.math"):
            ask(config)


def test_prompts_know_the_tags_and_a_dump_does_not_change() -> None:
    config = check_config(values(SEVERAL, evaluation=EVALUATION))
    for prompts in (config.prompts, config.evaluation and config.evaluation.prompts):
        assert getattr(prompts, "tagging", None) == ("task", ("math", "code"))
    assert "tagging" not in json.dumps(dump_config(config))
    plain = check_config(values(EMBEDDED))
    assert getattr(plain.prompts, "tagging", "absent") is None


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("scoring.urls", "scoring.urls"),
        ("scoring.teachers.math.urls", "scoring.urls"),
        ("scoring.members.1.model", "scoring.model"),
        ("scoring.teachers.code.members.0.model", "scoring.model"),
        ("scoring.teachers.math", "scoring.teachers.math"),
        ("training.tuning.rank", "training.tuning.rank"),
    ],
)
def test_a_setting_of_one_of_several_is_that_of_the_only_one(key: str, plain: str) -> None:
    assert as_of_one_teacher(key) == plain


def test_differences_name_the_member() -> None:
    old = values(ENSEMBLE)
    new = values({**ENSEMBLE, "members": [EMBEDDED, {**SGLANG, "max_in_flight": 9}]})
    assert config_differences(old, new) == ["scoring.members.1.max_in_flight: 'absent' -> 9"]


def test_overrides_reach_a_teacher_and_read_its_types() -> None:
    given = values(SEVERAL)
    apply_override(given, "scoring.teachers.code.model=models/17")
    apply_override(given, "scoring.teachers.code.max_in_flight=7")
    config: RunConfig = check_config(given)
    code = config.teachers[1].section
    assert (code.model, getattr(code, "max_in_flight", None)) == ("models/17", 7)


def test_a_misspelt_key_of_a_teacher_is_named_with_its_place() -> None:
    given = values(several(teachers={"math": {**EMBEDDED, "modle": "x"}, "code": SGLANG}))
    with pytest.raises(ConfigError, match=r"scoring\.teachers\.math\.modle: .*`model`"):
        check_config(given)


def test_unchecked_values_have_every_teacher() -> None:
    given = values(several(teachers={"math": EMBEDDED, "code": ENSEMBLE}))
    assert [setting for setting, _ in teacher_values(given)] == [
        "scoring",
        "scoring.teachers.math",
        "scoring.teachers.code",
        "scoring.teachers.code.members.0",
        "scoring.teachers.code.members.1",
    ]
    assert list(teacher_values({"scoring": None})) == []
