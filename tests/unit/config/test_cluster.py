"""Settings of a cluster that contradict one another are refused, each with what to change."""

from typing import Any

import pytest

from qwen3_distill.config import ClusterConfig
from qwen3_distill.config.load import check_config
from qwen3_distill.errors import ConfigError
from tests.pipeline.builders import tiny_values
from tests.tiny_models import TinyModels

OWN_PROCESS = {"generation.own_process": True, "scoring.own_process": True}


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({}, "names no engine"),
        ({"rollouts": {"replicas": 2, "minimum": 3}}, "minimum=3 of replicas=2"),
        ({"rollouts": {"where": "with_learner"}}, "needs cluster.learner"),
        (
            {"learner": {}, "teachers": {"where": "with_learner", "cards": 2}},
            "give both the same number",
        ),
        (
            {"learner": {}, "rollouts": {"where": "with_learner", "replicas": 2}},
            "raise cluster.learner.ranks",
        ),
        ({"teachers": {"where": "spark2"}}, "set cluster.address"),
        ({"teachers": {"where": "two words"}}, "is no place"),
        ({"teachers": {}, "address": "10.0.0.1:6379", "cards_here": 2}, "cluster.cards_here"),
        ({"learner": {"sharded": True}}, "sharded with ranks=1.*raise ranks"),
    ],
)
def test_a_cluster_section_that_contradicts_itself_is_refused(
    cluster: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ClusterConfig.model_validate(cluster)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster": {"rollouts": {}}}, "generation.own_process=true"),
        ({"cluster": {"teachers": {}}}, "scoring.own_process=true"),
        ({"cluster": {"learner": {}}}, "training.own_process=true"),
        (
            {
                "cluster": {"rollouts": {}},
                "generation": {"kind": "vllm", "full_weights": "ipc"},
            },
            "full_weights=ipc reaches an engine on the learner's card only",
        ),
        (
            {
                "cluster": {
                    "address": "10.0.0.1:6379",
                    "learner": {"ranks": 2},
                    "rollouts": {"replicas": 2, "where": "with_learner"},
                },
                "training.own_process": True,
                "generation": {"kind": "vllm", "full_weights": "ipc"},
            },
            "use full_weights=auto or directory",
        ),
        (
            {"cluster": {"rollouts": {"cards": 2}}, "generation": {"kind": "vllm"}},
            "cards=2 and generation.tensor_parallel=1: .* give both the same number",
        ),
        (
            {"generation": {"kind": "vllm", "tensor_parallel": 4}},
            r"add cluster: \{rollouts: \{cards: 4\}\}",
        ),
        (
            {"generation.own_process": True, "cluster": {"rollouts": {"cards": 2}}},
            "which is 1 for generation.kind=embedded",
        ),
        (
            {"generation": {"kind": "vllm", "engine_arguments": {"tensor_parallel_size": 2}}},
            "is set by generation.tensor_parallel; write it there",
        ),
        (
            {
                "cluster": {"teachers": {"cards": 2}},
                "scoring": {
                    "kind": "sglang",
                    "model": "teacher",
                    "server_arguments": {"tp-size": 4},
                },
            },
            "give both the same number",
        ),
    ],
)
def test_a_cluster_that_the_engines_cannot_have_is_refused(
    tiny_models: TinyModels, tmp_path: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_config(tiny_values(tiny_models, tmp_path / "run", changes))


SHARDED = {"cluster": {"learner": {"ranks": 2, "sharded": True}}, "training.own_process": True}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"training": {"kind": "unsloth", "dtype": "float32", "tuning": {"kind": "full"}}},
            "onto one card",
        ),
        ({"training.tuning": {"kind": "lora"}}, "adapters are small"),
        ({"training.compiled": True}, "use compiled=false"),
        (
            # Nothing else refuses it: the engine is on the learner's card.
            {
                "generation": {"kind": "vllm", "full_weights": "ipc"},
                "cluster.rollouts": {"where": "with_learner"},
            },
            "no card has all of them",
        ),
    ],
)
def test_a_learner_that_cannot_divide_its_weights_is_refused(
    tiny_models: TinyModels, tmp_path: Any, changes: dict[str, Any], words: str
) -> None:
    full = SHARDED | {"training.tuning": {"kind": "full"}}
    check_config(tiny_values(tiny_models, tmp_path / "run", full))
    with pytest.raises(ConfigError, match=words):
        check_config(tiny_values(tiny_models, tmp_path / "run", full | changes))


def test_rollouts_in_flight_grow_with_the_replicas(tiny_models: TinyModels, tmp_path: Any) -> None:
    changes = {
        **OWN_PROCESS,
        "generation.max_sequences": 8,
        "pipeline": {"kind": "streaming"},
        "cluster": {"rollouts": {"replicas": 3}},
    }
    config = check_config(tiny_values(tiny_models, tmp_path / "run", changes))
    assert config.max_in_flight == 24
