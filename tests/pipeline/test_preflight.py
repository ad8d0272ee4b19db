"""Every prompt that a run may use is checked before the run starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.pipeline.data_checks import check_lengths
from qwen3_distill.pipeline.finding import Status, Verdict
from tests.pipeline.builders import (
    EVALUATION,
    call_cli,
    run_to_end,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import CONTEXT_LENGTH, TinyModels

MATH = {"kind": "math"}
GOOD = [{"prompt": f"3+{i}=", "answer": str(3 + i)} for i in range(6)]
IN_WORDS = GOOD[0] | {"answer": "hello"}
TOO_LONG = GOOD[0] | {"prompt": "3+" * CONTEXT_LENGTH}


def rows_of(file: Path, last: dict[str, str]) -> dict[str, str]:
    """The prompts of a file whose last row is the given one."""
    file.write_text("\n".join(json.dumps(row) for row in [*GOOD, last]))
    return {"kind": "jsonl", "path": str(file), "answer_field": "answer"}


def config_with(
    models: TinyModels, folder: Path, *, trained_on: dict[str, str], held_out: dict[str, str]
) -> Path:
    """The last rows of the training prompts and of the held-out problems."""
    changes: dict[str, Any] = {
        "prompts": rows_of(folder / "train.jsonl", trained_on),
        "verifier": MATH,
        "evaluation": {
            "prompts": rows_of(folder / "held-out.jsonl", held_out),
            "verifier": MATH,
            "num_problems": 2,
            "sampling": {"max_new_tokens": 4},
        },
    }
    return write_config(folder / "config.yaml", tiny_values(models, folder / "run", changes))


@pytest.mark.parametrize(
    ("trained_on", "held_out", "message"),
    [
        (IN_WORDS, GOOD[0], "train.jsonl:6 (numbered from 0): the reference answer 'hello'"),
        (GOOD[0], IN_WORDS, "held-out.jsonl:6 (numbered from 0): the reference answer 'hello'"),
        (TOO_LONG, GOOD[0], "train.jsonl:6 (numbered from 0) has"),
        (GOOD[0], TOO_LONG, "held-out.jsonl:6 (numbered from 0) has"),
    ],
    ids=["training-answer", "held-out-answer", "training-length", "held-out-length"],
)
def test_a_bad_row_is_met_before_the_first_step(
    tiny_models: TinyModels,
    tmp_path: Path,
    trained_on: dict[str, str],
    held_out: dict[str, str],
    message: str,
) -> None:
    config = config_with(tiny_models, tmp_path, trained_on=trained_on, held_out=held_out)
    result = call_cli("run", "--config", config)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    if "reference" in message:
        result = call_cli("config", "check", "--config", config)
        assert result.code == 2
        assert message in result.err
    if "held-out" in message:
        result = call_cli("eval", "--config", config)
        assert result.code == 2
        assert message in result.err
        assert "evaluating" not in result.out


def test_good_rows_are_run(tiny_models: TinyModels, tmp_path: Path) -> None:
    config = config_with(tiny_models, tmp_path, trained_on=GOOD[0], held_out=GOOD[0])
    assert call_cli("config", "check", "--config", config).code == 0
    assert call_cli("run", "--config", config).code == 0


def test_dropped_and_shared_prompts_are_said_and_recorded(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = config_with(tiny_models, tmp_path, trained_on=TOO_LONG, held_out=TOO_LONG)
    drop = ["prompts.too_long=drop", "evaluation.prompts.too_long=drop"]
    assert call_cli("run", "--config", config, drop[0]).code == 2
    result = call_cli("run", "--config", config, *drop)
    assert result.code == 0, result.err
    assert "note: 1 of 7 prompts do not fit the context" in result.err
    assert "note: evaluation: 1 of 7 prompts do not fit the context" in result.err
    shared = "2 of 2 held-out problems are also training prompts, e.g. held-out.jsonl:0 is "
    assert shared in result.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["starts"][0]["data"] == {
        "prompts": {"used": 6, "dropped_too_long": 1},
        "evaluation.prompts": {"used": 6, "dropped_too_long": 1, "also_in_training": 2},
    }
    result = call_cli("config", "check", "--config", config)
    assert result.code == 0
    assert shared in result.err


def test_the_first_prompt_is_the_first_that_is_not_dropped(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in (TOO_LONG, *GOOD)))
    changes = {"prompts": {"kind": "jsonl", "path": str(rows)}}
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, tmp_path / "run", changes))
    assert call_cli("config", "check", "--config", config).code == 2
    drop = "prompts.too_long=drop"
    result = call_cli("config", "check", "--config", config, drop)
    assert result.code == 0, result.err
    assert "rows.jsonl:1" in result.out
    assert call_cli("run", "--config", config, drop).code == 0
    record = json.loads((tmp_path / "run" / "prompt.json").read_text())
    assert record["prompt_id"] == "rows.jsonl:1"


def test_a_servers_longest_sequence_is_a_limit_on_what_the_teacher_reads(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    scoring = {"kind": "vllm", "model": str(tiny_models.teacher)}
    long_answers = EVALUATION | {"sampling": {"max_new_tokens": 200}}

    def found(max_model_tokens: int, **teacher: bool) -> Verdict:
        changes = {
            "scoring": scoring | {"max_model_tokens": max_model_tokens},
            "evaluation": long_answers | teacher,
        }
        return check_lengths(tiny_config(tiny_models, tmp_path / "run", changes))

    short = found(8, teacher=False)
    assert short.status is Status.FAIL
    assert "scoring.max_model_tokens is 8" in short.found
    assert found(100, teacher=False).status is not Status.FAIL  # it reads no held-out answers
    assert found(100, teacher=True).status is Status.FAIL


def test_run_warns_of_a_slow_gpu_and_goes_on(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "device speed: the clock under load is 850 MHz"
    monkeypatch.setattr("qwen3_distill.pipeline.run.speed_notes", lambda config, say: [slow])
    warned: list[str] = []
    run_to_end(tiny_config(tiny_models, tmp_path / "run", {"steps": 1}), warned.append)
    assert warned == [slow]
