"""Settings of the scoring server, the grouping of requests, and the digest of a directory."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qwen3_distill.config import SglangScoring
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling import digest as digest_module
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.scoring.served.groups import first_of_contexts, request_groups
from qwen3_distill.scoring.sglang.server import SglangServer
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.types import HiddenRequest, SampledRequest
from tests.contract.builders import jobs_of, synthetic_rollout
from tests.tiny_models import TinyModels, write_model


def config_with(model: Path | str = "m", **values: Any) -> SglangScoring:
    return SglangScoring.model_validate({"kind": "sglang", "model": str(model)} | values)


def teacher_with(model: Path, **values: Any) -> SglangTeacher:
    return SglangTeacher(
        config_with(model, **values),
        request=SampledRequest(),
        memory_fraction=None,
        max_total_tokens=None,
        log=Path("unused"),
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"server_arguments": {"port": 3}}, "'port', which is set by scoring.port"),
        ({"server_arguments": {"api-key": "k"}}, "'api-key', which is set by this package"),
        ({"urls": ("10.0.0.2:30000",)}, "'10.0.0.2:30000' is no address"),
        ({"urls": ("http://a",), "port": 3}, "drop one"),
        ({"api_key_file": "key"}, "for the servers in urls"),
    ],
)
def test_settings_that_contradict_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config_with(**values)


def test_hidden_states_are_refused_before_a_server_starts(tiny_models: TinyModels) -> None:
    with pytest.raises(ConfigError, match=r"hidden states.*scoring.kind=embedded"):
        SglangTeacher(
            config_with(tiny_models.teacher),
            request=HiddenRequest(),
            memory_fraction=None,
            max_total_tokens=None,
            log=Path("unused"),
        )


def test_the_teacher_id_names_the_precision(tiny_models: TinyModels) -> None:
    fp8 = teacher_with(tiny_models.teacher)
    digest = directory_digest(tiny_models.teacher)[:16]
    assert fp8.teacher_id == f"teacher#{digest}@sglang-fp8"
    plain = teacher_with(tiny_models.teacher, quantization=None)
    assert plain.teacher_id == f"teacher#{digest}@sglang-bfloat16"
    head = teacher_with(tiny_models.teacher, quantization=None, float32_head=True)
    assert head.teacher_id == f"teacher#{digest}@sglang-bfloat16+float32-head"


def test_a_teacher_says_what_may_be_dropped_and_that_it_starts_first(
    tiny_models: TinyModels,
) -> None:
    teacher = teacher_with(tiny_models.teacher, max_dropped_fraction=0.2)
    assert (teacher.max_dropped_fraction, teacher.starts_first) == (0.2, True)


@pytest.mark.parametrize(
    ("arguments", "said", "is_taken"),
    [
        ({}, "Memory pool end. avail mem=20.00 GB", True),
        ({}, "Load weight end. avail mem=60.00 GB", False),
        ({"tp-size": 2}, "Memory pool end. avail mem=20.00 GB", False),  # and the other card's?
    ],
)
def test_a_server_s_log_says_when_it_has_its_memory(
    tiny_models: TinyModels, tmp_path: Path, arguments: dict[str, Any], said: str, is_taken: bool
) -> None:
    log = tmp_path / "log"
    log.write_text(f"[2026-11-28 10:00:00] {said}\n")
    server = SglangServer(
        config_with(tiny_models.teacher, server_arguments=arguments),
        context_length=64,
        memory_fraction=None,
        max_total_tokens=None,
        log=log,
    )

    async def ends_soon() -> bool:
        waiting = asyncio.create_task(server.memory_taken())
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        waiting.cancel()
        return bool(done)

    assert asyncio.run(ends_soon()) == is_taken


# --- Requests -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), max_size=30), st.integers(1, 120))
def test_groups_hold_every_rollout_once_with_its_prompt_mates(
    drawn: list[tuple[int, int]], budget: int
) -> None:
    # A prompt of its own length for each number: prompts differ.
    jobs = jobs_of(synthetic_rollout(2 + prompt, length, seed=0) for prompt, length in drawn)
    groups = request_groups(jobs, budget)
    order = [index for group in groups for index in group]
    assert sorted(order) == list(range(len(jobs)))
    prompts = [drawn[index][0] for index in order]
    changes = sum(a != b for a, b in pairwise(prompts))
    assert changes == max(len(set(prompts)) - 1, 0)
    for group in groups:
        tokens = sum(2 + drawn[index][0] + drawn[index][1] for index in group)
        assert tokens <= budget or len(group) == 1


def test_a_request_is_filled_before_the_next_one() -> None:
    jobs = jobs_of(synthetic_rollout(2, 8, seed=0) for _ in range(5))
    assert request_groups(jobs, 20) == [[0, 1], [2, 3], [4]]


def test_the_first_of_each_context_comes_before_those_that_share_it() -> None:
    jobs = jobs_of(synthetic_rollout(prompt, 8, seed=0) for prompt in (2, 3, 2, 4, 3, 2))
    assert first_of_contexts([1, 4, 0, 2, 5, 3], jobs) == ([1, 0, 3], [4, 2, 5])
    assert first_of_contexts([0, 1, 3], jobs) == ([0, 1, 3], [])


# --- Digest -------------------------------------------------------------------------------------


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    first = write_model(tmp_path / "a", seed=1)
    again = write_model(tmp_path / "b", seed=1)
    before = directory_digest(first)
    assert len(before) == 64
    assert before == directory_digest(again)
    assert before != directory_digest(write_model(tmp_path / "c", seed=2))
    (again / "README.md").write_text("not part of the weights")
    assert directory_digest(again) == before
    (again / "model.safetensors").rename(again / "model-1.safetensors")
    assert directory_digest(again) != before
    (first / "config.json").write_text((first / "config.json").read_text() + "\n")
    assert directory_digest(first) != before


def test_a_changed_bit_changes_the_digest_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "_FILE_CHUNK_BYTES", 1000)
    model_dir = write_model(tmp_path / "a", seed=1)
    before = directory_digest(model_dir)
    file = model_dir / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert directory_digest(model_dir) != before


def test_an_unchanged_directory_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = write_model(tmp_path / "a", seed=1)
    before = directory_digest(model_dir)
    monkeypatch.setattr(digest_module, "_file_digest", lambda path: b"")
    assert directory_digest(model_dir) == before
