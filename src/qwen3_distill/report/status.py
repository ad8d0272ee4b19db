"""Reads from a run folder where the run is now. Never writes, and never takes the folder's lock."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.recording.console import Pace, evaluation_text
from qwen3_distill.recording.heartbeat import STATUS_FILE, is_alive
from qwen3_distill.recording.records import is_count, is_number, read_evaluations, read_steps
from qwen3_distill.recording.text import clock, duration
from qwen3_distill.utils.json_text import read_json_object
from qwen3_distill.utils.shown import shown

RECENT_STEPS = 20
"""Steps of which the rates are means."""
_STALE_S = 120.0
"""Age at which the status file of a process that cannot be seen counts as old."""
_ADVICE = {
    "stopped": "the same command goes on from the newest checkpoint",
    "ended": "its process is gone; the same command goes on from the newest checkpoint",
    "failed": "the same command goes on from the newest checkpoint, once the cause is gone",
}


def run_status(folder: Path, now: float | None = None) -> dict[str, Any]:
    """Return the state of a run, for `status_lines` or as JSON.

    ``state`` is ``running``, ``finished``, ``stopped``, ``failed``, ``ended`` (its process is gone
    and said nothing) or ``unknown`` (the run is on another machine and silent, or older than this
    version).

    Raises:
        RunFolderError: the folder holds no run, or its config is damaged.
        DataError: a record of the run has another form.
    """
    now = time.time() if now is None else now
    config = _read_json(folder / "config.json")
    if config is None or not is_count(config.get("steps")):
        raise RunFolderError(
            f"{folder} is not a run folder: it has no readable config.json; give the output_dir "
            "of a run"
        )
    beat = _read_beat(folder / STATUS_FILE)
    steps = read_steps(folder / "metrics.jsonl")
    evaluations = read_evaluations(folder / "evaluations.jsonl")
    state, error = _state(beat, finished=(folder / "summary.json").exists(), now=now)
    runs = state == "running"
    total: int = beat.get("steps", config["steps"])
    done = steps[-1]["step"] if steps else 0
    return {
        "folder": str(folder),
        "state": state,
        "error": error,
        "step": done,
        "steps": total,
        **_rates(steps, total, done),
        "stage": beat.get("stage") if runs else None,
        "stage_s": _age(beat.get("stage_since"), now) if runs else None,
        "working": {name: now - at for name, at in beat.get("working", {}).items()} if runs else {},
        "last_evaluation": _last_of_the_student(evaluations),
        "pid": beat.get("pid"),
        "host": beat.get("host"),
        "heartbeat_age_s": _age(beat.get("time"), now),
    }


def _last_of_the_student(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the student's newest evaluation at the first temperature, else the newest of any."""
    own = [record for record in evaluations if record["model"] == "student"]
    return next(reversed(own or list(evaluations)), None)


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """Return the status as lines for a person."""
    state = status["state"]
    head = f"{status['folder']}: {state}"
    if state == "running":
        head += f" (process {status['pid']} on {status['host']})"
    elif state == "failed":
        head += f": {status['error']}"
    lines = [head, f"step {status['step']:,} of {status['steps']:,}"]
    if status["seconds_per_step"] is not None:
        rates = [f"{status['seconds_per_step']:.2f} s/step"]
        if status["tokens_per_second"] is not None:
            rates.insert(0, f"{status['tokens_per_second']:,.0f} tok/s")
        lines[-1] += "  " + "  ".join(rates)
        if state == "running" and status["eta_s"] is not None:
            lines[-1] += f"  ETA {clock(status['eta_s'])}"
    if status["stage"]:
        lines.append(f"now: {status['stage']}, for {duration(status['stage_s'] or 0.0)}")
    if status["working"]:
        stages = (f"{name} ({duration(max(0.0, s))})" for name, s in status["working"].items())
        lines.append(f"waits for: {', '.join(stages)}")
    if status["last_evaluation"] is not None:
        lines.append(evaluation_text(status["last_evaluation"]))
    if state in _ADVICE:
        lines.append(_ADVICE[state])
    elif state == "unknown" and status["heartbeat_age_s"] is not None:
        age = duration(status["heartbeat_age_s"])
        lines.append(f"runs on {status['host']} if at all; last heard of {age} ago")
    return lines


def _state(beat: Mapping[str, Any], *, finished: bool, now: float) -> tuple[str, str | None]:
    """Return the state and, of a failed run, the error."""
    ended = beat.get("ended")
    if isinstance(ended, str):
        kind, _, error = ended.partition(": ")
        return kind, error or None
    if not beat:
        return ("finished" if finished else "unknown"), None
    alive = is_alive(beat)
    if alive is None:  # on another machine, which shares the folder
        age = _age(beat.get("time"), now)
        alive = True if age is not None and age < _STALE_S else None
    return {True: "running", False: "ended", None: "unknown"}[alive], None


def _rates(steps: Sequence[Mapping[str, Any]], total: int, done: int) -> dict[str, float | None]:
    pace = Pace(total, 0, time.monotonic)
    recent = steps[-RECENT_STEPS:]
    for record in recent:
        pace.add(record["step"], record)
    eta_s = None
    if len(recent) > 1:  # with evaluations and checkpoints
        each_s = (recent[-1]["wall_s"] - recent[0]["wall_s"]) / (len(recent) - 1)
        eta_s = max(0, total - done) * max(0.0, each_s)
    return {
        "tokens_per_second": pace.tokens_per_second,
        "seconds_per_step": pace.seconds_per_step,
        "eta_s": eta_s,
    }


def _age(at: float | None, now: float) -> float | None:
    return None if at is None else max(0.0, now - at)


_BEAT: Mapping[str, Callable[[Any], bool]] = {
    "steps": is_count,
    "step": is_count,
    "stage": lambda value: isinstance(value, str),
    "stage_since": is_number,
    "ended": lambda value: isinstance(value, str),
    "pid": is_count,
    "pid_start": lambda value: isinstance(value, str),
    "host": lambda value: isinstance(value, str),
    "boot": lambda value: isinstance(value, str),
    "time": is_number,
    "working": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
}


def _read_beat(path: Path) -> dict[str, Any]:
    """Read the status file without its empty fields; empty where there is none.

    Raises:
        DataError: it has another form.
    """
    remedy = "remove the file: a run writes it again"
    try:
        beat = read_json_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is no status: {error}; {remedy}") from error
    beat = {key: value for key, value in beat.items() if value is not None}
    for key, holds in _BEAT.items():
        if key in beat and not holds(beat[key]):
            raise DataError(f"{path} is no status: {key} is {shown(beat[key])}; {remedy}")
    return beat


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return None
