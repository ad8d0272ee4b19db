"""How an override's value is read: text as it is given, everything else as YAML."""

from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config.load import load_config, load_values
from qwen3_distill.errors import ConfigError

CONFIG = """
output_dir: runs/x
steps: 3
prompts_per_step: 2
student: {model: models/s}
prompts: {kind: jsonl, path: a.jsonl, system: before}
generation: {kind: vllm}
scoring: {kind: sglang, model: models/t}
training: {kind: embedded}
objective: {kind: top_k}
logging: {trackers: [{kind: trackio, project: p}]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG)
    return file


def value(file: Path, key: str, text: str) -> Any:
    """The value of ``key`` after ``key=text``."""
    found: Any = load_values(file, [f"{key}={text}"])
    for part in key.split("."):
        found = found[part]
    return found


TEXTS = [
    *("after #### and nothing else", "#### first", "a # b", "a #", "a: b", "a:", ": b", "{a: b}"),
    *("{answer}", "[x", "[x]", "- x", "x - y", "*x", "&x y", "!x", "%x", "@x", "`x`", "| x", "> x"),
    *(
        "42",
        "1e5",
        "0o10",
        "true",
        "no",
        "yes",
        "1:30",
        "2024-11-25",
        ".inf",
        "=",
        "<<",
        "?",
        "? x",
    ),
    *(
        " leading",
        "trailing ",
        "  ",
        "a\nb # c\n",
        "\ttab",
        "a\\nb",
        "it's",
        'say "x"',
        "'a' or 'b'",
    ),
    *('"a" or "b"', "'open", '"open', "null and void", "é日👍", "a=b", "$x ${y}", "---", "..."),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "key",
    [
        *("prompts.system", "prompts.suffix", "prompts.path", "prompts.answer_field", "output_dir"),
        *("student.model", "scoring.model", "generation.python", "generation.environment.NAME"),
    ],
)
def test_a_text_setting_takes_the_text_as_it_is_given(file: Path, key: str, text: str) -> None:
    assert value(file, key, text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("'it''s'", "it's"), ("'a # b'", "a # b"), ('"a\\nb"', "a\nb"), ('"\\u00e9"', "é")),
        *(("'null'", "null"), ("'~'", "~"), ("''", ""), ('""', ""), ("' x '", " x ")),
        *((" 'x' ", "x"), ("'a\n\nb'", "a\n\nb"), ('"a\n b"', "a\n b"), ("'\"x\"'", '"x"')),
        *(("'a\\nb'", "a\\nb"), ('"\\"x\\""', '"x"'), ('"it\'s"', "it's")),
    ],
)
def test_one_pair_of_quotes_around_the_whole_is_removed(
    file: Path, text: str, expected: str
) -> None:
    assert value(file, "prompts.system", text) == expected
    assert value(file, "prompts.suffix", text) == expected


def test_an_escape_that_does_not_exist_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="unknown escape character 'q'"):
        value(file, "prompts.system", '"\\q"')


@pytest.mark.parametrize("text", ["", "null", "Null", "NULL", "~"])
def test_null_unsets_a_text_that_may_be_null(file: Path, text: str) -> None:
    assert value(file, "prompts.system", text) is None


def test_nothing_is_the_empty_text_where_there_must_be_one(file: Path) -> None:
    assert value(file, "prompts.suffix", "") == ""
    with pytest.raises(ConfigError, match="output_dir"):
        load_config(file, ["output_dir="])


@pytest.mark.parametrize("key", ["prompts.suffix", "output_dir", "student.model"])
def test_null_is_refused_where_there_must_be_a_text(file: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .*got None"):
        load_config(file, [f"{key}=null"])


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        *(("steps", "5 # five", 5), ("steps", " 5 ", 5), ("evaluation", "null", None)),
        ("student.template_arguments", "{enable_thinking: false}", {"enable_thinking": False}),
        ("student.template_arguments.enable_thinking", "false", False),
        ("generation.engine_arguments.compilation_config", "{a: [1]}", {"a": [1]}),
        ("scoring.server_arguments.watchdog-timeout", "600", 600),
        ("scoring.urls", "[http://a:1, http://b:2]", ["http://a:1", "http://b:2"]),
        ("training.tuning.target_modules", "[q_proj]", ["q_proj"]),
        ("scoring.quantization", "null", None),
        (
            "logging.trackers",
            "[{kind: trackio, project: 'a # b'}]",
            [{"kind": "trackio", "project": "a # b"}],
        ),
        ("no.such.key", "7", 7),
    ],
)
def test_every_other_setting_takes_yaml(file: Path, key: str, text: str, expected: Any) -> None:
    assert value(file, key, text) == expected


def test_the_kind_of_a_section_decides_what_a_key_takes(file: Path) -> None:
    hf = ["prompts={kind: hf, path: x}", "prompts.split=train[:10%] # all"]
    assert load_values(file, hf)["prompts"]["split"] == "train[:10%] # all"
    task = ["prompts={kind: task}", "prompts.split=eval # held out"]
    assert load_values(file, task)["prompts"]["split"] == "eval"


@pytest.mark.parametrize("text", ["3", "2024-11-25", "[2024-11-25]", "true", "1.5"])
def test_a_file_is_not_read_so(file: Path, text: str) -> None:
    """In a file every value is YAML: what is no text is refused for a text."""
    file.write_text(CONFIG.replace("runs/x", text))
    if text == "2024-11-25":
        assert load_config(file).output_dir == text
    else:
        with pytest.raises(ConfigError, match="output_dir"):
            load_config(file)
