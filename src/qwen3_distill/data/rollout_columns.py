"""The columns of rollout files: their types, and how a record's field becomes a column's value.

The columns are the fields of `qwen3_distill.types.Rollout`, flattened; the types document them. A
file of scored rollouts adds the teacher's columns.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qwen3_distill.errors import DataError
from qwen3_distill.types import (
    FinishReason,
    HiddenScore,
    Rollout,
    TeacherScore,
    TokenSpan,
    TopKScore,
    VersionSpan,
    WeightVersion,
)

OLDEST_READABLE = 2
"""Oldest schema version that is read."""

KINDS: dict[str, type[TeacherScore]] = {
    "sampled": TeacherScore,
    "top_k": TopKScore,
    "hidden": HiddenScore,
}
KIND_OF_SCORE = {score: kind for kind, score in KINDS.items()}


class Item(NamedTuple):
    """A row as records."""

    step: int
    rollout: Rollout
    response_text: str
    score: TeacherScore | None = None
    score_kind: str | None = None


# --- Values of columns ----------------------------------------------------------------------------


def _unchanged(value: Any) -> Any:
    return value


def _scalar(value: pa.Scalar) -> Any:
    return value.as_py()


def _vector(value: pa.Scalar) -> np.ndarray:
    return value.values.to_numpy(zero_copy_only=False)


def _ids_or_none(value: pa.Scalar) -> np.ndarray | None:
    return _vector(value) if len(value) else None


def _matrix(value: pa.Scalar) -> np.ndarray:
    lines = value.values
    if lines is None:
        raise DataError("is null, but score_kind asks for it")
    lengths = np.unique(np.diff(lines.offsets.to_numpy()))
    if len(lengths) != 1:
        raise DataError(f"has lines of {lengths.tolist()} values, not of one")
    return lines.flatten().to_numpy(zero_copy_only=False).reshape(len(lines), -1)


def _sampled_rows(spans: Sequence[TokenSpan]) -> list[dict[str, int]]:
    return [{"start": span.start, "stop": span.stop} for span in spans]


def _sampled_spans(value: pa.Scalar) -> tuple[TokenSpan, ...]:
    if not len(value):
        raise DataError("has no span, expected at least one")
    return tuple(TokenSpan(start=row["start"], stop=row["stop"]) for row in value.as_py())


def _version_rows(spans: Sequence[VersionSpan]) -> list[dict[str, Any]]:
    return [
        {"start": s.start, "stop": s.stop, "step": s.version.step, "digest": s.version.digest}
        for s in spans
    ]


def _version_spans(value: pa.Scalar) -> tuple[VersionSpan, ...]:
    return tuple(
        VersionSpan(
            start=row["start"],
            stop=row["stop"],
            version=WeightVersion(step=row["step"], digest=row["digest"]),
        )
        for row in value.as_py()
    )


# --- The columns ----------------------------------------------------------------------------------


class Column(NamedTuple):
    name: str
    type: pa.DataType
    path: str
    """The field of `Item`, e.g. ``rollout.prompt.token_ids``."""
    write: Callable[[Any], Any] = _unchanged
    """Converts the field's value to the column's."""
    read: Callable[[pa.Scalar], Any] = _scalar
    """Converts the column's value to the field's."""
    since: int = OLDEST_READABLE
    """Schema version that introduced the column."""
    nullable: bool = False
    """Null where the row's kind of score does not have the field."""

    @property
    def record(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def field(self) -> str:
        return self.path.rpartition(".")[2]


_STRING, _INT32, _FLOAT32 = pa.string(), pa.int32(), pa.float32()
_IDS, _FLOATS = pa.list_(_INT32), pa.list_(_FLOAT32)
_SPAN = [("start", _INT32), ("stop", _INT32)]
_SPANS = pa.list_(pa.struct(_SPAN))
_VERSIONS = pa.list_(pa.struct([*_SPAN, ("step", pa.int64()), ("digest", _STRING)]))
_TASK_DATA = pa.map_(_STRING, _STRING)

ROLLOUT_COLUMNS = (
    Column("step", pa.int64(), "step"),  # that the rollout was drawn for
    Column("rollout_id", _STRING, "rollout.rollout_id"),
    Column("prompt_id", _STRING, "rollout.prompt.prompt_id"),
    Column("prompt_ids", _IDS, "rollout.prompt.token_ids", read=_vector),
    Column(
        "task_data",
        _TASK_DATA,
        "rollout.prompt.task_data",
        lambda task_data: list(task_data.items()),
        lambda value: dict(value.as_py()),
    ),
    Column(  # what the teacher reads in place of prompt_ids; empty: the same
        "teacher_prompt_ids",
        _IDS,
        "rollout.prompt.teacher_ids",
        lambda ids: [] if ids is None else ids,
        _ids_or_none,
        since=5,
    ),
    Column("temperature", pa.float64(), "rollout.sampling.temperature"),
    Column("top_p", pa.float64(), "rollout.sampling.top_p"),
    Column("top_k", _INT32, "rollout.sampling.top_k"),
    Column("max_new_tokens", _INT32, "rollout.sampling.max_new_tokens"),
    Column("seed", pa.uint64(), "rollout.sampling.seed"),
    Column("response_ids", _IDS, "rollout.response_ids", read=_vector),
    Column("sampled", _SPANS, "rollout.sampled", _sampled_rows, _sampled_spans, since=3),
    Column("behavior_logprobs", _FLOATS, "rollout.behavior_logprobs", read=_vector),
    Column(
        "finish_reason",  # stop | length | harvested
        _STRING,
        "rollout.finish_reason",
        lambda reason: reason.value,
        lambda value: FinishReason(value.as_py()),
    ),
    Column("continues_at", _INT32, "rollout.continues_at"),
    Column("versions", _VERSIONS, "rollout.versions", _version_rows, _version_spans),
    Column(  # empty: the student sampled it
        "sampled_by_teacher",
        _STRING,
        "rollout.teacher_id",
        lambda teacher_id: teacher_id or "",
        lambda value: value.as_py() or None,
        since=4,
    ),
    Column("response_text", _STRING, "response_text"),  # for people; never read back
)
SCORE_COLUMNS = (
    Column("score_kind", _STRING, "score_kind"),  # a key of `KINDS`
    Column("teacher_id", _STRING, "score.teacher_id"),
    Column("teacher_logprobs", _FLOATS, "score.logprobs", read=_vector),
    Column("candidate_ids", pa.list_(_IDS), "score.candidate_ids", read=_matrix, nullable=True),
    Column(
        "candidate_logprobs",
        pa.list_(_FLOATS),
        "score.candidate_logprobs",
        read=_matrix,
        nullable=True,
    ),
    Column("hidden", pa.list_(_FLOATS), "score.hidden", read=_matrix, nullable=True),
)
SCORED_COLUMNS = (*ROLLOUT_COLUMNS, *SCORE_COLUMNS)


def schema_of(columns: Iterable[Column]) -> pa.Schema:
    return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in columns])


ROLLOUT_SCHEMA = schema_of(ROLLOUT_COLUMNS)
"""Columns of a rollout file."""
SCORED_SCHEMA = schema_of(SCORED_COLUMNS)
"""Columns of a file of scored rollouts. Such a file is a rollout file too."""
