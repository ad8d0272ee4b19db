"""The precision audit as a command: served teacher against unquantized one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract.served_adapter import Kind, sglang_config
from tests.pipeline.builders import (
    call_cli,
    read_json,
    refused,
    tiny_values,
    write_config,
)
from tests.tiny_models import TinyModels, write_model


def config_file(models: TinyModels, folder: Path, scoring: dict[str, Any]) -> Path:
    values = tiny_values(models, folder / "run")
    values["scoring"] = scoring
    return write_config(folder / "config.yaml", values)


def served_by(models: TinyModels, kind: Kind) -> dict[str, Any]:
    config = sglang_config(models.teacher, kind)
    return config.model_dump(exclude_defaults=True) | {"kind": "sglang", "device": config.device}


@pytest.mark.parametrize("kind", ["stand_in", pytest.param("real", marks=pytest.mark.sglang)])
def test_a_server_in_full_precision_differs_by_rounding(
    tiny_models: TinyModels, tmp_path: Path, kind: Kind
) -> None:
    file = config_file(tiny_models, tmp_path, served_by(tiny_models, kind))
    out = tmp_path / "audit.json"
    result = call_cli("audit-teacher", "--config", file, "--num", "5", "--out", out)
    assert (result.code, result.err) == (0, "")
    record = read_json(out)
    assert record["num_rollouts"] == 5
    assert record["num_tokens"] <= 5 * 8
    assert "@sglang-float32" in record["served"]
    assert "lower bound" in record["kl_method"]
    assert 0 < record["mean_abs_nats"] < record["p99_abs_nats"] < 1e-4
    assert record["sign_flips"] == 0
    assert abs(record["kl_nats"]) < 1e-6
    assert "mean |difference|" in result.out
    assert "KL(unquantized || served), at least" in result.out


def test_less_precision_shows_in_every_figure(tiny_models: TinyModels, tmp_path: Path) -> None:
    scoring = {"kind": "embedded", "model": str(tiny_models.teacher), "device": "cpu"}
    file = config_file(tiny_models, tmp_path, scoring | {"dtype": "bfloat16"})
    out = tmp_path / "audit.json"
    result = call_cli("audit-teacher", "--config", file, "--num", "12", "--out", out)
    assert result.code == 0
    record = read_json(out)
    assert record["served"].endswith("@bfloat16")
    assert record["unquantized"].endswith("@float32")
    assert 1e-3 < record["mean_abs_nats"] < record["p99_abs_nats"] < 0.5
    assert 1e-7 < record["kl_nats"] < 0.05


def test_a_file_of_rollouts_is_scored_as_it_is(tiny_models: TinyModels, tmp_path: Path) -> None:
    scoring = {"kind": "embedded", "model": str(tiny_models.teacher), "device": "cpu"}
    file = config_file(tiny_models, tmp_path, scoring | {"dtype": "bfloat16"})
    rollouts = tmp_path / "rollouts.parquet"
    assert call_cli("generate", "--config", file, "--out", rollouts, "--num-steps", "2").code == 0
    records = []
    for name in ("once", "again"):
        out = tmp_path / name
        arguments = ("--rollouts", rollouts, "--num", "6", "--out", out)
        assert call_cli("audit-teacher", "--config", file, *arguments).code == 0
        records.append(read_json(out))
    assert records[0] == records[1]
    assert records[0]["num_rollouts"] == 6
    # The same rollouts, sampled anew: the config's first steps.
    out = tmp_path / "sampled"
    assert call_cli("audit-teacher", "--config", file, "--num", "6", "--out", out).code == 0
    assert read_json(out) == records[0]


def test_another_directory_may_be_the_unquantized_one(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    scoring = {"kind": "embedded", "model": str(tiny_models.teacher), "device": "cpu"}
    file = config_file(tiny_models, tmp_path, scoring)
    other = write_model(tmp_path / "other", seed=7)
    out = tmp_path / "audit.json"
    arguments = ("--num", "4", "--out", out, "--unquantized", other)
    assert call_cli("audit-teacher", "--config", file, *arguments).code == 0
    assert read_json(out)["mean_abs_nats"] > 0.5


def test_a_quantized_directory_needs_the_unquantized_one(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    model_dir = write_model(tmp_path / "teacher", seed=1)
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model_dir / "config.json").write_text(json.dumps(config))
    scoring = {"kind": "embedded", "model": str(model_dir), "device": "cpu"}
    file = config_file(tiny_models, tmp_path, scoring)
    refused("audit-teacher", "--config", file, words=["itself quantized", "--unquantized"])


def test_a_missing_rollout_file_is_an_error(tiny_models: TinyModels, tmp_path: Path) -> None:
    scoring = {"kind": "embedded", "model": str(tiny_models.teacher), "device": "cpu"}
    file = config_file(tiny_models, tmp_path, scoring)
    refused(
        "audit-teacher", "--config", file, "--rollouts", tmp_path / "none", words=["does not exist"]
    )
