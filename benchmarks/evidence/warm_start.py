"""Counts what the warm start cost, with the cost ledger's formulas."""

from collections.abc import Mapping
from typing import Any

from benchmarks.evidence.settings import SETTINGS
from qwen3_distill.config import FullTuning
from qwen3_distill.modeling.flops import (
    TrainedTokens,
    causal_pairs,
    sampling_flops,
    training_flops,
)
from qwen3_distill.modeling.shapes import ModelShape

_PROMPT_TOKENS = {"chain": 30, "multiply": 10, "short": 11}
"""Tokens of a typical prompt."""


def warm_start_flops(models: Mapping[str, Any], setting: str) -> int:
    """FLOPs of the teacher's answers and of the student's steps on them.

    Args:
        models: the content of ``models.json``.
    """
    rows = models["settings"][setting]
    samples, steps = rows["warm_start"]["samples"], rows["warm_start"]["steps"]
    response = round(rows["teacher"]["temperature_1"]["mean_tokens"])
    prompt = _PROMPT_TOKENS[setting]
    sampled = samples * sampling_flops(
        _shape("teacher", models["sizes"]["teacher"]),
        prompt=prompt,
        response=response,
        prefills=True,
    )
    rows_trained = steps * SETTINGS[setting].rollouts_per_step
    work = TrainedTokens(
        tokens=rows_trained * (prompt + response),
        pairs=rows_trained * causal_pairs(prompt + response),
        loss_tokens=rows_trained * response,
        recomputed_loss_tokens=0,
        recomputed_layers=0,
    )
    student = _shape("student", models["sizes"]["student"])
    return sampled + training_flops(student, FullTuning(kind="full"), work)


def _shape(name: str, sizes: Mapping[str, Any]) -> ModelShape:
    return ModelShape(
        name=name,
        vocab_size=264,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=32,
        tied=sizes["tied"],
        context_length=1024,
    )
