"""Kind ``prompt_files``: JSON Lines and Parquet files, mutated, read by `build_source`.

A JSON Lines file that is accepted must have given the text that its lines say.
"""

import datetime
import gzip
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.robustness.fuzz.counts import Counts, Progress
from benchmarks.robustness.fuzz.odd_values import (
    ODD_TEXTS,
    mutated_bytes,
    mutated_json,
)
from benchmarks.robustness.fuzz.watch import over_time, raised
from qwen3_distill.config import JsonlPrompts, ParquetPrompts
from qwen3_distill.data.sources import FixedSource, build_source
from qwen3_distill.errors import DistillError

_LIMIT_S = 10.0
_MAX_MESSAGE = 4_000
_ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "What is 6 x 7?", "answer": "42"},
    {"prompt": "Say yes.", "answer": 3.0},
    {"prompt": [{"role": "user", "content": "Hello"}], "answer": "x"},
    {
        "prompt": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
            {"from": "human", "value": "c"},
        ],
        "answer": "1",
    },
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "t"}]}], "answer": 7},
    {"data": {"prompt": "inner", "list": [{"answer": "a"}]}, "prompt": "p", "answer": "q"},
)
_FIELDS = ("prompt", "prompt", "prompt", "data.prompt", "data.list.0.answer", "prompt.-1.content")
_YEAR_20000 = 568_971_820_800


def run(seed: int, count: int) -> Counts:
    """Try ``count`` files."""
    counts, progress, rng = Counts(), Progress("prompt_files", count), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            if rng.random() < 0.15:
                _try_parquet(rng, Path(folder), counts)
            else:
                _try_jsonl(rng, Path(folder), counts)
            progress.show(counts)
    return counts


def _settings(rng: random.Random) -> dict[str, Any]:
    return {
        "prompt_field": rng.choice([*_FIELDS, rng.choice(ODD_TEXTS)]),
        "answer_field": rng.choice(["answer", None, "answer", rng.choice(ODD_TEXTS)]),
        "system": rng.choice([None, None, "Be brief."]),
        "suffix": rng.choice(["", " Answer."]),
        "limit": rng.choice([None, 1, 2**31 - 1]),
    }


def _try_jsonl(rng: random.Random, folder: Path, counts: Counts) -> None:
    rows: list[Any] = [rng.choice(_ROWS) for _ in range(rng.randint(1, 4))]
    at = rng.randrange(len(rows))
    if rng.random() < 0.8:
        rows[at] = mutated_json(rng, rows[at])
    content = "\n".join(json.dumps(row) for row in rows).encode()
    if rng.random() < 0.4:
        content = mutated_bytes(rng, content)
    file = folder / rng.choice(["p.jsonl", "p.jsonl", "p.jsonl.gz"])
    if file.suffix == ".gz":
        packed = gzip.compress(content)
        content = packed if rng.random() < 0.5 else mutated_bytes(rng, packed)
    file.write_bytes(content)
    settings = _settings(rng)
    source = _read(JsonlPrompts(kind="jsonl", path=str(file), **settings), content, counts)
    plain = file.suffix != ".gz" and "." not in settings["prompt_field"]
    if source is not None and plain:
        _compare(source, content, settings, counts)


def _compare(source: FixedSource, content: bytes, settings: Any, counts: Counts) -> None:
    lines = [line for line in content.split(b"\n") if line.strip()]
    for number in range(source.num_prompts or 0):
        value = json.loads(lines[number].decode("utf-8-sig")).get(settings["prompt_field"])
        last = source.get(number).messages[-1].content
        if isinstance(value, str) and last != value + settings["suffix"]:
            counts.mistake(f"read as {last[:80]!r}: {lines[number][:120]!r}")


def _try_parquet(rng: random.Random, folder: Path, counts: Counts) -> None:
    file = folder / "p.parquet"
    length = rng.randint(0, 3)
    odd: tuple[pa.Array, ...] = (
        pa.array([_YEAR_20000] * length, pa.timestamp("s")),
        pa.array([-_YEAR_20000] * length, pa.timestamp("s", "UTC")),
        pa.array([2**62] * length, pa.duration("s")),
        pa.array([b"\xff\xfe"] * length, pa.binary()).view(pa.string())
        if length
        else pa.array([], pa.string()),
        pa.array([datetime.date(2024, 1, 1)] * length),
        pa.array([None] * length, pa.null()),
        pa.array([[1, None]] * length, pa.list_(pa.int32())),
        pa.array([{"a": 1}] * length, pa.struct([("a", pa.int8())])),
        pa.array([1.5] * length),
        pa.array(["text"] * length),
        pa.array(["text"] * length).dictionary_encode(),
    )
    columns = {name: rng.choice(odd) for name in ("prompt", "answer", "other")}
    if rng.random() < 0.5:
        columns["prompt"] = pa.array(["text"] * length)
    pq.write_table(pa.table(columns), file)
    content = file.read_bytes()
    if rng.random() < 0.5:
        content = mutated_bytes(rng, content)
        file.write_bytes(content)
    config = ParquetPrompts(kind="parquet", path=str(file), **_settings(rng))
    _read(config, content, counts)


def _read(config: Any, content: bytes, counts: Counts) -> FixedSource | None:
    counts.tried += 1
    example = f"{config.kind} {config.prompt_field[:40]!r} {config.answer_field!r:.40}"
    example += f" {content[:200]!r}"
    try:
        with over_time(_LIMIT_S):
            source = build_source(config)
            for number in range(source.num_prompts or 0):
                source.get(number)
    except TimeoutError:
        counts.hang(example)
    except DistillError as error:
        if len(str(error)) > _MAX_MESSAGE:
            counts.mistake(f"a message of {len(str(error))} characters: {example}")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        counts.traceback(f"{raised(error)}: {example}")
    else:
        assert isinstance(source, FixedSource)
        return source
    return None
