"""The memory plan of a teacher in a vLLM server: a cache in bytes, and a chunk's logits."""

import pytest

from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning.plan import MemoryPlan
from qwen3_distill.planning.table import plan_settings
from tests.unit.planning.test_plan import config, planned, size

SHAPE = named_shape("8B")
PER_TOKEN = SHAPE.kv_bytes_per_token(2)


def plan_of(**scoring: object) -> MemoryPlan:
    return planned(config(scoring={"kind": "vllm", **scoring}), 141, teacher="8B")


def test_the_cache_holds_the_longest_sequence_of_the_model() -> None:
    plan = plan_of()
    tokens = SHAPE.context_length + 1 + 2 * 128
    assert plan.sglang_max_total_tokens == max(tokens, 2 * 16384 + 2048)
    assert plan.teacher_cache_bytes == plan.sglang_max_total_tokens * PER_TOKEN
    assert size(plan, "teacher", "key-value cache") == plan.teacher_cache_bytes


def test_shorter_sequences_leave_the_cache_to_the_requests() -> None:
    plan = plan_of(max_model_tokens=4096, request_tokens=4096)
    assert plan.sglang_max_total_tokens == 2 * 4096 + 2048


def test_stated_tokens_win_and_must_hold_one_sequence() -> None:
    assert plan_of(max_model_tokens=4096, max_total_tokens=5000).teacher_cache_bytes == (
        5000 * PER_TOKEN
    )
    with pytest.raises(ConfigError, match=r"max_total_tokens=4097 cannot hold one .* 4097 tokens"):
        plan_of(max_model_tokens=4096, max_total_tokens=4097)


def test_the_logits_of_a_chunk_are_counted() -> None:
    small = size(plan_of(), "teacher", "activations and logits")
    large = size(plan_of(chunked_prefill_tokens=8192), "teacher", "activations and logits")
    per_token = (large - small) / (8192 - 2048)
    assert per_token > SHAPE.vocab_size * (2 + 4 + 4)


def test_online_fp8_and_graphs_are_counted() -> None:
    assert size(plan_of(), "teacher", "weights") < size(
        plan_of(quantization=None), "teacher", "weights"
    )
    assert size(plan_of(decode_graphs=True), "teacher", "CUDA graphs") > 0


def test_servers_that_run_elsewhere_take_nothing() -> None:
    plan = plan_of(urls=["http://10.0.0.2:8000"])
    assert not [row for row in plan.rows if row.engine == "teacher"]


def test_advice_names_settings_that_a_vllm_teacher_has() -> None:
    with pytest.raises(ConfigError) as error:
        planned(config(scoring={"kind": "vllm"}), 40, teacher="8B")
    assert "scoring.max_model_tokens=" in str(error.value)
    assert "scoring.chunk_tokens" not in str(error.value)
    assert "scoring.memory_fraction" not in str(error.value)


def test_the_plans_settings_are_those_of_the_kind() -> None:
    run = config(scoring={"kind": "vllm"})
    settings = plan_settings(run, plan_of())
    assert f"scoring.max_total_tokens={plan_of().sglang_max_total_tokens}" in settings
    assert "memory_fraction" not in settings
    assert plan_of().fits
    assert plan_of().required_bytes < 141 * GIB
