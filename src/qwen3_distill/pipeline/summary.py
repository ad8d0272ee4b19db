"""Builds a run's summary and its report from the run folder alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_distill.config import RunConfig
from qwen3_distill.data.rollout_files import read_training
from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.loading import tokenizer_digest
from qwen3_distill.pipeline.assembly.data import build_checker
from qwen3_distill.pipeline.manifest import recorded_identity
from qwen3_distill.pipeline.models import localize_again
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.pipeline.rollout_store import saved_rollouts
from qwen3_distill.pipeline.run_folder import RunFolder
from qwen3_distill.recording.cost_records import read_cost
from qwen3_distill.recording.jsonl import (
    OCCASIONAL_STAGES,
    STEP_STAGES,
)
from qwen3_distill.recording.records import read_evaluations, read_steps
from qwen3_distill.report.report import RolloutView, shown_steps, write_report
from qwen3_distill.types import (
    Rollout,
    ScoredRollout,
    TrainingRollout,
)

_SCORED = {"loss/reverse_kl_nats", "loss/forward_kl_nats"}
"""Metrics of steps whose rollouts a teacher scored."""


def summarize(folder: RunFolder, total_wall_s: float) -> dict[str, Any]:
    """Compute the content of ``summary.json`` from the run's records."""
    steps = read_steps(folder.metrics)
    evaluations = read_evaluations(folder.evaluations)
    first = [record for record in evaluations if "temperature" not in record]
    second = [record for record in evaluations if "temperature" in record]
    wall_s: dict[str, float] = {
        stage: sum(record.get(f"time/{stage}_s", 0.0) for record in steps)
        for stage in (*STEP_STAGES, "checkpoint")
    }
    wall_s["evaluate"] = sum(
        record.get("time/evaluate_s", record["wall_s"]) for record in evaluations
    )
    # Time in which several stages ran counts once.
    busy_s = sum(wall_s.values()) - sum(_overlap_s(record) for record in steps)
    wall_s["other"] = max(0.0, total_wall_s - busy_s)
    wall_s["total"] = total_wall_s
    generated = sum(int(record["tokens/generated"]) for record in steps)
    trained = sum(int(record["tokens/trained"]) for record in steps)
    cost = read_cost(folder.path)
    scored = generated if any(_SCORED & record.keys() for record in steps) else 0
    return {
        "accuracy": _accuracies(first),
        **({"second_accuracy": _second_accuracy(second)} if second else {}),
        "steps": len(steps),
        "tokens": {"generated": generated, "scored": scored, "trained": trained},
        "wall_s": wall_s,
        "cost": None if cost is None else cost.record(),
    }


def _overlap_s(record: Mapping[str, Any]) -> float:
    """Seconds by which the sum of a step's stage times exceeds the time in which any ran."""
    if "time/step_s" not in record:
        return 0.0
    stages = (*STEP_STAGES, *OCCASIONAL_STAGES)
    busy_s = record["time/step_s"] * (1.0 - record["idle/all_fraction"])
    return sum(record[f"time/{stage}_s"] for stage in stages) - busy_s


def _accuracies(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The student's first and last accuracy, and the teacher's."""
    students = [record for record in evaluations if record["model"].startswith("student")]
    teachers = [record for record in evaluations if record["model"].startswith("teacher")]
    return {
        "before": _accuracy(students[:1]),
        "after": _accuracy(students[-1:]),
        "teacher": _accuracy(teachers[:1]),
    }


def _second_accuracy(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"temperature": evaluations[0]["temperature"], **_accuracies(evaluations)}


def _accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The accuracy of the first record; None if there is none."""
    for record in records:
        keys = ("ci_low", "ci_high", "num_problems", "samples_per_problem")
        return {"value": record["accuracy"], **{key: record[key] for key in keys}}
    return None


def render_report(
    path: Path,
    config: RunConfig,
    out: Path | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write ``report.html`` from a run folder's files; return its path.

    Args:
        say: told when no tokenizer of the run is left, so that tokens appear as their ids.
    """
    text = find_text_tools(path, config)
    if text is None:
        say(
            f"tokens are shown as their ids: neither {path / 'student'} nor "
            f"student.model={config.student.model} has the run's tokenizer"
        )
    is_correct = build_checker(config.verifier, text) if config.verifier and text else None
    views = [
        _rollout_view(
            step, scored, text, None if is_correct is None else is_correct(scored.rollout)
        )
        for file in shown_steps(saved_rollouts(path / "rollouts"))
        for step, scored in read_training(file)
    ]
    return write_report(path, views, out)


def find_text_tools(path: Path, config: RunConfig) -> TextTools | None:
    """Return a run's tokenizer: its trained student's, else that of the config's student.

    The second one counts only if it is the one that the manifest records; the directory may have
    been replaced since, or be another one under the same relative path. None if there is neither.
    """
    recorded = recorded_identity(path)
    for directory in _tokenizer_directories(path, config):
        text = TextTools(str(directory))
        try:
            digest = tokenizer_digest(text.tokenizer)
        except ModelError:
            continue
        if directory.parent == path or recorded is None or digest == recorded.tokenizer_digest:
            return text
    return None


def _tokenizer_directories(path: Path, config: RunConfig) -> Iterator[Path]:
    yield path / "student"
    # The hub is asked only where the first one does not do.
    local = localize_again(config, path / "manifest.json", roles=("student",), datasets=False)
    yield Path(local.config.student.model)


def _rollout_view(
    step: int, scored: TrainingRollout, text: TextTools | None, correct: float | None
) -> RolloutView:
    rollout: Rollout = scored.rollout
    prompt, response = rollout.prompt.token_ids.tolist(), rollout.response_ids.tolist()
    return RolloutView(
        step=step,
        rollout_id=rollout.rollout_id,
        prompt_text=text.decode(prompt) if text else _as_ids(prompt),
        tokens=text.decode_each(response) if text else tuple(f"{token} " for token in response),
        behavior_logprobs=np.asarray(rollout.behavior_logprobs).tolist(),
        teacher_logprobs=np.asarray(scored.score.logprobs).tolist()
        if isinstance(scored, ScoredRollout)
        else None,
        sampled_by=rollout.sampled_by,
        finish_reason=rollout.finish_reason.value,
        correct=correct,
    )


def _as_ids(token_ids: Sequence[int]) -> str:
    return "token ids, without a tokenizer: " + " ".join(map(str, token_ids))
