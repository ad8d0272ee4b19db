"""Rollouts as Parquet files: for people (pandas, polars, duckdb) and for reading back exactly.

One row per rollout. The columns are the fields of `qwen3_distill.types.Rollout`, flattened; the
types document them. A file of scored rollouts adds the teacher's columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_distill.data.rollout_columns import (
    KIND_OF_SCORE,
    KINDS,
    OLDEST_READABLE,
    ROLLOUT_COLUMNS,
    SCORE_COLUMNS,
    SCORED_COLUMNS,
    Column,
    Item,
    schema_of,
)
from qwen3_distill.errors import AlignmentError, DataError
from qwen3_distill.types import (
    HiddenScore,
    Prompt,
    Rollout,
    SamplingSpec,
    ScoredRollout,
    TopKScore,
    TrainingRollout,
)
from qwen3_distill.utils.files import atomic_path
from qwen3_distill.utils.shown import shortened

Decode: TypeAlias = Callable[[Sequence[int]], str]

SCHEMA_VERSION = 5
"""Schema number of the files that are written.

Older files are read too. Those of version 2 have no column ``sampled``: their responses were
sampled as a whole. Those of version 2 and 3 have no column ``sampled_by_teacher``: the student
sampled them. Those before version 5 have no column ``teacher_prompt_ids``: the teacher read the
student's prompt."""
VERSION_KEY = b"qwen3_distill.rollouts.schema_version"
"""Key of the Parquet metadata that holds the file's schema version."""


# --- Writing --------------------------------------------------------------------------------------


def write_rollouts(
    path: str | Path, step_rollouts: Sequence[tuple[int, Rollout]], decode: Decode
) -> None:
    """Write (step, rollout) pairs as one Parquet file, whole or not at all.

    Args:
        decode: Token ids to text, for the column that people read.

    Raises:
        RunFolderError: the file cannot be written.
    """
    items = [
        Item(step, rollout, decode(rollout.response_ids.tolist()))
        for step, rollout in step_rollouts
    ]
    _write(path, items, ROLLOUT_COLUMNS)


def write_scored(
    path: str | Path, step_scored: Sequence[tuple[int, ScoredRollout]], decode: Decode
) -> None:
    """Write (step, scored rollout) pairs; see `write_rollouts`."""
    items = [
        Item(
            step,
            scored.rollout,
            decode(scored.rollout.response_ids.tolist()),
            scored.score,
            KIND_OF_SCORE[type(scored.score)],  # a KeyError is a kind without columns
        )
        for step, scored in step_scored
    ]
    _write(path, items, SCORED_COLUMNS)


def write_training(
    path: str | Path, rollouts: Sequence[tuple[int, TrainingRollout]], decode: Decode
) -> None:
    """Write (step, rollout) pairs with their scores, or without if any has none."""
    scored = [(step, item) for step, item in rollouts if isinstance(item, ScoredRollout)]
    if len(scored) == len(rollouts):
        write_scored(path, scored, decode)
    else:
        write_rollouts(path, [(step, item.rollout) for step, item in rollouts], decode)


def _write(path: str | Path, items: Sequence[Item], columns: Sequence[Column]) -> None:
    metadata = {VERSION_KEY: str(SCHEMA_VERSION).encode()}
    table = pa.Table.from_arrays(
        [_array(column, items) for column in columns],
        schema=schema_of(columns).with_metadata(metadata),
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def _array(column: Column, items: Sequence[Item]) -> pa.Array:
    field = attrgetter(column.path)
    if not column.nullable:
        return pa.array([column.write(field(item)) for item in items], column.type)
    values = [field(item) if column.field in _fields(type(item.score)) else None for item in items]
    return _matrices(values, column.type.value_type.value_type)


def _fields(score: Any) -> set[str]:
    return {field.name for field in fields(score)}


def _matrices(values: Sequence[np.ndarray | None], dtype: pa.DataType) -> pa.Array:
    """One matrix or null per row, built from buffers: hidden states are large."""
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


# --- Reading --------------------------------------------------------------------------------------


def read_rollouts(path: str | Path, *, vocab_size: int | None = None) -> list[tuple[int, Rollout]]:
    """Read the (step, rollout) pairs of a rollout file or a scored one, bit for bit as written.

    Columns that the schema does not name are ignored.

    Args:
        vocab_size: of the model that reads the token ids; None: none does.

    Raises:
        DataError: no such file, not a whole file of a schema version that can be read, a missing
            column, a column of another type or with nulls, a row that is no rollout, one rollout
            twice in a step, or a token id outside of the vocabulary.
    """
    path = Path(path)
    records = _read(path, ROLLOUT_COLUMNS, _rollout)
    _check_together(path, [(step, rollout) for step, rollout in records])
    for row, (_, rollout) in enumerate(records):
        _check_vocabulary(f"{path}, row {row}", _id_arrays(rollout), vocab_size)
    return records


def read_scored(
    path: str | Path, *, vocab_size: int | None = None, hidden_size: int | None = None
) -> list[tuple[int, ScoredRollout]]:
    """Read the (step, scored rollout) pairs of a file by `write_scored`; see `read_rollouts`.

    Args:
        vocab_size: of the model that reads the token ids; None: none does.
        hidden_size: of the teacher whose head reads hidden states; None: none does.

    Raises:
        DataError: as `read_rollouts`, or hidden states of another size.
    """
    path = Path(path)
    records = _read(path, SCORED_COLUMNS, _scored)
    _check_together(path, [(step, scored.rollout) for step, scored in records])
    for row, (_, scored) in enumerate(records):
        where, arrays = f"{path}, row {row}", _id_arrays(scored.rollout)
        if isinstance(scored.score, TopKScore):
            arrays["candidate_ids"] = scored.score.candidate_ids
        _check_vocabulary(where, arrays, vocab_size)
        if isinstance(scored.score, HiddenScore) and hidden_size is not None:
            found = scored.score.hidden.shape[1]
            if found != hidden_size:
                raise DataError(
                    f"{where} has hidden states of {found} numbers, expected the teacher's "
                    f"{hidden_size}; score the rollouts with the config's teacher"
                )
    return records


def _id_arrays(rollout: Rollout) -> dict[str, Any]:
    arrays = {"prompt_ids": rollout.prompt.token_ids, "response_ids": rollout.response_ids}
    if rollout.prompt.teacher_ids is not None:
        arrays["teacher_prompt_ids"] = rollout.prompt.teacher_ids
    return arrays


def _check_vocabulary(where: str, arrays: Mapping[str, Any], vocab_size: int | None) -> None:
    for name, ids in arrays.items():
        if vocab_size is not None and int(ids.max()) >= vocab_size:
            raise DataError(
                f"{where} has the token id {int(ids.max())} in {name}, expected ids below the "
                f"student's vocabulary of {vocab_size}; the file is of another model"
            )


def _check_together(path: Path, rollouts: Sequence[tuple[int, Rollout]]) -> None:
    """Check what rows say together: steps, and that no step has a rollout twice."""
    seen: dict[tuple[int, str, int], int] = {}
    for row, (step, rollout) in enumerate(rollouts):
        if step < 0:
            raise DataError(f"{path}, row {row} is of step {step}, expected 0 or more")
        key = (step, rollout.rollout_id, rollout.continues_at)
        if key in seen:
            raise DataError(
                f"{path}, row {row} is rollout {rollout.rollout_id} of step {step} again, which "
                f"row {seen[key]} has; remove one of them"
            )
        seen[key] = row


def read_training(
    path: str | Path, *, vocab_size: int | None = None, hidden_size: int | None = None
) -> list[tuple[int, TrainingRollout]]:
    """Read the (step, rollout) pairs of either kind of file, with scores where it has them.

    The arguments and errors are those of `read_scored`.
    """
    has_scores = "score_kind" in _columns_of(Path(path))
    if has_scores:
        return [*read_scored(path, vocab_size=vocab_size, hidden_size=hidden_size)]
    rollouts = read_rollouts(path, vocab_size=vocab_size)
    return [(step, TrainingRollout(rollout=rollout)) for step, rollout in rollouts]


def _columns_of(path: Path) -> list[str]:
    try:
        return pq.read_schema(path.absolute()).names
    except (pa.ArrowException, OSError, ValueError):  # ValueError: names that are not UTF-8
        return []  # the reader says what is wrong with it


class _Row:
    """One row of a file; a column is converted when it is asked for."""

    def __init__(self, columns: dict[str, Column], arrays: dict[str, pa.Array], row: int) -> None:
        self._columns = columns
        self._arrays = arrays
        self._row = row

    def __getitem__(self, name: str) -> Any:
        try:
            return self._columns[name].read(self._arrays[name][self._row])
        except DataError as error:
            raise DataError(f"column {name!r} {error}") from error

    def fields(self, record: str) -> dict[str, Any]:
        """The fields of the record at a path, by name."""
        return {c.field: self[c.name] for c in self._columns.values() if c.record == record}


def _rollout(row: _Row) -> Rollout:
    return Rollout(
        prompt=Prompt(**row.fields("rollout.prompt")),
        sampling=SamplingSpec(**row.fields("rollout.sampling")),
        **row.fields("rollout"),
    )


def _scored(row: _Row) -> ScoredRollout:
    rollout, kind = _rollout(row), row["score_kind"]
    if kind not in KINDS:
        raise DataError(f"score_kind is {kind!r}, expected {list(KINDS)}")
    wanted = _fields(KINDS[kind])
    columns = [c for c in SCORE_COLUMNS if c.record == "score" and c.field in wanted]
    score = KINDS[kind](**{column.field: row[column.name] for column in columns})
    return ScoredRollout(rollout=rollout, score=score)


def _read(
    path: Path, columns: Sequence[Column], build: Callable[[_Row], Any]
) -> list[tuple[int, Any]]:
    found, arrays = _checked_columns(path, columns)
    records: list[tuple[int, Any]] = []
    for index in range(len(arrays["step"])):
        row = _Row(found, arrays, index)
        try:
            records.append((row["step"], build(row)))
        except (AlignmentError, DataError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}, row {index} is not a valid record ({error}); write the file again"
            ) from error
    return records


def _checked_columns(
    path: Path, columns: Sequence[Column]
) -> tuple[dict[str, Column], dict[str, pa.Array]]:
    """The file's columns: types and version checked, no nulls but those that are allowed."""
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"rollout file {path} {state}; check the path")
    try:
        with pq.ParquetFile(path.absolute(), page_checksum_verification=True) as file:
            version = _schema_version(path, file.schema_arrow)
            expected = {column.name: column for column in columns if column.since <= version}
            _check_types(path, file.schema_arrow, expected)
            table = file.read(columns=list(expected))
            table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({shortened(str(error))}); expected a whole, "
            "undamaged file, write it again"
        ) from error
    arrays = {name: table.column(name).combine_chunks() for name in expected}
    for name, array in arrays.items():
        nulls = _count_nulls(array) - (array.null_count if expected[name].nullable else 0)
        if nulls:
            raise DataError(f"{path}: column {name!r} has {nulls} nulls, expected none")
    return expected, arrays


def _count_nulls(array: pa.Array) -> int:
    """Count nulls at every level: unseen, a null id would become a number on its way to numpy."""
    if isinstance(array, pa.StructArray):
        return array.null_count + sum(_count_nulls(child) for child in array.flatten())
    if isinstance(array, pa.MapArray):
        return array.null_count + _count_nulls(array.keys) + _count_nulls(array.items)
    if isinstance(array, pa.ListArray):
        return array.null_count + _count_nulls(array.flatten())
    return array.null_count


def _schema_version(path: Path, schema: pa.Schema) -> int:
    found = (schema.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")
    readable = {str(number): number for number in range(OLDEST_READABLE, SCHEMA_VERSION + 1)}
    if found not in readable:
        raise DataError(
            f"{path} has rollout schema version {found or 'none'!r}, expected "
            f"{' or '.join(map(repr, readable))}; read it with the version of this package that "
            "wrote it"
        )
    return readable[found]


def _check_types(path: Path, found: pa.Schema, expected: dict[str, Column]) -> None:
    for name, column in expected.items():
        if name not in found.names:
            kind = "a file of scored rollouts" if "score_kind" in expected else "a rollout file"
            raise DataError(
                f"{path} has no column {name!r}, which {kind} needs; its columns are {found.names}"
            )
        actual = found.field(name).type
        if actual != column.type:
            raise DataError(f"{path}: column {name!r} is of type {actual}, expected {column.type}")
