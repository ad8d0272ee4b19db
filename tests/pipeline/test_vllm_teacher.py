"""Whole runs with the teacher in a vLLM server: of the stand-in, and of the real vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract.served_adapter import VLLM_STAND_IN, Served
from tests.pipeline.builders import call_cli, read_json, tiny_values, write_config
from tests.tiny_models import TinyModels

VLLM = [
    pytest.param(VLLM_STAND_IN, id="stand_in"),
    pytest.param(Served("vllm", "real"), id="real", marks=pytest.mark.vllm),
]


def values_of(models: TinyModels, folder: Path, served: Served, **changes: Any) -> dict[str, Any]:
    config = served.config(models.teacher)
    scoring = config.model_dump(exclude_defaults=True)
    scoring |= {"kind": "vllm", "device": config.device, "quantization": None}
    return tiny_values(models, folder / "run", {"scoring": scoring, "steps": 2, **changes})


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("served", VLLM)
def test_a_run_trains_as_with_the_embedded_teacher(
    tiny_models: TinyModels, tmp_path: Path, served: Served
) -> None:
    top_k = {"kind": "top_k", "k": 4}
    for name, scoring in (("served", None), ("embedded", "embedded")):
        folder = tmp_path / name
        folder.mkdir()
        values = values_of(tiny_models, folder, served, objective=top_k)
        if scoring:
            values["scoring"] = tiny_values(tiny_models, folder)["scoring"]
        file = write_config(folder / "config.yaml", values)
        result = call_cli("run", "--config", file)
        assert result.code == 0, result.err
    ours, theirs = steps_of(tmp_path / "served"), steps_of(tmp_path / "embedded")
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss/objective"] == pytest.approx(other["loss/objective"], abs=1e-4)


@pytest.mark.parametrize("served", VLLM)
def test_the_teacher_samples_what_is_trained_on(
    tiny_models: TinyModels, tmp_path: Path, served: Served
) -> None:
    values = values_of(
        tiny_models, tmp_path, served, rollouts={"source": "teacher"}, objective={"kind": "sft"}
    )
    result = call_cli("run", "--config", write_config(tmp_path / "config.yaml", values))
    assert result.code == 0, result.err
    assert len(steps_of(tmp_path)) == 2


def test_the_audit_compares_it_with_the_unquantized_teacher(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "config.yaml", values_of(tiny_models, tmp_path, VLLM_STAND_IN))
    out = tmp_path / "audit.json"
    result = call_cli("audit-teacher", "--config", file, "--num", "3", "--out", out)
    assert (result.code, result.err) == (0, "")
    record = read_json(out)
    assert "@vllm-float32" in record["served"]
    assert record["mean_abs_nats"] < 1e-4
