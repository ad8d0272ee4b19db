"""The model card of an export: what the run's own records say, and what nobody measured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen3_distill.config import LoraTuning
from qwen3_distill.export.finished_run import FinishedRun

CARD = "README.md"
_LIBRARY = {"hf": "transformers", "adapter": "peft", "gguf": "gguf"}
_ACCURACY_ROWS = (
    ("Student before", "before"),
    ("Student after", "after"),
    ("Teacher", "teacher"),
)


def write_card(
    folder: Path,
    run: FinishedRun,
    *,
    to: str,
    base_model: str | None,
    contents: Sequence[str],
    not_measured: Sequence[str],
) -> None:
    """Write ``README.md``.

    Args:
        to: the kind of export.
        base_model: hub id of the model that the student started from, if it is known.
        contents: paragraphs on what the export holds and what was checked of it.
        not_measured: what is not known of this kind of export.
    """
    parts = [
        _front_matter(to, base_model),
        f"# {run.name}\n",
        f"{_model(run.config.student.model)}, {_how_trained(run)} with qwen3-distill "
        f"{run.last_start.get('versions', {}).get('qwen3_distill', '(version not recorded)')}.\n",
        "## What this is\n",
        *(f"{paragraph}\n" for paragraph in contents),
        "## Held-out accuracy\n",
        _accuracy(run),
        "## How it was made\n",
        _table(("", ""), _run_rows(run)),
        "## Versions and machine\n",
        _table(("", ""), _version_rows(run.last_start)),
        "## Not measured\n",
        "\n".join(f"- {line}" for line in (*not_measured, *_gaps(run))) + "\n",
    ]
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8")


def hub_base_model(run: FinishedRun) -> str | None:
    """Hub id that the run's student was loaded from; None where it was a local directory.

    The manifest records the commit of a model from the hub. A path may look like a hub id, so
    the name alone does not tell.
    """
    student = (run.last_start.get("hub") or {}).get("student") or {}
    return student.get("repo")


def _front_matter(to: str, base_model: str | None) -> str:
    tags = ["qwen3-distill", "on-policy-distillation", "distillation"]
    if to != "hf":
        tags.append({"adapter": "lora", "gguf": "gguf"}[to])
    values: dict[str, Any] = {
        "library_name": _LIBRARY[to],
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if base_model is not None:
        values["base_model"] = base_model
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _accuracy(run: FinishedRun) -> str:
    accuracy = run.summary.get("accuracy") or {}
    evaluation = run.config.evaluation
    if evaluation is None or not any(accuracy.get(key) for _, key in _ACCURACY_ROWS):
        return "Not measured.\n"
    sampling = evaluation.sampling
    measured = [(sampling.temperature, accuracy)]
    second = run.summary.get("second_accuracy")
    if second:
        measured.append((second["temperature"], second))
    rows = [
        (f"{name}, {_decoding(temperature)}", *_measured(found.get(key)))
        for temperature, found in measured
        for name, key in _ACCURACY_ROWS
    ]
    return (
        f"Problems: {_data(evaluation.prompts)}; checked by {_settings(evaluation.verifier)}; "
        f"at most {sampling.max_new_tokens:,} new tokens. "
        "Intervals are 95% over problems. Measured by the engines of the run.\n\n"
        + _table(("", "Accuracy", "95% interval", "Problems", "Samples each"), rows)
    )


def _decoding(temperature: float) -> str:
    return f"temperature {temperature:g}" if temperature else "greedy"


def _measured(result: Mapping[str, Any] | None) -> tuple[str, ...]:
    if result is None:
        return ("not measured", "", "", "")
    return (
        f"{result['value']:.1%}",
        f"{result['ci_low']:.1%} to {result['ci_high']:.1%}",
        f"{result['num_problems']:,}",
        f"{result['samples_per_problem']:,}",
    )


def _run_rows(run: FinishedRun) -> list[tuple[str, str]]:
    config, tokens = run.config, run.summary.get("tokens") or {}
    generated, trained = tokens.get("generated"), tokens.get("trained")
    rows = [
        ("Student", _model(config.student.model)),
        ("Teacher", _teacher(run)),
        ("Objective", _settings(config.objective)),
        ("Data", _data(config.prompts)),
        (
            "Sampling",
            f"temperature {config.sampling.temperature:g}, at most "
            f"{config.sampling.max_new_tokens:,} new tokens{_template_arguments(run)}",
        ),
        (
            "Steps",
            f"{run.summary.get('steps')}, each of {config.prompts_per_step} prompts x "
            f"{config.samples_per_prompt} samples",
        ),
        ("Tokens", f"{_count(generated)} generated, {_count(trained)} trained on"),
        ("Trained weights", _tuning(run)),
        ("Optimizer", _optimizer(run)),
        ("Pipeline", f"{config.pipeline.kind}; replay {'off' if config.replay is None else 'on'}"),
    ]
    lags = [record["weights/lag_steps"] for record in run.metrics if "weights/lag_steps" in record]
    if lags:
        rows.append(("Staleness of the oldest token", f"at most {max(lags):g} steps"))
    return rows


def _version_rows(start: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Package versions of the process that finished the run."""
    rows = [(name, str(version)) for name, version in start.get("versions", {}).items()]
    for engine, found in start.get("engines", {}).items():
        rows.append((f"{engine}'s environment", _pairs(found)))
    machine, code = start.get("machine", {}), start.get("code") or {}
    rows.append(("GPU", str(machine.get("gpu") or "none")))
    rows.append(("Processor", str(machine.get("cpu", "not recorded"))))
    if code.get("commit"):
        changed = ", with changes" if code.get("dirty") else ""
        rows.append(("Code", f"commit {code['commit']}{changed}"))
    return rows


def _gaps(run: FinishedRun) -> list[str]:
    accuracy = run.summary.get("accuracy") or {}
    missing = [name for name, key in _ACCURACY_ROWS if not accuracy.get(key)]
    lines = [f"Accuracy: {', '.join(missing).lower()}."] if missing else []
    if len(missing) < len(_ACCURACY_ROWS):
        lines.append("Accuracy on any other data, or sampled in any other way, than stated above.")
    lines.append("Other abilities, other languages, safety: nothing was tested.")
    return lines


def _how_trained(run: FinishedRun) -> str:
    """``distilled on-policy from X``; what is true of a run that has no teacher, or samples it."""
    teachers = run.config.loaded_teachers
    if not teachers:
        return f"trained without a teacher (objective.kind={run.config.objective.kind})"
    is_on_policy = run.config.rollouts.source == "student" and run.config.pipeline.kind != "offline"
    how = "distilled on-policy from" if is_on_policy else "distilled from"
    return f"{how} {' and '.join(dict.fromkeys(_model(one.section.model) for one in teachers))}"


def _teacher(run: FinishedRun) -> str:
    teachers, recorded = run.config.loaded_teachers, run.manifest.get("teacher") or {}
    if not teachers:
        return "none"
    identity = f", recorded as `{recorded['id']}`" if recorded.get("id") else ""
    if len(teachers) == 1:
        return f"{_model(teachers[0].section.model)} ({teachers[0].section.kind}{identity})"
    named = (f"{one.name}: {_model(one.section.model)} ({one.section.kind})" for one in teachers)
    return "; ".join(named) + identity


def _tuning(run: FinishedRun) -> str:
    training = run.config.training
    if not isinstance(training.tuning, LoraTuning):
        return f"all, {training.dtype} ({training.kind})"
    tuning = training.tuning
    return (
        f"LoRA of rank {tuning.rank}, alpha {tuning.alpha:g} on "
        f"{', '.join(tuning.target_modules)}; {training.dtype} ({training.kind})"
    )


def _optimizer(run: FinishedRun) -> str:
    optimizer = run.config.training.optimizer
    return f"AdamW, learning rate {optimizer.learning_rate:g}, schedule {optimizer.schedule.kind}"


def _template_arguments(run: FinishedRun) -> str:
    arguments = run.config.student.template_arguments
    return f"; chat template with {_pairs(arguments)}" if arguments else ""


def _model(name: str) -> str:
    """Show a relative path in full, an absolute one by its last part, without the home folder."""
    shown = Path(name).name if Path(name).is_absolute() else name
    return f"`{shown}`"


def _data(prompts: Any) -> str:
    if prompts.kind == "task":
        return f"the procedural task `{prompts.task}`, split `{prompts.split}`"
    parts = [f"{prompts.kind} {_model(prompts.path)}"]
    for key in ("name", "split", "revision", "limit"):
        if getattr(prompts, key, None) is not None:
            parts.append(f"{key} `{getattr(prompts, key)}`")
    return ", ".join(parts)


def _settings(section: Any) -> str:
    """Format a section: its `kind`, then its other settings."""
    values = section.model_dump(mode="json", exclude_none=True)
    rest = {key: value for key, value in values.items() if key != "kind"}
    return f"`{section.kind}`" + (f" ({_pairs(rest)})" if rest else "")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    )


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not recorded"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
