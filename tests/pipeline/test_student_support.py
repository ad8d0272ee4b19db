"""Runs whose objective compares the student's most likely tokens (`objective.support: student`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_distill.data.rollout_files import read_scored
from qwen3_distill.errors import ConfigError
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.types import ScoredRollout, TopKScore
from tests.contract.reference import largest_gap, reference_model, response_logprobs
from tests.pipeline.builders import run_to_end, tiny_config
from tests.tiny_models import VOCAB_SIZE, TinyModels

K = 3
STUDENTS = {"objective": {"kind": "top_k", "k": K, "support": "student"}}
SAVED = {"logging": {"tensorboard": False, "rollouts_every_steps": 1, "rollouts_per_save": 100}}


def first_step(folder: Path) -> list[ScoredRollout]:
    (path, *_) = sorted((folder / "rollouts").glob("*.parquet"))
    return [item for _, item in read_scored(path)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pipeline": {"kind": "streaming"}},
        {
            "pipeline": {
                "kind": "streaming",
                "max_staleness_steps": 2,
                "harvest": {"deadline_s": 1e-4, "min_tokens": 1},
            }
        },
        {"generation.batching": "static"},
        {"generation.own_process": True, "scoring.own_process": True},
    ],
    ids=["sequential", "streaming", "harvest", "static", "own processes"],
)
def test_candidates_are_the_students_with_the_teachers_logprobs(
    tiny_models: TinyModels, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path, {**STUDENTS, **SAVED, **changes}))
    student, teacher = reference_model(tiny_models.student), reference_model(tiny_models.teacher)
    items = first_step(tmp_path)
    assert items
    for item in items:
        assert isinstance(item.score, TopKScore)
        with torch.no_grad():
            student_SV = response_logprobs(student, item.rollout)
            teacher_SV = response_logprobs(teacher, item.rollout).numpy()
        ids_SK = item.score.candidate_ids
        chosen_SK = np.take_along_axis(student_SV.numpy(), ids_SK, axis=1)
        assert largest_gap(chosen_SK, student_SV.topk(K).values.numpy()) < 1e-4
        named_SK = np.take_along_axis(teacher_SV, ids_SK, axis=1)
        assert largest_gap(item.score.candidate_logprobs, named_SK) < 1e-4
        # The teacher's own candidates would be others.
        assert largest_gap(named_SK, torch.tensor(teacher_SV).topk(K).values.numpy()) > 0.1


def test_all_tokens_as_candidates_give_the_same_step_whoever_chose_them(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    numbers = []
    for support in ("teacher", "student"):
        objective = {"kind": "top_k", "k": VOCAB_SIZE, "support": support}
        changes = {"objective": objective, "steps": 2}
        run_to_end(tiny_config(tiny_models, tmp_path / support, changes))
        steps = read_jsonl(tmp_path / support / "metrics.jsonl")
        numbers.append([(s["loss/objective"], s["optim/grad_norm"]) for s in steps])
    assert np.allclose(numbers[0], numbers[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scoring": {"kind": "sglang", "model": "m", "quantization": None}},
            "support=student with scoring.kind=sglang.*one list of tokens",
        ),
        (
            {"scoring": {"kind": "vllm", "model": "m"}},
            "support=student with scoring.kind=vllm.*its own most likely tokens",
        ),
        ({"rollouts": {"source": "mixture", "teacher_share": 0.5}}, "rollouts.source=mixture"),
        ({"pipeline": {"kind": "offline", "collect_steps": 2}}, "pipeline.kind=offline"),
        ({"scoring.tokenizer": "own"}, "sampled_reverse_kl"),
    ],
    ids=["one list of tokens", "own tokens", "mixture", "offline", "tokenizer"],
)
def test_what_cannot_score_given_tokens_is_refused(
    tiny_models: TinyModels, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_models, tmp_path, {**STUDENTS, **changes})
