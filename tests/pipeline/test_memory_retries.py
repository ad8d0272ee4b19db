"""A run goes on where the learner's memory did not suffice, and says so."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.training.learner import TorchLearner
from tests.pipeline.builders import call_cli, student_bytes, tiny_values, write_config
from tests.tiny_models import TinyModels


def test_a_step_that_began_again_is_told_and_counted_and_changes_nothing(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, terms = 0, TorchLearner._terms

    def lacking(learner: TorchLearner, *arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return terms(learner, *arguments)

    for name in ("spared", "lacking"):
        values = tiny_values(tiny_models, tmp_path / name, {"steps": 3})
        file = write_config(tmp_path / f"{name}.yaml", values)
        if name == "lacking":
            monkeypatch.setattr(TorchLearner, "_terms", lacking)
        result = call_cli("run", "--config", file)
        assert result.code == 0, result.err
        told = "the learner ran out of memory in step 2 and began it again" in result.out
        assert told == (name == "lacking")
    assert "micro-batches of at most" in result.out
    counted = [
        line.get("train/memory_retries") for line in read_jsonl(tmp_path / "lacking/metrics.jsonl")
    ]
    assert counted == [None, 1, 0]
    assert student_bytes(tmp_path / "spared") == student_bytes(tmp_path / "lacking")
