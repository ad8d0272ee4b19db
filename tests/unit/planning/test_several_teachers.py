"""The memory plan of several teachers in servers of different kinds."""

from typing import Any

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config, dump_config
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.planning.plan import MemoryPlan
from qwen3_distill.planning.table import plan_settings
from tests.unit.planning.test_plan import config, planned

VLLM = {"kind": "vllm", "model": "no/v", "max_model_tokens": 4096, "max_total_tokens": 20_000}
SGLANG = {"kind": "sglang", "model": "no/s", "max_total_tokens": 50_000}
PER_TOKEN = named_shape("8B").kv_bytes_per_token(2)


def several(**teachers: dict[str, Any]) -> RunConfig:
    scoring = {"kind": "several", "by": "task", "teachers": teachers}
    prompts = {"kind": "jsonl", "path": "rows.jsonl"}
    return check_config(dump_config(config()) | {"scoring": scoring, "prompts": prompts})


def plan_of(run: RunConfig) -> MemoryPlan:
    return planned(run, 141, teacher="8B")


def test_every_server_gets_the_cache_of_its_own_section() -> None:
    plan = plan_of(several(code=VLLM, math=SGLANG))
    for name, tokens in {"code": 20_000, "math": 50_000}.items():
        own = plan.for_teacher(name)
        assert own.sglang_max_total_tokens == tokens
        assert own.teacher_cache_bytes == tokens * PER_TOKEN
    caches = {row.name: row.num_bytes for row in plan.rows if row.what == "key-value cache"}
    assert caches["code"] == 20_000 * PER_TOKEN
    assert caches["math"] == 50_000 * PER_TOKEN


def test_sglang_finds_the_memory_before_vllm_starts() -> None:
    run = several(code=VLLM, math=SGLANG)
    other = several(math=SGLANG, code=VLLM)
    both, alone = plan_of(run).for_teacher("math"), plan_of(other).for_teacher("math")
    assert both.sglang_memory_fraction == alone.sglang_memory_fraction
    assert (
        both.sglang_memory_fraction
        == planned(config(scoring=SGLANG), 141, teacher="8B").sglang_memory_fraction
    )


def test_the_plans_settings_name_each_teacher() -> None:
    run = several(code=VLLM, math=SGLANG)
    settings = plan_settings(run, plan_of(run))
    assert "scoring.teachers.code.max_total_tokens=20000" in settings
    assert "scoring.teachers.code.memory_fraction" not in settings
    assert "scoring.teachers.math.memory_fraction=" in settings
