"""The model card: every number is one of the run's records, and what is missing is named."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.pipeline.builders import read_json
from tests.unit.export.support import call_export, copy_of


def _card(run: Path, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    call_export(run, "--to", "hf", "--out", out, *arguments)
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_has_the_runs_facts(full_run: Path, tmp_path: Path) -> None:
    front, text = _card(full_run, tmp_path / "out")
    assert front["library_name"] == "transformers"
    assert "on-policy-distillation" in front["tags"]
    summary = read_json(full_run / "summary.json")
    manifest = read_json(full_run / "manifest.json")
    summary["second_accuracy"] = {
        "temperature": 0,
        **{key: {**summary["accuracy"][key], "value": 0.125} for key in ("before", "after")},
    }
    run = copy_of(full_run, tmp_path / "run")
    (run / "summary.json").write_text(json.dumps(summary))
    _, text = _card(run, tmp_path / "second")
    assert "| Teacher, greedy | not measured |" in text
    for row, result in (
        ("Student before, temperature 1", summary["accuracy"]["before"]),
        ("Student after, temperature 1", summary["accuracy"]["after"]),
        ("Teacher, temperature 1", summary["accuracy"]["teacher"]),
        ("Student before, greedy", summary["second_accuracy"]["before"]),
        ("Student after, greedy", summary["second_accuracy"]["after"]),
    ):
        assert (
            f"| {row} | {result['value']:.1%} | {result['ci_low']:.1%} to "
            f"{result['ci_high']:.1%} | {result['num_problems']} | "
            f"{result['samples_per_problem']} |"
        ) in text
    assert "| Steps | 2, each of 2 prompts x 2 samples |" in text
    tokens = summary["tokens"]
    assert f"| Tokens | {tokens['generated']} generated, {tokens['trained']} trained on |" in text
    assert "`sampled_reverse_kl`" in text
    assert manifest["teacher"]["id"] in text
    assert "task `chain`, split `train`" in text
    assert "task `chain`, split `eval`" in text
    for name, version in manifest["starts"][-1]["versions"].items():
        assert f"| {name} | {version} |" in text
    assert "| Staleness of the oldest token | at most 0 steps |" in text
    assert "Other abilities" in text


def test_what_was_not_measured_is_said(lora_run: Path, full_run: Path, tmp_path: Path) -> None:
    _, text = _card(lora_run, tmp_path / "lora")
    assert "## Held-out accuracy\n\nNot measured.\n" in text
    assert "- Accuracy: student before, student after, teacher." in text
    assert "LoRA of rank 2, alpha 4" in text
    run = copy_of(full_run, tmp_path / "run")
    summary = read_json(run / "summary.json")
    summary["accuracy"]["teacher"] = None
    (run / "summary.json").write_text(json.dumps(summary))
    _, text = _card(run, tmp_path / "out")
    assert "| Teacher, temperature 1 | not measured |" in text
    assert "- Accuracy: teacher." in text


def test_a_directory_is_no_hub_id(full_run: Path, tmp_path: Path) -> None:
    """The hub refuses a card whose base_model is none of its models."""
    front, text = _card(full_run, tmp_path / "plain")
    assert "base_model" not in front
    assert str(full_run.parent) not in text  # nor does the card tell where somebody keeps files
    front, _ = _card(full_run, tmp_path / "told", "--base-model", "Qwen/Qwen3-0.6B")
    assert front["base_model"] == "Qwen/Qwen3-0.6B"


def test_a_model_that_the_run_had_from_the_hub_is_the_base_model(
    full_run: Path, tmp_path: Path
) -> None:
    run = copy_of(full_run, tmp_path / "run")
    config, manifest = read_json(run / "config.json"), read_json(run / "manifest.json")
    config["student"]["model"] = "Qwen/Qwen3-0.6B"
    (run / "config.json").write_text(json.dumps(config))
    assert "base_model" not in _card(run, tmp_path / "a")[0]  # it may be a relative path
    commit = {"revision": "main", "commit": "c1899de289a04d12100db370d81485cdf75e47ca"}
    manifest["starts"][-1]["hub"] = {"student": {"repo": "Qwen/Qwen3-0.6B", **commit}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert _card(run, tmp_path / "b")[0]["base_model"] == "Qwen/Qwen3-0.6B"


def test_text_of_a_config_cannot_break_the_table(full_run: Path, tmp_path: Path) -> None:
    run = copy_of(full_run, tmp_path / "run")
    config = read_json(run / "config.json")
    config["student"]["template_arguments"] = {"style": "a | b\nc"}
    (run / "config.json").write_text(json.dumps(config))
    _, text = _card(run, tmp_path / "out")
    assert "style a \\| b c |" in text
