"""The LoRA of a run alone, in peft's layout, from its last checkpoint."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.config import LoraTuning
from qwen3_distill.errors import CheckpointError, ConfigError, ModelError
from qwen3_distill.export.finished_run import FinishedRun
from qwen3_distill.export.logits import largest_difference, probe_ids, probe_logits
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.directory import weight_files
from qwen3_distill.modeling.loading import load_model, resolve_dtype
from qwen3_distill.utils.json_text import read_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference of logits between base with adapter, merged in the training dtype, and
``student/``. Another device may round a merged bfloat16 weight the other way."""


def require_lora(run: FinishedRun) -> LoraTuning:
    """The run's LoRA settings.

    Raises:
        ConfigError: all weights were trained.
    """
    tuning = run.config.training.tuning
    if not isinstance(tuning, LoraTuning):
        raise ConfigError(
            f"the run in {run.path} trained all weights (training.tuning.kind is "
            f"{tuning.kind!r}), so there is no adapter; use --to hf or gguf"
        )
    return tuning


def read_adapter(run: FinishedRun) -> dict[str, Tensor]:
    """The adapter of the run's last step, under peft's names.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of other weights than ``student/``.
    """
    checkpoint = _last_checkpoint(run)
    try:
        _check_files(checkpoint)
        cursor = read_json(checkpoint / "cursor.json")
        step, digest = cursor["step"], cursor["weight_version"]["digest"]
        saved = load_file(checkpoint / "weights.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error}") from error
    steps = run.summary.get("steps")
    if step != steps:
        raise CheckpointError(
            f"the newest checkpoint, {checkpoint}, is of step {step}, and the run ended at step "
            f"{steps}; restore the checkpoint of the last step"
        )
    adapter = {_peft_name(name): tensor.contiguous() for name, tensor in saved.items()}
    # A run that served adapters records their digest, one that served merged weights the model's.
    if digest not in (weights_digest(adapter), weights_digest(_tensors(run.student))):
        raise CheckpointError(
            f"{checkpoint} is of weight version {digest}, and neither its adapter nor "
            f"{run.student} has that digest: they are not of one run; restore the one that was "
            "changed"
        )
    return adapter


def write_adapter(
    folder: Path, adapter: dict[str, Tensor], tuning: LoraTuning, base_model: str
) -> None:
    """Write the two files that peft reads."""
    save_file(adapter, folder / WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # pyright: ignore[reportArgumentType] - annotated int
        lora_dropout=tuning.dropout,
        target_modules=list(tuning.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    values = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def check_adapter(run: FinishedRun, folder: Path) -> float | None:
    """Largest difference of logits between the base with the adapter and ``student/``.

    Both are computed in float32 on the CPU, after the adapter is merged in the training dtype.

    Returns:
        None where the base is not at hand, so that nothing was compared.

    Raises:
        ModelError: they differ by more than `TOLERANCE`.
    """
    if not Path(run.config.student.model).is_dir():
        return None
    dtype = run.config.training.dtype
    cpu = torch.device("cpu")
    base = load_model(run.config.student.model, device=cpu, dtype=resolve_dtype(dtype))
    ids = probe_ids(base.config)
    merged: Any = PeftModel.from_pretrained(base, str(folder)).merge_and_unload(safe_merge=True)
    found = probe_logits(merged.float(), ids)
    del base, merged
    student = load_model(run.student, device=cpu, dtype=torch.float32)
    difference = largest_difference(found, probe_logits(student, ids))
    if not difference <= TOLERANCE[dtype]:
        raise ModelError(
            f"the adapter on {run.config.student.model} differs from {run.student} by "
            f"{difference:.3g} in its logits, expected at most {TOLERANCE[dtype]:g}: that "
            "directory no longer holds the weights that the run started from; restore them"
        )
    return difference


def _last_checkpoint(run: FinishedRun) -> Path:
    steps = {
        int(path.name.removeprefix("step-")): path
        for path in run.checkpoints.glob("step-*")
        if path.name.removeprefix("step-").isdecimal()
    }
    if not steps:
        raise CheckpointError(
            f"{run.checkpoints} has no checkpoint, which the adapter is read from; restore it, or "
            "use --to hf"
        )
    return steps[max(steps)]


def _check_files(checkpoint: Path) -> None:
    """Compare the files that are read with the digests that were recorded of them."""
    digests = read_json(checkpoint / "files.json")
    for name in ("cursor.json", "weights.safetensors"):
        found = hashlib.sha256()
        with (checkpoint / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
        if found.hexdigest() != digests[name]:
            raise CheckpointError(f"{checkpoint / name} does not match its digest: it was changed")


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace(".default.", ".")


def _tensors(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                yield name, handle.get_tensor(name)
