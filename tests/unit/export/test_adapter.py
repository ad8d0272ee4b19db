"""The LoRA of a run alone: read by peft onto its base it is the student."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen3_distill.export.logits import probe_ids, probe_logits
from tests.pipeline.builders import LORA, run_to_end, tiny_config
from tests.tiny_models import TinyModels
from tests.unit.export.support import call_export, contents, copy_of, refused

TOLERANCE = 1e-3
"""Tolerance for logits, merged in the training dtype."""


def _load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_reads_the_adapter_onto_the_base_and_gets_the_student(
    tiny_models: TinyModels, lora_run: Path, tmp_path: Path, dtype: str
) -> None:
    run = lora_run
    if dtype != "float32":
        run = tmp_path / "run"
        changes = {"steps": 1, "training.tuning": LORA, "training.dtype": dtype}
        changes["training.optimizer"] = {"learning_rate": 0.05}
        run_to_end(tiny_config(tiny_models, run, changes))
    before = contents(run)
    out = tmp_path / "out"
    said = call_export(run, "--to", "adapter", "--out", out)
    assert "max abs logit difference" in said
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_models.student)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 4.0, "LORA")

    base: Any = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"], dtype=getattr(torch, dtype)
    )
    ids = probe_ids(base.config)
    untrained = probe_logits(_load(tiny_models.student), ids)
    merged: Any = PeftModel.from_pretrained(base, str(out)).merge_and_unload(safe_merge=True)
    student = probe_logits(_load(run / "student"), ids)
    assert float((student - untrained).abs().max()) > 10 * TOLERANCE  # there is something to see
    assert float((probe_logits(merged.float(), ids) - student).abs().max()) <= TOLERANCE
    assert contents(run) == before


def test_unmerged_it_gives_the_students_logits_too(lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call_export(lora_run, "--to", "adapter", "--out", out)
    base = _load(json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"])
    ids = probe_ids(base.config)
    with_adapter: Any = PeftModel.from_pretrained(base, str(out)).eval()
    adapted = probe_logits(with_adapter, ids)
    assert float((adapted - probe_logits(_load(lora_run / "student"), ids)).abs().max()) <= 1e-3


def test_full_tuning_has_no_adapter(full_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(full_run, "--to", "adapter", "--out", out, words=("trained all weights", "--to hf"))
    assert not out.exists()


def test_another_base_than_the_runs_is_found_out(
    lora_run: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    run = copy_of(lora_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    base = copy_of(tiny_models.student, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config["student"]["model"] = str(base)
    (run / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    refused(run, "--to", "adapter", "--out", out, words=("differs", "logits", str(base)))
    assert not out.exists()


def test_without_the_base_nothing_is_compared_and_the_card_says_so(
    lora_run: Path, tmp_path: Path
) -> None:
    run = copy_of(lora_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["student"]["model"] = "not/here"
    (run / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert "not compared" in call_export(run, "--to", "adapter", "--out", out)
    assert "Whether the adapter on its base" in (out / "README.md").read_text()


def _spoil_weights(run: Path) -> None:
    file = run / "checkpoints" / "step-000002" / "weights.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)


def _spoil_student(run: Path) -> None:
    file = run / "student" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})


def _remove_checkpoints(run: Path) -> None:
    (run / "checkpoints").rename(run / "elsewhere")


def _end_later(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"steps": 3}))


def _remove_cursor(run: Path) -> None:
    (run / "checkpoints" / "step-000002" / "cursor.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_spoil_weights, ("does not match its digest",)),
        (_spoil_student, ("weight version", "not of one run")),
        (_remove_checkpoints, ("has no checkpoint",)),
        (_end_later, ("is of step 2", "ended at step 3")),
        (_remove_cursor, ("cursor.json", "cannot be read")),
    ],
)
def test_a_checkpoint_that_is_not_the_students_is_refused(
    lora_run: Path, tmp_path: Path, spoil: object, words: tuple[str, ...]
) -> None:
    run = copy_of(lora_run, tmp_path / "run")
    assert callable(spoil)
    spoil(run)
    out = tmp_path / "out"
    refused(run, "--to", "adapter", "--out", out, words=words)
    assert not out.exists()
