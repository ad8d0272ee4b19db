"""The schema and what leads to it: files, overrides, dumps, comparisons."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    EmbeddedTraining,
    RunConfig,
    SglangScoring,
    UnslothTraining,
    VllmGeneration,
)
from qwen3_distill.config.load import (
    check_config,
    config_differences,
    dump_config,
    load_config,
    load_values,
)
from qwen3_distill.errors import ConfigError

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

SCORING = {"kind": "sglang", "model": "m"}
UNION_ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"objective": {"kind": "top_k", "k": 1, "tail": "renormalize"}}, ["objective: k=1 with"]),
    ({"objective": {"kind": "top_k", "k": "x"}}, ["objective.k: input should"]),
    ({"objective": {"kind": "top_k", "top_k": 3}}, ["objective.top_k: unknown key; known keys"]),
    ({"objective": {"kind": "jsd"}}, ["objective.kind: 'jsd' is not one of"]),
    ({"objective": {"k": 3}}, ["objective: needs a `kind`"]),
    (
        {"objective": {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "top_k", "top_k": 1}}},
        ["objective.kl_baseline.top_k: unknown key; known keys here: k, kind"],
    ),
    (
        {"logging": {"trackers": [{"kind": "wandb", "wandb": 1}]}},
        ["logging.trackers.0.project: missing", "logging.trackers.0.wandb: unknown key"],
    ),
    (
        {"training": {"kind": "embedded", "tuning": {"kind": "lora", "lora": 1}}},
        ["training.tuning.lora: unknown key"],
    ),
    ({"prompts": {"kind": "task", "task": "x"}}, ["prompts.task: input should be 'chain'"]),
    ({"generation": {"kind": "vllm", "engine_arguments": {"seed": 1}}}, ["generation: engine_arg"]),
    ({"generation": {"kind": "vllm", "environment": {"kind": 1}}}, ["generation.environment: "]),
    ({"scoring": SCORING | {"urls": ["x"]}}, ["scoring: urls: 'x' is no address"]),
    ({"scoring": SCORING | {"urls": [1]}}, ["scoring.urls.0: input should be a valid string"]),
    (
        {"scoring": SCORING | {"server_arguments": {"sglang": [1]}}},
        [f"scoring.server_arguments.sglang: input should be a valid {t}; got [1] (list)"
         for t in ("boolean", "integer", "number", "string")],
    ),
    (
        {"training": {"kind": "unsloth", "packing": "x"}},
        ["training.packing: input should be a valid boolean", "training.packing: input should be"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), UNION_ERRORS)
def test_an_error_names_keys_of_the_file_and_no_tag_of_a_union(
    change: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(yaml.safe_load(MINIMAL) | change)
    lines = str(caught.value).removeprefix("config: ").splitlines()
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.strip().startswith(start)


INTERPRETERS = [
    (EmbeddedGeneration, {"kind": "embedded"}, None),
    (VllmGeneration, {"kind": "vllm"}, None),
    (VllmGeneration, {"kind": "vllm", "python": "p"}, "p"),
    (EmbeddedScoring, {"kind": "embedded", "model": "m"}, None),
    (SglangScoring, {"kind": "sglang", "model": "m", "python": "p"}, "p"),
    (EmbeddedTraining, {"kind": "embedded"}, None),
    (UnslothTraining, {"kind": "unsloth", "python": "p"}, "p"),
]


@pytest.mark.parametrize(("section", "values", "expected"), INTERPRETERS)
def test_every_engine_states_its_interpreter(
    section: type[Any], values: dict[str, str], expected: str | None
) -> None:
    assert section(**values).interpreter == expected


def test_every_teacher_states_its_cache_folder() -> None:
    assert EmbeddedScoring(kind="embedded", model="m").cache_folder is None
    assert SglangScoring(kind="sglang", model="m").cache_folder is None
    assert SglangScoring(kind="sglang", model="m", cache="c").cache_folder == Path("c")


MINIMAL = """
output_dir: runs/x
steps: 3
prompts_per_step: 2
student: {model: models/s}
prompts: {kind: task}
generation: {kind: embedded}
scoring: {kind: embedded, model: models/t}
training: {kind: embedded}
objective: {kind: full}
"""

EVERYTHING = """
output_dir: runs/y
seed: 7
steps: 3
prompts_per_step: 2
samples_per_prompt: 4
student: {model: models/s}
prompts: {kind: jsonl, path: a.jsonl, answer_field: answer, limit: 5}
sampling: {temperature: 0.7, max_new_tokens: 9}
generation: {kind: embedded, device: cpu, dtype: bfloat16, max_sequences: 3}
scoring: {kind: embedded, model: models/t, batch_tokens: 100}
training:
  kind: embedded
  tuning: {kind: lora, rank: 4, target_modules: [q_proj]}
  optimizer:
    learning_rate: 1e-3
    betas: [0.8, 0.9]
    schedule: {kind: warmup_cosine, warmup_steps: 2}
objective:
  kind: sampled_reverse_kl
  kl_baseline: {kind: top_k, k: 8}
  advantage_clip: null
verifier: {kind: math}
evaluation:
  prompts: {kind: parquet, path: b.parquet, answer_field: answer}
  verifier: {kind: math}
logging:
  trackers: [{kind: wandb, project: p, offline: true}, {kind: trackio, project: p}]
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    file = tmp_path / "minimal.yaml"
    file.write_text(MINIMAL)
    return file


def parsed(text: str) -> RunConfig:
    file_values = yaml.safe_load(text.replace("1e-3", "0.001"))
    return check_config(file_values)


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [MINIMAL, EVERYTHING], ids=["minimal", "everything"])
def test_dump_is_json_and_leads_back_to_the_same_config(text: str, tmp_path: Path) -> None:
    config = parsed(text)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dump_config(config)))
    assert load_config(file) == config
    assert config_differences(dump_config(load_config(file)), dump_config(config)) == []


def test_dump_holds_the_defaults_too() -> None:
    dumped = dump_config(parsed(MINIMAL))
    assert dumped.keys() == RunConfig.model_fields.keys()
    assert dumped["pipeline"] == {"kind": "sequential", "mps": False}
    assert dumped["training"]["optimizer"]["schedule"] == {"kind": "constant"}


def test_there_are_configs_to_check() -> None:
    assert CONFIGS, "configs/ has no *.yaml"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_config_is_valid(file: Path) -> None:
    config = load_config(file)
    assert check_config(dump_config(config)) == config


# --- Strictness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "steps='3'",
        "steps=3.0",
        "steps=true",
        "sampling.temperature='1.0'",
        "logging.tensorboard=1",
        "logging.tensorboard='yes'",
        "seed=null",
        "sampling.temperature=.inf",
        "sampling.temperature=.nan",
        "sampling.top_p=1.5",
        "training.optimizer.betas=[0.9]",
        "training.optimizer.betas=[0.9, 1.0]",
        "training.optimizer.learning_rate=1e300",
        "sampling.temperature=1e-45",
        "sampling.top_k=5000000000",
        "planning.device_memory_gib=1e308",
        "output_dir=''",
        "training.tuning={kind: lora, target_modules: []}",
        "student.template_arguments={tokenize: false}",
        "student.template_arguments={add_generation_prompt: false}",
        "student.template_arguments={messages: a}",
        "student.template_arguments={tools: a}",
        "student.template_arguments={chat_template: a}",
        "student.template_arguments={enable_thinking: null}",
        "student.template_arguments={enable_thinking: [a]}",
    ],
)
def test_nothing_is_coerced(override: str, minimal: Path) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config(minimal, [override])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2E5", 2e5), (".5e1", 5.0), ("1", 1.0), ("1.0e-5", 1e-5)]
)
def test_floats_may_be_written_as_people_write_them(text: str, value: float, minimal: Path) -> None:
    config = load_config(minimal, [f"training.optimizer.eps={text}"])
    assert config.training.optimizer.eps == value


def test_configs_are_frozen() -> None:
    config = parsed(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 4
    with pytest.raises(ValidationError, match="frozen"):
        config.training.optimizer.learning_rate = 1.0


def test_all_problems_are_named_at_once(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["steps=0", "seed=-1", "objective.kind=none"])
    assert all(word in str(caught.value) for word in ("steps", "seed", "objective.kind"))


# --- Overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "get", "expected"),
    [
        (["steps=9"], lambda c: c.steps, 9),
        (["sampling.temperature=2"], lambda c: c.sampling.temperature, 2.0),
        (["output_dir=a=b"], lambda c: c.output_dir, "a=b"),
        (["output_dir='7'"], lambda c: c.output_dir, "7"),
        (["prompts.limit=4", "prompts.limit=null"], lambda c: c.prompts.limit, None),
        (["steps=5", "steps=6"], lambda c: c.steps, 6),
        (["objective={kind: top_k, k: 3}"], lambda c: c.objective.k, 3),
        (["objective.kind=top_k", "objective.k=3"], lambda c: c.objective.k, 3),
        (
            ["objective={kind: sampled_reverse_kl}", "objective.kl_baseline.kind=full"],
            lambda c: c.objective.kl_baseline.kind,
            "full",
        ),
        (["training.optimizer.betas=[0.1, 0.2]"], lambda c: c.training.optimizer.betas, (0.1, 0.2)),
        (
            ["logging.trackers=[{kind: trackio, project: p}]"],
            lambda c: c.logging.trackers[0].project,
            "p",
        ),
        (["evaluation=null"], lambda c: c.evaluation, None),
    ],
)
def test_overrides_replace_values_in_order(
    overrides: list[str], get: Callable[[Any], object], expected: object, minimal: Path
) -> None:
    assert get(load_config(minimal, overrides)) == expected


@pytest.mark.parametrize("override", ["steps", "=1", " =1", "steps.x=1", "steps=[", "seed=0x_"])
def test_malformed_overrides_are_refused(override: str, minimal: Path) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_values(minimal, [override])


# --- Comparison -----------------------------------------------------------------------------------


def test_equal_configs_have_no_differences() -> None:
    assert config_differences(dump_config(parsed(MINIMAL)), dump_config(parsed(MINIMAL))) == []


def test_differences_name_the_leaf_with_both_values() -> None:
    old = {"a": {"b": 1, "c": 2, "gone": 3}, "list": [1, 2]}
    new = {"a": {"b": 1, "c": 5, "new": None}, "list": [1, 3]}
    assert config_differences(old, new) == [
        "a.c: 2 -> 5",
        "a.gone: 3 -> 'absent'",
        "a.new: 'absent' -> None",
        "list: [1, 2] -> [1, 3]",
    ]


@pytest.mark.parametrize("word", ["off", "on", "no", "yes", "2024-11-25", "2020-13-45"])
def test_a_word_is_a_word_and_not_a_boolean(tmp_path: Path, word: str) -> None:
    file = tmp_path / "words.yaml"
    file.write_text(f"a: {word}\nb: true\n")
    assert load_values(file) == {"a": word, "b": True}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", 10), ("08", 8), ("0o10", 8), ("0b11", 3), ("-0x1F", -31), ("1_000", 1000)),
        *(("1:30", "1:30"), ("1:30.5", "1:30.5"), ("-.inf", -math.inf), ("1_0.5", 10.5)),
        *(("+5", 5), ("-010", -10), ("0o", "0o"), ("0o8", "0o8"), ("0b2", "0b2"), ("0xg", "0xg")),
        *(("1:2:3", "1:2:3"), ("-1:30", "-1:30"), ("190:20:30.15", "190:20:30.15"), ("_1", "_1")),
        *(("1.", 1.0), (".5", 0.5), ("-.5", -0.5), ("+.5e-1", 0.05), ("1e5", 1e5), ("1E+5", 1e5)),
        *(("09.5", 9.5), ("1.5.2", "1.5.2"), ("1e", "1e"), (".", "."), ("e5", "e5")),
        *((".inf", math.inf), ("+.INF", math.inf), (".Inf", math.inf), ("inf", "inf")),
        *(("nan", "nan"), ("Infinity", "Infinity"), ("-.nan", "-.nan")),
        *(("true", True), ("True", True), ("FALSE", False), ("tRUE", "tRUE"), ("y", "y")),
        *(("Yes", "Yes"), ("NO", "NO"), ("On", "On"), ("OFF", "OFF"), ("n", "n")),
        *(("null", None), ("Null", None), ("NULL", None), ("~", None), ("", None)),
        *(("nULL", "nULL"), ("none", "none"), ("None", "None"), ("nil", "nil")),
        *(
            ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
            ("=", "="),
            ("<<", "<<"),
        ),
    ],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    file = tmp_path / "numbers.yaml"
    file.write_text(f"a: {text}\n")
    assert load_values(file) == {"a": value}


@pytest.mark.parametrize("key", ["1", "010", "true", "null", "1.5", "~"])
def test_a_key_that_is_no_text_is_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"a: {{{key}: x}}\n")
    with pytest.raises(ConfigError, match=r"is no text; quote it .*line"):
        load_values(file)
    file.write_text(f"a: {{'{key}': x, on: y, 1:30: z}}\n")
    assert load_values(file) == {"a": {key: "x", "on": "y", "1:30": "z"}}


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 1\n", "c:\n  a: 1\n  a: 2\n", '{"a": 1, "a": 1}'])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"'a' is set twice .*line"):
        load_values(file)


def test_a_key_may_stand_beside_what_is_merged_in(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text("x: &x {a: 1, b: 1}\ny: &y {<<: *x, a: 2}\nz: {<<: *y, a: 3}\n")
    assert load_values(file)["z"] == {"a": 3, "b": 1}


EVALUATION = "evaluation={prompts: {kind: task, split: eval}, verifier: {kind: task}}"


def test_an_evaluation_may_be_greedy_and_training_may_not(minimal: Path) -> None:
    greedy = load_config(minimal, [EVALUATION, "evaluation.sampling.temperature=0"])
    assert greedy.evaluation is not None
    assert greedy.evaluation.sampling.spec(3).is_greedy
    with pytest.raises(ConfigError, match=r"sampling\.temperature"):
        load_config(minimal, ["sampling.temperature=0"])


@pytest.mark.parametrize("temperature", ["0.0005", "-1", "cold"])
def test_an_evaluation_has_a_real_temperature(minimal: Path, temperature: str) -> None:
    for key in ("sampling.temperature", "second_temperature"):
        with pytest.raises(ConfigError, match=f"evaluation.{key}"):
            load_config(minimal, [EVALUATION, f"evaluation.{key}={temperature}"])


def test_the_second_temperature_is_another(minimal: Path) -> None:
    with pytest.raises(ConfigError, match="measured twice"):
        load_config(minimal, [EVALUATION, "evaluation.second_temperature=1.0"])
