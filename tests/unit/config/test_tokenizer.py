"""A teacher with a tokenizer of its own: what its config refuses, and why."""

from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.errors import ConfigError
from tests.pipeline.builders import EVALUATION, tiny_config
from tests.tiny_models import TinyModels

MODELS = TinyModels(student=Path("student"), teacher=Path("teacher"))
OWN = {"scoring.tokenizer": "own"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"kind": "top_k"}}, "objective.kind=top_k: .*another vocabulary"),
        ({"objective": {"kind": "full"}}, "objective.kind=full: .*another vocabulary"),
        (
            {"objective": {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "top_k"}}},
            "kl_baseline.kind=top_k: .*kl_baseline.kind=none",
        ),
        (
            {"objective": {"kind": "sft"}, "rollouts": {"source": "teacher"}},
            "objective.kind=sft: ",
        ),
        ({"replay": {"capacity_tokens": 100_000}}, "with replay: .*a score per token"),
        ({"pipeline": {"kind": "offline", "collect_steps": 4}}, "pipeline.kind=offline: "),
        (
            {"pipeline": {"kind": "streaming", "harvest": {"deadline_s": 1.0}}},
            "pipeline.harvest: a piece of an answer",
        ),
        (
            {"pipeline": {"kind": "streaming", "prefix": {"tokens": 4}}},
            "pipeline.prefix: a piece of an answer",
        ),
        ({"evaluation": EVALUATION | {"teacher": True}}, "evaluation.teacher=true: "),
        ({"scoring.context": {"user": "{{ prompt }}!"}}, "scoring.context: .*scoring.context=null"),
        ({"scoring.model": "student"}, "scoring.model=student: .*drop tokenizer=own"),
        ({"scoring.template_arguments": {"tokenize": False}}, "tokenize may not be set"),
    ],
)
def test_what_needs_one_vocabulary_is_refused_with_the_reason(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config(MODELS, tmp_path, {**OWN, **changes})


@pytest.mark.parametrize("name", ["special_tokens", "template_arguments"])
def test_its_settings_are_refused_without_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} with tokenizer=same: .*set tokenizer=own"):
        tiny_config(MODELS, tmp_path, {f"scoring.{name}": {"a": "b"}})


def test_the_default_is_the_students_tokenizer(tmp_path: Path) -> None:
    scoring = tiny_config(MODELS, tmp_path).teacher
    assert not scoring.has_own_tokenizer
    assert tiny_config(MODELS, tmp_path, OWN).teacher.has_own_tokenizer
