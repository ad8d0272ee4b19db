"""Kind ``files``: files of a run folder, mutated, read by report, status and a resume.

A checkpoint that was changed may not be taken: a resume finds the whole one before it, or none. A
page may not show a number that is none.
"""

import asyncio
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.robustness.fuzz.counts import Counts, Progress
from benchmarks.robustness.fuzz.odd_values import mutated_bytes, mutated_json
from benchmarks.robustness.fuzz.watch import over_time, raised
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.errors import DistillError
from qwen3_distill.pipeline.assembly.engines import build_parts
from qwen3_distill.pipeline.checkpoints import CheckpointStore
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run_folder import RunFolder
from qwen3_distill.pipeline.summary import render_report
from qwen3_distill.recording.jsonl import JsonlLog
from qwen3_distill.recording.records import read_evaluations, read_ledger, read_steps
from qwen3_distill.report.status import run_status, status_lines
from qwen3_distill.types import RunCursor
from tests.pipeline.builders import EVALUATION, run_to_end, tiny_config
from tests.tiny_models import write_tiny_models

_LIMIT_S = 20.0
_NUMBERS = ("metrics.jsonl", "evaluations.jsonl", "summary.json")
_NO_NUMBER = re.compile(r">[^<]*\b(?:nan|inf|NaN|Infinity)\b")


def run(seed: int, count: int) -> Counts:
    """Try ``count`` changed files, one after another in a copy of one run folder."""
    counts, progress, rng = Counts(), Progress("files", count), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny_config(
            write_tiny_models(folder / "models"),
            folder / "run",
            {"steps": 4, "checkpoint.every_steps": 2, "evaluation": EVALUATION},
        )
        run_to_end(config)
        whole = folder / "whole"
        shutil.copytree(config.output_path, whole)
        parts = build_parts(config)
        names = [
            path.relative_to(whole)
            for path in sorted(whole.rglob("*"))
            if path.is_file() and "student" not in path.parts and path.suffix not in (".lock", "")
        ]
        for _ in range(count):
            changed = rng.choice(names)
            _try(rng, config, parts, whole, changed, counts)
            progress.show(counts)
        asyncio.run(parts.close())
    return counts


def _try(
    rng: random.Random, config: RunConfig, parts: Parts, whole: Path, name: Path, counts: Counts
) -> None:
    target, content = config.output_path / name, (whole / name).read_bytes()
    new = _mutated(rng, name, content)
    target.write_bytes(new)
    unfinished = rng.random() < 0.3
    if unfinished:
        (config.output_path / "summary.json").unlink(missing_ok=True)
    counts.tried += 1
    readers: list[Callable[[], None]] = [
        lambda: _report(config, name, counts),
        lambda: _status(config),
        lambda: _resume(config, parts, name if new != content else None, counts),
    ]
    for reader in readers:
        try:
            with over_time(_LIMIT_S):
                reader()
        except TimeoutError:
            counts.hang(f"{name} {new[:200]!r}")
        except DistillError as error:
            if len(str(error)) > 10_000:
                counts.mistake(f"a message of {len(str(error))} characters: {name} {new[:100]!r}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            counts.traceback(f"{raised(error)}: {name} {new[:200]!r}")
    for path in ("metrics.jsonl", "evaluations.jsonl", "ledger.jsonl", "config.json"):
        shutil.copy(whole / path, config.output_path / path)
    for path in (name, Path("summary.json")):
        shutil.copy(whole / path, config.output_path / path)


def _mutated(rng: random.Random, name: Path, content: bytes) -> bytes:
    if rng.random() < 0.3 or name.suffix not in (".json", ".jsonl"):
        return mutated_bytes(rng, content)
    if name.suffix == ".json" and not name.name.startswith("trace"):
        return json.dumps(mutated_json(rng, json.loads(content))).encode()
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at].strip(b","))
    except ValueError:
        return mutated_bytes(rng, content)
    comma = b"," if lines[at].endswith(b",") else b""
    lines[at] = json.dumps(mutated_json(rng, value)).encode() + comma
    return b"\n".join(lines)


def _report(config: RunConfig, name: Path, counts: Counts) -> None:
    page = render_report(config.output_path, load_config(config.output_path / "config.json"))
    if name.name in _NUMBERS and (found := _NO_NUMBER.search(page.read_text(encoding="utf-8"))):
        counts.mistake(f"the page shows {found[0][:80]!r}: {name}")


def _status(config: RunConfig) -> None:
    found = run_status(config.output_path)
    json.dumps(found)
    status_lines(found)


def _resume(config: RunConfig, parts: Parts, changed: Path | None, counts: Counts) -> None:
    """Do what a resume reads, without its steps."""
    with RunFolder(config) as folder:
        folder.read_inputs()
        if folder.is_finished:
            folder.read_summary()
            return
        store = CheckpointStore(folder.checkpoints, keep_last=2, identity=folder.identity)
        cursor: RunCursor | None = asyncio.run(store.restore(parts.learner, lambda text: None))
        taken = None if cursor is None else f"step-{cursor.step:06d}"
        if changed is not None and taken is not None and taken in changed.parts:
            counts.mistake(f"a changed checkpoint was taken: {changed}")
        for read, file in (
            (read_steps, folder.metrics),
            (read_evaluations, folder.evaluations),
            (read_ledger, folder.ledger),
        ):
            read(file)
            log = JsonlLog(file)
            log.truncate_after(2)
            log.close()
