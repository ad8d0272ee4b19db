"""Settings of the vLLM teacher, what it is called, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qwen3_distill.config import RunConfig, VllmScoring
from qwen3_distill.config.load import check_config
from qwen3_distill.config.scoring import VLLM_SERVER_OPTIONS
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.scoring.served.groups import request_groups
from qwen3_distill.scoring.vllm.teacher import VllmTeacher
from qwen3_distill.scoring.vllm.wire import MAX_JOBS
from qwen3_distill.types import HiddenRequest, SampledRequest, ScoreRequest, TopKRequest
from tests.contract.builders import jobs_of, synthetic_rollout
from tests.tiny_models import VOCAB_SIZE, TinyModels


def config_with(model: Path | str = "m", **values: Any) -> VllmScoring:
    return VllmScoring.model_validate({"kind": "vllm", "model": str(model)} | values)


def teacher_with(
    model: Path,
    request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
    **values: Any,
) -> VllmTeacher:
    config = config_with(model, **values)
    return VllmTeacher(config, request=request, kv_cache_bytes=1, log=Path("unused"))


@pytest.mark.parametrize("name", sorted(VLLM_SERVER_OPTIONS))
def test_what_a_setting_gives_vllm_is_no_server_argument(name: str) -> None:
    spellings = [name, name.replace("-", "_"), f"--{name}", name[:-1], f"no-{name}", f"{name}.x"]
    for spelling in spellings:
        with pytest.raises(ValidationError, match="which is set by"):
            config_with(server_arguments={spelling: 1})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"server_arguments": {"trust": "yes"}}, "write trust: true"),
        ({"server_arguments": {"a b": 1}}, "write the option's name alone"),
        ({"float32_head": True, "server_arguments": {"hf-overrides.x": 1}}, "float32_head"),
        ({"urls": ("10.0.0.2:8000",)}, "'10.0.0.2:8000' is no address"),
        ({"urls": ("http://a",), "port": 3}, "drop one"),
        ({"api_key_file": "key"}, "for the servers in urls"),
        ({"memory_fraction": 0.5}, "memory_fraction"),
    ],
)
def test_settings_that_contradict_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config_with(**values)


def test_other_arguments_are_passed_on() -> None:
    given = {
        "tensor-parallel-size": 2,
        "compilation-config": {"level": 0},
        "hf-overrides": {"a": 1},
    }
    assert config_with(server_arguments=given).server_arguments == given


def test_hidden_states_are_refused_with_the_reason(tiny_models: TinyModels) -> None:
    with pytest.raises(
        ConfigError, match=r"hidden states, which are not taken from vLLM's servers.*top_k"
    ):
        teacher_with(tiny_models.teacher, HiddenRequest())


def test_more_candidates_than_the_vocabulary_are_refused(tiny_models: TinyModels) -> None:
    with pytest.raises(ConfigError, match=f"vocabulary has {VOCAB_SIZE}; lower k"):
        teacher_with(tiny_models.teacher, TopKRequest(k=VOCAB_SIZE + 1))


def test_the_teacher_id_names_weights_engine_and_precision(tiny_models: TinyModels) -> None:
    digest = directory_digest(tiny_models.teacher)[:16]
    settings: list[dict[str, Any]] = [
        {},
        {"quantization": None},
        {"quantization": None, "float32_head": True},
    ]
    ids = [teacher_with(tiny_models.teacher, **values).teacher_id for values in settings]
    assert ids == [
        f"teacher#{digest}@vllm-fp8",
        f"teacher#{digest}@vllm-bfloat16",
        f"teacher#{digest}@vllm-bfloat16+float32-head",
    ]


def test_it_need_not_start_first(tiny_models: TinyModels) -> None:
    """Its cache has a size, not a share of what it finds free."""
    assert not teacher_with(tiny_models.teacher).starts_first


def test_requests_hold_no_more_sequences_than_vllm_takes() -> None:
    jobs = jobs_of(synthetic_rollout(2, 1, seed=0) for _ in range(MAX_JOBS + 3))
    groups = request_groups(jobs, 10**9, max_jobs=MAX_JOBS)
    assert [len(group) for group in groups] == [MAX_JOBS, 3]


def run_config(**values: Any) -> RunConfig:
    return check_config(
        {
            "output_dir": "runs/x",
            "steps": 1,
            "prompts_per_step": 2,
            "student": {"model": "no/student"},
            "prompts": {"kind": "task"},
            "generation": {"kind": "vllm"},
            "training": {"kind": "unsloth"},
            "objective": {"kind": "sampled_reverse_kl"},
            "scoring": {"kind": "vllm", "model": "no/teacher", **values.pop("scoring", {})},
            **values,
        }
    )


def test_rules_of_served_teachers_hold_for_vllm() -> None:
    with pytest.raises(ConfigError, match=r"scoring\.urls names servers that run already"):
        run_config(
            scoring={"urls": ["http://10.0.0.2:8000"]},
            cluster={"address": "own", "teachers": {"where": "same"}},
        )
    with pytest.raises(ConfigError, match=r"server_arguments\.tensor-parallel-size=1"):
        run_config(cluster={"address": "own", "teachers": {"cards": 2}})
    with pytest.raises(ConfigError, match=r"hidden states|full"):
        run_config(objective={"kind": "full"})
