"""Rollouts as Parquet files: for people (pandas, polars, duckdb) and for reading back exactly.

One row per rollout. The columns are those of `qwen3_distill.types.Rollout`, flattened, so what a
column means is written there; `SCORED_SCHEMA` adds the teacher's.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_distill.errors import AlignmentError, DataError
from qwen3_distill.types import (
    FinishReason,
    HiddenScore,
    Prompt,
    Rollout,
    SamplingSpec,
    ScoredRollout,
    TeacherScore,
    TopKScore,
    VersionSpan,
    WeightVersion,
)
from qwen3_distill.utils.files import atomic_path

Decode: TypeAlias = Callable[[Sequence[int]], str]

SCHEMA_VERSION = "2"
VERSION_KEY = b"qwen3_distill.rollouts.schema_version"
"""Key of the Parquet metadata that holds `SCHEMA_VERSION`."""

_IDS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_SPAN = pa.struct(
    [("start", pa.int32()), ("stop", pa.int32()), ("step", pa.int64()), ("digest", pa.string())]
)

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),  # that the rollout was drawn for
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("task_data", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("temperature", pa.float64(), nullable=False),
        pa.field("top_p", pa.float64(), nullable=False),
        pa.field("top_k", pa.int32(), nullable=False),
        pa.field("max_new_tokens", pa.int32(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("response_ids", _IDS, nullable=False),
        pa.field("behavior_logprobs", _FLOATS, nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),  # stop | length | harvested
        pa.field("continues_at", pa.int32(), nullable=False),
        pa.field("versions", pa.list_(_SPAN), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),  # for people; never read back
    ]
)
"""Columns of a rollout file."""

SCORED_SCHEMA = pa.schema(
    [
        *ROLLOUT_SCHEMA,
        pa.field("score_kind", pa.string(), nullable=False),  # sampled | top_k | hidden
        pa.field("teacher_id", pa.string(), nullable=False),
        pa.field("teacher_logprobs", _FLOATS, nullable=False),
        pa.field("candidate_ids", pa.list_(_IDS)),  # top_k only, else null; [R, K]
        pa.field("candidate_logprobs", pa.list_(_FLOATS)),  # top_k only, else null; [R, K]
        pa.field("hidden", pa.list_(_FLOATS)),  # hidden only, else null; [R, D]
    ]
)
"""Columns of a file of scored rollouts. Such a file is a rollout file too."""

_KIND_OF_SCORE: dict[type[TeacherScore], str] = {
    TeacherScore: "sampled",
    TopKScore: "top_k",
    HiddenScore: "hidden",
}


def write_rollouts(
    path: str | Path, step_rollouts: Sequence[tuple[int, Rollout]], decode: Decode
) -> None:
    """Write (step, rollout) pairs as one Parquet file, whole or not at all.

    Args:
        decode: Token ids to text, for the column that people read.

    Raises:
        RunFolderError: the file cannot be written.
    """
    _write(path, _rollout_columns(step_rollouts, decode), ROLLOUT_SCHEMA)


def write_scored(
    path: str | Path, step_scored: Sequence[tuple[int, ScoredRollout]], decode: Decode
) -> None:
    """Like `write_rollouts`, with the teacher's scores."""
    columns = _rollout_columns([(step, scored.rollout) for step, scored in step_scored], decode)
    columns |= _score_columns([scored.score for _, scored in step_scored])
    _write(path, columns, SCORED_SCHEMA)


def read_rollouts(path: str | Path) -> list[tuple[int, Rollout]]:
    """The (step, rollout) pairs of a rollout file or a scored one, bit for bit as written.

    Columns that the schema does not name are ignored.

    Raises:
        DataError: no such file, not a whole file of this schema version, a missing column, a
            column of another type or with nulls, or a row that is no rollout.
    """
    columns = _read(Path(path), ROLLOUT_SCHEMA)
    return _records(Path(path), columns, _rollout)


def read_scored(path: str | Path) -> list[tuple[int, ScoredRollout]]:
    """The (step, scored rollout) pairs of a file by `write_scored`; see `read_rollouts`."""
    columns = _read(Path(path), SCORED_SCHEMA)
    return _records(Path(path), columns, _scored)


# --- Writing --------------------------------------------------------------------------------------

_Columns: TypeAlias = dict[str, Any]


def _rollout_columns(step_rollouts: Sequence[tuple[int, Rollout]], decode: Decode) -> _Columns:
    rollouts = [rollout for _, rollout in step_rollouts]
    return {
        "step": [step for step, _ in step_rollouts],
        "rollout_id": [r.rollout_id for r in rollouts],
        "prompt_id": [r.prompt.prompt_id for r in rollouts],
        "prompt_ids": [r.prompt.token_ids for r in rollouts],
        "task_data": [list(r.prompt.task_data.items()) for r in rollouts],
        "temperature": [r.sampling.temperature for r in rollouts],
        "top_p": [r.sampling.top_p for r in rollouts],
        "top_k": [r.sampling.top_k for r in rollouts],
        "max_new_tokens": [r.sampling.max_new_tokens for r in rollouts],
        "seed": [r.sampling.seed for r in rollouts],
        "response_ids": [r.response_ids for r in rollouts],
        "behavior_logprobs": [r.behavior_logprobs for r in rollouts],
        "finish_reason": [r.finish_reason.value for r in rollouts],
        "continues_at": [r.continues_at for r in rollouts],
        "versions": [[_span_row(span) for span in r.versions] for r in rollouts],
        "response_text": [decode(r.response_ids.tolist()) for r in rollouts],
    }


def _span_row(span: VersionSpan) -> dict[str, Any]:
    version = span.version
    return {
        "start": span.start,
        "stop": span.stop,
        "step": version.step,
        "digest": version.digest,
    }


def _score_columns(scores: Sequence[TeacherScore]) -> _Columns:
    top_k = [score if isinstance(score, TopKScore) else None for score in scores]
    hidden = [score.hidden if isinstance(score, HiddenScore) else None for score in scores]
    return {
        # A KeyError here is a new kind of score that has no columns yet.
        "score_kind": [_KIND_OF_SCORE[type(score)] for score in scores],
        "teacher_id": [score.teacher_id for score in scores],
        "teacher_logprobs": [score.logprobs for score in scores],
        "candidate_ids": _matrices([s and s.candidate_ids for s in top_k], pa.int32()),
        "candidate_logprobs": _matrices([s and s.candidate_logprobs for s in top_k], pa.float32()),
        "hidden": _matrices(hidden, pa.float32()),
    }


def _matrices(values: Sequence[np.ndarray | None], dtype: pa.DataType) -> pa.Array:
    """One [R, K] matrix or null per row, built from buffers: hidden states are large."""
    matrices = [value for value in values if value is not None]
    flat = np.concatenate([m.ravel() for m in matrices]) if matrices else np.empty(0)
    lines = pa.ListArray.from_arrays(
        _offsets([m.shape[1] for m in matrices for _ in range(len(m))]), pa.array(flat, dtype)
    )
    return pa.ListArray.from_arrays(
        _offsets([0 if value is None else len(value) for value in values]),
        lines,
        mask=pa.array([value is None for value in values], pa.bool_()),
    )


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int32())


def _write(path: str | Path, columns: _Columns, schema: pa.Schema) -> None:
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, schema.field(name).type)
        for name, column in columns.items()
    ]
    named = pa.table(arrays, names=list(columns)).select(schema.names).cast(schema)
    table = named.replace_schema_metadata({VERSION_KEY: SCHEMA_VERSION.encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


# --- Reading --------------------------------------------------------------------------------------


def _read(path: Path, schema: pa.Schema) -> dict[str, pa.Array]:
    """The columns of ``schema``: types and version checked, no nulls but those it allows."""
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"rollout file {path} {state}; check the path")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_schema(path, file.schema_arrow, schema)
            table = file.read(columns=schema.names)
            table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({error}); expected a whole, undamaged file, write "
            "it again"
        ) from error
    columns = {name: table.column(name).combine_chunks() for name in schema.names}
    for name, column in columns.items():
        nulls = _count_nulls(column) - (column.null_count if schema.field(name).nullable else 0)
        if nulls:
            raise DataError(f"{path}: column {name!r} has {nulls} nulls, expected none")
    return columns


def _count_nulls(array: pa.Array) -> int:
    """Nulls at every level. Unseen, a null token id would become a number on its way to numpy."""
    if isinstance(array, pa.StructArray):
        return array.null_count + sum(_count_nulls(child) for child in array.flatten())
    if isinstance(array, pa.MapArray):
        return array.null_count + _count_nulls(array.keys) + _count_nulls(array.items)
    if isinstance(array, pa.ListArray):
        return array.null_count + _count_nulls(array.flatten())
    return array.null_count


def _check_schema(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    version = (found.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has rollout schema version {version or 'none'!r}, expected {SCHEMA_VERSION!r};"
            " read it with the version of this package that wrote it"
        )
    for field in expected:
        if field.name not in found.names:
            kind = "a file of scored rollouts" if expected is SCORED_SCHEMA else "a rollout file"
            raise DataError(
                f"{path} has no column {field.name!r}, which {kind} needs; its columns are "
                f"{found.names}"
            )
        actual = found.field(field.name).type
        if actual != field.type:
            raise DataError(
                f"{path}: column {field.name!r} is of type {actual}, expected {field.type}"
            )


def _records(
    path: Path, columns: dict[str, pa.Array], build: Callable[["_Row"], Any]
) -> list[tuple[int, Any]]:
    records: list[tuple[int, Any]] = []
    for index in range(len(columns["step"])):
        row = _Row(columns, index)
        try:
            records.append((row.scalar("step"), build(row)))
        except (AlignmentError, DataError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}, row {index} is not a valid record ({error}); write the file again"
            ) from error
    return records


class _Row:
    def __init__(self, columns: dict[str, pa.Array], index: int) -> None:
        self._columns = columns
        self._index = index

    def scalar(self, name: str) -> Any:
        return self._columns[name][self._index].as_py()

    def vector(self, name: str) -> np.ndarray:
        return self._columns[name][self._index].values.to_numpy(zero_copy_only=False)

    def matrix(self, name: str) -> np.ndarray:
        lines = self._columns[name][self._index].values
        if lines is None:
            raise DataError(f"column {name!r} is null, but score_kind asks for it")
        lengths = np.unique(np.diff(lines.offsets.to_numpy()))
        if len(lengths) != 1:
            raise DataError(f"column {name!r} has lines of {lengths.tolist()} values, not of one")
        return lines.flatten().to_numpy(zero_copy_only=False).reshape(len(lines), -1)


def _rollout(row: _Row) -> Rollout:
    return Rollout(
        rollout_id=row.scalar("rollout_id"),
        prompt=Prompt(
            prompt_id=row.scalar("prompt_id"),
            token_ids=row.vector("prompt_ids"),
            task_data=dict(row.scalar("task_data")),
        ),
        sampling=SamplingSpec(
            temperature=row.scalar("temperature"),
            top_p=row.scalar("top_p"),
            top_k=row.scalar("top_k"),
            max_new_tokens=row.scalar("max_new_tokens"),
            seed=row.scalar("seed"),
        ),
        response_ids=row.vector("response_ids"),
        behavior_logprobs=row.vector("behavior_logprobs"),
        versions=_spans(row.scalar("versions")),
        finish_reason=FinishReason(row.scalar("finish_reason")),
        continues_at=row.scalar("continues_at"),
    )


def _spans(rows: Iterable[dict[str, Any]]) -> tuple[VersionSpan, ...]:
    return tuple(
        VersionSpan(
            start=row["start"],
            stop=row["stop"],
            version=WeightVersion(step=row["step"], digest=row["digest"]),
        )
        for row in rows
    )


def _scored(row: _Row) -> ScoredRollout:
    return ScoredRollout(rollout=_rollout(row), score=_score(row))


def _score(row: _Row) -> TeacherScore:
    kind = row.scalar("score_kind")
    teacher_id, logprobs = row.scalar("teacher_id"), row.vector("teacher_logprobs")
    if kind == _KIND_OF_SCORE[TopKScore]:
        return TopKScore(
            teacher_id=teacher_id,
            logprobs=logprobs,
            candidate_ids=row.matrix("candidate_ids"),
            candidate_logprobs=row.matrix("candidate_logprobs"),
        )
    if kind == _KIND_OF_SCORE[HiddenScore]:
        return HiddenScore(teacher_id=teacher_id, logprobs=logprobs, hidden=row.matrix("hidden"))
    if kind != _KIND_OF_SCORE[TeacherScore]:
        raise DataError(f"score_kind is {kind!r}, expected {list(_KIND_OF_SCORE.values())}")
    return TeacherScore(teacher_id=teacher_id, logprobs=logprobs)
