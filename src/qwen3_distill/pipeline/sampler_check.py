"""Compares the weights that sampled a file's rollouts with the student that is to learn."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from qwen3_distill.config import RunConfig
from qwen3_distill.config.base import Dtype
from qwen3_distill.errors import ConfigError, DataError
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.types import Rollout, WeightVersion
from qwen3_distill.weights.directory import published_digest


def require_ratio_off_policy(config: RunConfig) -> None:
    """Check that the objective corrects for rollouts of other weights.

    Raises:
        ConfigError: it does not.
    """
    objective = config.objective
    if objective.lacks_ratio:
        raise ConfigError(
            f"--off-policy with objective.{objective.ratio_setting}: tokens that another model "
            "sampled give a biased gradient without the importance ratio; set "
            f"objective.{objective.ratio_key}"
        )


def check_sampled_by_student(
    rollouts: Sequence[Rollout], file: Path, config: RunConfig, start: WeightVersion
) -> None:
    """Check that the student's initial weights sampled every token.

    A directory that was sampled in another dtype than it is trained in is the same student.

    Args:
        start: the learner's version before its first step.

    Raises:
        DataError: names the weights that sampled, those of the student, and the ways out.
    """
    sampled_by = {span.version.digest for rollout in rollouts for span in rollout.versions}
    strangers = sampled_by - {start.digest}
    for dtype in get_args(Dtype) if strangers else ():
        strangers -= {published_digest(config.student.model, dtype=resolve_dtype(dtype))}
    if not strangers:
        return
    count = sum(
        any(span.version.digest in strangers for span in rollout.versions) for rollout in rollouts
    )
    way_out = (
        ""
        if config.objective.lacks_ratio
        else ", or pass --off-policy: the objective then corrects for the difference as far as its "
        "importance ratio reaches"
    )
    raise DataError(
        f"{file}: {count} of {len(rollouts)} rollouts were sampled by other weights than those of "
        f"student.model={config.student.model}: digest {', '.join(sorted(strangers)[:3])}, the "
        f"student has {start.digest}; use the student that sampled them{way_out}"
    )
