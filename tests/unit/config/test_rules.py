"""Settings that contradict each other are refused, with the reason and the remedy."""

import inspect
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qwen3_distill.config import (
    RunConfig,
    cluster_rules,
    rules,
    self_teacher,
    several_rules,
    student_support,
    tokenizer,
)
from qwen3_distill.errors import ConfigError
from qwen3_distill.replay.buffer import build_replay

GOOD: dict[str, Any] = {
    "output_dir": "runs/x",
    "steps": 3,
    "prompts_per_step": 2,
    "samples_per_prompt": 2,
    "student": {"model": "models/s"},
    "prompts": {"kind": "task"},
    "sampling": {"max_new_tokens": 10},
    "verifier": {"kind": "task"},
    "generation": {"kind": "embedded"},
    "scoring": {"kind": "embedded", "model": "models/t"},
    "training": {"kind": "embedded"},
    "objective": {"kind": "sampled_reverse_kl"},
    "replay": {"capacity_tokens": 40},
}


def sampled(**changes: Any) -> dict[str, Any]:
    return {"objective": {"kind": "sampled_reverse_kl", **changes}}


def replay(**changes: Any) -> dict[str, Any]:
    return {"replay": {"capacity_tokens": 40, **changes}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (sampled(ratio_cap=None), "ratio_cap=null.*set ratio_cap"),
    (sampled(discount=0.5), "discount=0.5.*use discount=0"),
    (sampled(task_reward_weight=1.0), "task_reward_weight=1.0.*no task reward"),
    (sampled(kl_baseline={"kind": "full"}), "hidden states.*not kept"),
    ({"objective": {"kind": "full"}}, "hidden states.*not kept"),
    (replay(capacity_tokens=39), "capacity_tokens=39.*4 rollouts of up to 10 tokens are 40"),
    (replay(capacity_rollouts=3), "capacity_rollouts=3.*4 rollouts"),
    (replay(reuse_cap=1, updates_per_batch=2), "reuse_cap=1 with updates_per_batch=2"),
    (replay(max_age_steps=1, updates_per_batch=3), "max_age_steps=1 with updates_per_batch=3"),
    (replay(priority_clip_nats=0.001), "priority_clip_nats=0.001"),
    (
        {**replay(), "pipeline": {"kind": "streaming", "max_staleness_steps": 5}},
        "max_age_steps=4 with pipeline.max_staleness_steps=5.*use at least 5",
    ),
    (
        {**replay(updates_per_batch=2), "pipeline": {"kind": "streaming"}},
        "max_age_steps=4 .*use at least 5",
    ),
]


def test_the_settings_below_are_good_without_their_change() -> None:
    assert RunConfig.model_validate(GOOD).replay is not None


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(GOOD | change)


@pytest.mark.parametrize(
    "change", [change for change, _ in REFUSED if "objective" in change], ids=str
)
def test_these_objectives_are_fine_without_replay(change: dict[str, Any]) -> None:
    RunConfig.model_validate(GOOD | change | {"replay": None})


@pytest.mark.parametrize(
    "change",
    [
        {"objective": {"kind": "top_k"}},
        sampled(kl_baseline={"kind": "top_k"}),
        replay(capacity_rollouts=4, reuse_cap=2, updates_per_batch=2, max_age_steps=1),
    ],
)
def test_the_next_best_setting_is_taken(change: dict[str, Any]) -> None:
    RunConfig.model_validate(GOOD | change)


def test_a_buffer_that_no_memory_is_large_enough_for_is_named() -> None:
    config = RunConfig.model_validate(GOOD | replay(capacity_tokens=10**14))
    assert config.replay is not None
    with pytest.raises(ConfigError, match=r"capacity_tokens=100000000000000 takes .* GiB on cpu"):
        build_replay(config.replay, config.objective, device=torch.device("cpu"), seed=0)


def test_streaming_with_room_for_what_arrives_old_is_good() -> None:
    streaming = {"pipeline": {"kind": "streaming", "max_staleness_steps": 3}}
    assert RunConfig.model_validate(GOOD | replay(updates_per_batch=2) | streaming)


def test_every_rule_is_run() -> None:
    modules = (rules, cluster_rules, self_teacher, several_rules, student_support, tokenizer)
    written = {
        function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    others = {rules.check_rules, self_teacher.with_student_as_teacher}
    assert written - others == set(rules.RULES)
    assert len(rules.RULES) == len(set(rules.RULES))


def test_of_several_broken_rules_the_first_of_the_list_is_reported() -> None:
    """Each fix reveals the next broken rule."""
    broken = sampled(ratio_cap=None, task_reward_weight=1.0) | {
        "sampling": {"top_p": 0.5, "temperature": 0.5},
        "verifier": None,
        "replay": {"capacity_tokens": 1},
    }
    fixes: list[tuple[dict[str, Any], str]] = [
        ({}, "sampling.top_p=0.5"),
        ({"sampling": {"temperature": 0.5}}, "ratio_cap=null with sampling.temperature"),
        (sampled(task_reward_weight=1.0), "sampling.temperature=0.5 with discount=0.0"),
        ({"sampling": {}}, "replay with objective.discount=0.0, task_reward_weight=1.0"),
        (sampled(), "replay.capacity_tokens=1"),
    ]
    for fix, message in fixes:
        broken = broken | fix
        with pytest.raises(ValidationError, match=message):
            RunConfig.model_validate(GOOD | broken)


@pytest.mark.parametrize("section", ["scoring", "training"])
def test_the_full_vocabulary_needs_teacher_and_learner_in_one_process(section: str) -> None:
    def values(owner: str) -> dict[str, Any]:
        own = {owner: {**GOOD[owner], "own_process": True}}
        return GOOD | own | {"objective": {"kind": "full"}, "replay": None}

    RunConfig.model_validate(values("generation"))
    with pytest.raises(ValidationError, match="own_process=false for both"):
        RunConfig.model_validate(values(section))


@pytest.mark.parametrize("section", ["generation", "scoring", "training"])
def test_threads_need_a_process_of_their_own(section: str) -> None:
    def values(**settings: Any) -> dict[str, Any]:
        return GOOD | {section: {**GOOD[section], **settings}}

    config = RunConfig.model_validate(values(threads=1, own_process=True))
    assert getattr(config, section).threads == 1
    with pytest.raises(ValidationError, match="own_process=true, or drop threads"):
        RunConfig.model_validate(values(threads=1))


def test_a_task_verifier_judges_the_task_of_the_prompts() -> None:
    values = {**GOOD, "prompts": {"kind": "task", "task": "sum"}}
    with pytest.raises(ValidationError, match=r"verifier\.task=chain with prompts\.task=sum"):
        RunConfig.model_validate(values)
    RunConfig.model_validate({**values, "verifier": {"kind": "task", "task": "sum"}})
