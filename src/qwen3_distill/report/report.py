"""``report.html``: what a run did, on one page that needs no network."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined

from qwen3_distill import __version__
from qwen3_distill.errors import RunFolderError
from qwen3_distill.report.charts import Figure
from qwen3_distill.report.cost_section import cost_section
from qwen3_distill.report.figures import (
    health_figures,
    health_table,
    learning_figures,
    response_figures,
)
from qwen3_distill.report.fleet_section import fleet_table, member_colours
from qwen3_distill.report.prompt_section import prompt_section
from qwen3_distill.report.result_section import result_section, tiles
from qwen3_distill.report.rollout_view import (
    ROLLOUTS_PER_STEP,
    RolloutView,
    gap_legend,
    rollout_groups,
    shown_steps,
)
from qwen3_distill.report.run_files import RunFiles
from qwen3_distill.report.tag_section import tag_rows, teacher_name
from qwen3_distill.report.time_section import STAGE_COLOURS, idle_table, time_figure, time_table
from qwen3_distill.report.timeline import draw_timeline
from qwen3_distill.utils.files import atomic_path

__all__ = ["RolloutView", "shown_steps", "write_report"]


def write_report(
    run_folder: Path | str, rollouts: Sequence[RolloutView], out: Path | str | None = None
) -> Path:
    """Write the page of a run, which may be finished, running or interrupted.

    The page names what an unfinished run does not have yet. It shows rollouts of the first, a
    middle and the last step given, the first few of each.

    Args:
        run_folder: Reads ``config.json``, ``manifest.json``, ``prompt.json``, ``metrics.jsonl``,
            ``evaluations.jsonl``, ``cost.jsonl``, ``summary.json`` and traces where they exist.
        rollouts: Saved rollouts of the run, in any order of steps.
        out: File to write; default ``report.html`` in the run folder.

    Returns:
        The file written.

    Raises:
        RunFolderError: there is no such folder, or ``out`` cannot be written.
        DataError: a file of the run folder is malformed.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a run folder: no such directory")
    target = folder / "report.html" if out is None else Path(out)
    page = _render(RunFiles.load(folder), rollouts)
    with atomic_path(target) as temporary:
        # A config may hold half of a surrogate pair, which UTF-8 has no form for.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return target


def _render(run: RunFiles, rollouts: Sequence[RolloutView]) -> str:
    package = resources.files("qwen3_distill.report")
    source = package.joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        version=__version__,
        title=run.name,
        subtitle=_subtitle(run),
        status=_status(run),
        result=result_section(run),
        tiles=tiles(run),
        tags=tag_rows(run),
        learning=learning_figures(run),
        responses=response_figures(run),
        time_figure=time_figure(run.steps),
        time_table=time_table(run.steps, run.summary),
        timeline=_timeline(run),
        fleet_table=fleet_table(run.steps),
        idle_table=idle_table(run.steps),
        cost=cost_section(run),
        left_out=run.notes,
        health=health_figures(run),
        health_table=health_table(run),
        prompt=prompt_section(run),
        legend=gap_legend(),
        rollout_groups=rollout_groups(rollouts),
        rollouts_per_step=ROLLOUTS_PER_STEP,
        config=None if run.config is None else json.dumps(run.config, indent=2, ensure_ascii=False),
        manifest=_flat(run.manifest),
        has_steps=bool(run.steps),
        has_accuracy=bool(run.student_evaluations),
        finished=run.summary is not None,
    )


def _timeline(run: RunFiles) -> Figure | None:
    if run.timeline is None:
        return None
    return draw_timeline(run.timeline, STAGE_COLOURS | member_colours(list(run.timeline.spans)))


@dataclass(frozen=True)
class _Status:
    kind: Literal["done", "partial"]
    text: str


def _status(run: RunFiles) -> _Status:
    if run.summary is not None:
        return _Status("done", f"finished, {run.summary.get('steps', run.last_step):,} steps")
    if run.last_step is None:
        return _Status("partial", "not finished: no step was recorded")
    total = run.setting("steps")
    of = f" of {total:,}" if isinstance(total, int) else ""
    return _Status("partial", f"not finished: {run.last_step:,}{of} steps recorded")


def _subtitle(run: RunFiles) -> list[tuple[str, str]]:
    student, teacher = run.setting("student", "model"), teacher_name(run.setting("scoring"))
    pairs = (
        ("student", Path(student).name if isinstance(student, str) else None),
        ("teacher", teacher or None),
        ("objective", run.setting("objective", "kind")),
        ("tuning", run.setting("training", "tuning", "kind")),
        ("pipeline", run.setting("pipeline", "kind")),
        ("seed", run.setting("seed")),
    )
    return [(name, str(value)) for name, value in pairs if value is not None]


def _flat(content: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of nested JSON with their dotted paths."""
    if content is None and not prefix:
        return []
    if isinstance(content, Mapping) and content:
        return [
            leaf
            for key, value in content.items()
            for leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, content if isinstance(content, str) else json.dumps(content))]
