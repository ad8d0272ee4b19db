"""The arms: what differs between the runs of one setting, as settings of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from benchmarks.learning.controls import constant, shuffled
from qwen3_distill.pipeline.parts import Parts

_TOP_16 = {"kind": "top_k", "k": 16}
_SAMPLED = {
    "kind": "sampled_reverse_kl",
    "advantage_clip": 2.0,
    "kl_baseline": {"kind": "top_k", "k": 16},
}
_TEACHER = {"source": "teacher"}
_EPOCHS = 5
"""Passes of the arms that collect once."""


def _as_built(parts: Parts) -> Parts:
    return parts


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the student."""

    objective: Mapping[str, Any]
    rollouts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    epochs: int = 1
    """More than one: the rollouts of the first ``steps / epochs`` steps, again and again."""
    prefix_share: float | None = None
    """Most rollouts end after this share of ``max_new_tokens``."""
    samples_per_prompt: int = 1
    teacher: str | None = "teacher"
    """Directory of the teacher; None: the arm has none."""
    adapt: Callable[[Parts], Parts] = _as_built
    """Replaces parts of the run: a control without a signal."""
    tuned_as: str | None = None
    """The arm whose learning rate this one takes over, so that one thing differs."""


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "sft_hard": Arm(objective={"kind": "sft"}, rollouts=_TEACHER),
        "sft_hard_epochs": Arm(objective={"kind": "sft"}, rollouts=_TEACHER, epochs=_EPOCHS),
        "sft_soft": Arm(objective={**_TOP_16, "divergence": "forward_kl"}, rollouts=_TEACHER),
        "opd_sampled": Arm(objective=_SAMPLED),
        "opd_topk16": Arm(objective=_TOP_16),
        "opd_full_reverse": Arm(objective={"kind": "full"}),
        "opd_full_forward": Arm(objective={"kind": "full", "divergence": "forward_kl"}),
        "opd_prefix": Arm(objective=_TOP_16, prefix_share=0.4),
        "offline_opd": Arm(objective=_TOP_16, epochs=_EPOCHS),
        "mixture": Arm(objective=_TOP_16, rollouts={"source": "mixture", "teacher_share": 0.5}),
        "grpo": Arm(objective={"kind": "grpo"}, samples_per_prompt=8, teacher=None),
        "weak_teacher": Arm(objective=_TOP_16, teacher="weak_teacher", tuned_as="opd_topk16"),
        # A baseline would bring the real candidates back into the controls.
        "control_constant": Arm(
            objective={**_SAMPLED, "kl_baseline": {"kind": "none"}},
            adapt=constant,
            tuned_as="opd_sampled",
        ),
        "control_shuffled": Arm(
            objective={**_SAMPLED, "kl_baseline": {"kind": "none"}},
            adapt=shuffled,
            tuned_as="opd_sampled",
        ),
    }
)
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
"""The tuning trials of every arm with a rate of its own."""


def arm_sections(arm: Arm, *, steps: int, rollouts_per_step: int, max_new: int) -> dict[str, Any]:
    """Return the sections of a config in which this arm differs from the others."""
    sections: dict[str, Any] = {
        "objective": dict(arm.objective),
        "prompts_per_step": rollouts_per_step // arm.samples_per_prompt,
        "samples_per_prompt": arm.samples_per_prompt,
    }
    if arm.rollouts:
        sections["rollouts"] = dict(arm.rollouts)
    if arm.epochs > 1:
        collected = -(-steps // arm.epochs)
        sections["pipeline"] = {"kind": "offline", "collect_steps": collected}
    if arm.prefix_share is not None:
        tokens = max(2, round(arm.prefix_share * max_new))
        sections["pipeline"] = {
            "kind": "streaming",
            "max_staleness_steps": 0,
            "weight_updates": "boundary",
            "prefix": {"tokens": tokens, "full_length_fraction": 0.25},
        }
    return sections


def tuned_name(name: str) -> str:
    """The arm whose trials choose the learning rate of this one."""
    return ARMS[name].tuned_as or name
