"""Replay settings that make no sense are refused, with the reason and the remedy."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qwen3_distill.config import RunConfig
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
