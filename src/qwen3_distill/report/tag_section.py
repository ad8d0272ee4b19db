"""The table of a run whose prompts have tags, with a teacher for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.recording import text
from qwen3_distill.recording.records import is_number
from qwen3_distill.report.run_files import RunFiles

_AREA = "by_tag/"
_SHARE = "_share"


@dataclass(frozen=True)
class TagRow:
    """One tag; empty text where nothing was measured."""

    tag: str
    teacher: str
    share: str
    """Share of the rollouts that the steps trained on."""
    before: str
    after: str
    teacher_accuracy: str
    kl: str
    """Mean of the last step over the sampled tokens, in nats a token."""


def tag_rows(run: RunFiles) -> Sequence[TagRow]:
    """Return a row for every tag that a step trained on; empty for a run without tags."""
    keys = {key for step in run.steps for key in step}
    tags = sorted(
        key.removeprefix(_AREA).removesuffix(_SHARE)
        for key in keys
        if key.startswith(_AREA) and key.endswith(_SHARE)
    )
    return [_row(run, tag) for tag in tags]


def _row(run: RunFiles, tag: str) -> TagRow:
    shares = run.values(f"{_AREA}{tag}{_SHARE}")
    distances = run.values(f"{_AREA}{tag}_sampled_kl_nats")
    share = sum(shares) / len(run.steps)  # a step without the tag has no value
    return TagRow(
        tag=tag,
        teacher=teacher_name(run.setting("scoring", "teachers", tag)),
        share=text.percent(share),
        before=_accuracy(run.evaluation("before"), tag),
        after=_accuracy(run.evaluation("after"), tag),
        teacher_accuracy=_accuracy(run.evaluation("teacher"), tag),
        kl=text.number(distances[-1]) if distances else "",
    )


def teacher_name(section: Any) -> str:
    """Return a short name of the teacher, or of several, that a recorded `scoring` describes."""
    if not isinstance(section, Mapping):
        return ""
    teachers, members = section.get("teachers"), section.get("members")
    if isinstance(teachers, Mapping):
        return ", ".join(f"{tag}: {teacher_name(one)}" for tag, one in teachers.items())
    if isinstance(members, list):
        return f"mean of {' and '.join(teacher_name(member) for member in members)}"
    model = section.get("model")
    return Path(model).name if isinstance(model, str) else ""


def _accuracy(record: Mapping[str, Any] | None, tag: str) -> str:
    keys = [f"{name}/{tag}" for name in ("accuracy", "ci_low", "ci_high")]
    if record is None or not all(is_number(record.get(key)) for key in keys):
        return ""
    value, low, high = (record[key] for key in keys)
    return f"{text.percent(value)} ({text.points(low)} to {text.percent(high)})"
