"""Reads the rows of JSON Lines files, compressed or not, and of Parquet files."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from qwen3_distill.config import ContextConfig, ParquetPrompts
from qwen3_distill.data.sources.fields import Row, check_columns, wanted_columns
from qwen3_distill.errors import DataError, DistillError
from qwen3_distill.utils.json_text import unique_pairs
from qwen3_distill.utils.shown import shortened, shown

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read, also of a compressed file."""
MAX_BLANK_LINES = 10_000
"""Most blank lines at a file's end."""


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON Lines file, which may be compressed (``.gz``, ``.zst``)."""
    _require_file(path)
    first_blank: int | None = None  # an error only if a row follows: files may end in blank lines
    # Lines are split as bytes: text mode would also split at a lone carriage return.
    with _opened(path) as file:
        lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB, expected "
                    "one JSON object on every line"
                )
            if not line.strip():
                first_blank = first_blank or number
                if number - first_blank >= MAX_BLANK_LINES:
                    raise DataError(
                        f"{path} has more than {MAX_BLANK_LINES:,} blank lines from line "
                        f"{first_blank} on; remove them"
                    )
                continue
            if first_blank is not None:
                raise DataError(
                    f"{path}, line {first_blank} is blank, expected one JSON object on every line; "
                    "remove the line"
                )
            yield f"{path}, line {number}", _json_object(line, f"{path}, line {number}")


def _json_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        # A float would change the digits of a reference answer.
        value = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=unique_pairs, parse_float=Decimal
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}), expected one JSON "
            "object on every line"
        ) from error
    except (ValueError, ArithmeticError, RecursionError) as error:
        # a key twice, a number or a nesting too large
        reason = shortened(str(error))
        raise DataError(f"{where} cannot be read as JSON ({reason}); correct the line") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{where} is a JSON {type(value).__name__}, expected an object such as "
            '{"prompt": "..."}'
        )
    return value


def parquet_rows(
    path: Path, config: ParquetPrompts, context: ContextConfig | None = None
) -> Iterator[Row]:
    """Yield the rows of a Parquet file; only the columns that the config names are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_file(path)
    try:
        with pq.ParquetFile(path.absolute()) as file:
            names = file.schema_arrow.names
            check_columns(names, config, str(path), context)
            columns = wanted_columns(config, names, context)
            _refuse_duplicate_columns(names, columns, str(path))
            for number, row in enumerate(_batched_rows(file, columns, str(path))):
                yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError, *_NO_PYTHON_VALUE) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as Parquet ({shortened(str(error))}); expected a whole Parquet "
            "file, write it again"
        ) from error


def _refuse_duplicate_columns(names: list[str], wanted: list[str], file_name: str) -> None:
    """Raise if two columns have the name of one that is read: the last one would be taken."""
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(
                f"{file_name} has {names.count(name)} columns named {shown(name)}; expected one, "
                "rename or remove the others"
            )


def _with_own_digits(column: Any) -> Any:
    """Return a column of short floats as decimals: a float32 0.1 is 0.1, not 0.10000000149."""
    import pyarrow as pa

    if column.type not in (pa.float16(), pa.float32()):
        return column
    digits = [None if value is None else float(str(value)) for value in column.to_numpy(False)]
    return pa.array(digits, pa.float64(), mask=column.is_null().to_numpy(False))


_NO_PYTHON_VALUE = (ValueError, OverflowError, TypeError, ArithmeticError, LookupError)


def _batched_rows(file: Any, columns: list[str], file_name: str) -> Iterator[Mapping[str, Any]]:
    """Yield rows in pieces of bounded size; a value that Python has no form for is an error."""
    import pyarrow as pa

    first = 0
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        try:
            rows = pa.record_batch(
                [_with_own_digits(column) for column in batch.columns], batch.schema.names
            ).to_pylist()
        except _NO_PYTHON_VALUE as error:  # a date beyond year 9999, bytes that are no UTF-8
            raise DataError(
                f"{file_name}, rows {first} to {first + batch.num_rows - 1}: a value of the "
                f"columns {shown(columns)} cannot be read ({type(error).__name__}: "
                f"{shortened(str(error), 200)}); correct it, or name other columns"
            ) from error
        yield from rows
        first += batch.num_rows


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed where its name says that it is compressed.

    Raises:
        DataError: it is not whole, or not compressed as its name says.
    """
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    if kind is None:
        try:
            with path.open("rb") as file:
                yield file
        except OSError as error:
            if isinstance(error, DistillError):
                raise
            raise DataError(f"prompt file {path} cannot be read: {error.strerror}") from error
        return
    import pyarrow as pa

    try:
        if kind == "gzip":
            with gzip.open(path, "rb") as file:
                yield io.BufferedReader(file)
        else:
            if not pa.Codec.is_available(kind):
                raise DataError(
                    f"{path} is compressed with zstd, which this pyarrow was built without; "
                    "decompress the file with `zstd -d`, or install pyarrow from its wheel"
                )
            with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, kind) as stream:
                yield io.BufferedReader(stream)  # pyright: ignore[reportArgumentType]
    except (pa.ArrowException, EOFError, OSError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be decompressed ({error}); expected a whole {kind} file, write it again"
        ) from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        state = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(f"prompt file {path} {state}, expected a file; change prompts.path")
