"""Findings: what a check of a config or of its engines found, and what to change."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import DistillError


class Status(str, Enum):
    """How a check ended."""

    PASS = "pass"
    WARN = "warn"
    """A run works, and may not do what its user expects."""
    FAIL = "fail"
    """A run stops, or learns something wrong."""
    SKIP = "skip"
    """The check does not apply here, or something before it failed; the text says which."""


@dataclass(frozen=True)
class Verdict:
    """A check's answer."""

    status: Status
    found: str
    """The value found, with what it was compared to."""
    change: str = ""
    """The remedy; empty where nothing needs to change."""

    @property
    def text(self) -> str:
        """The whole as one message."""
        return "; ".join(filter(None, (self.found, self.change)))


def good(found: str) -> Verdict:
    """Return the verdict of a check that passed."""
    return Verdict(Status.PASS, found)


def doubtful(found: str, change: str) -> Verdict:
    """Return a warning."""
    return Verdict(Status.WARN, found, change)


def bad(found: str, change: str) -> Verdict:
    """Return a failure."""
    return Verdict(Status.FAIL, found, change)


def skipped(reason: str) -> Verdict:
    """Return the verdict of a check that was not made."""
    return Verdict(Status.SKIP, reason)


def refusal(error: DistillError) -> Verdict:
    """Return an error of this package as a failure."""
    return problem(str(error))


def problem(message: str) -> Verdict:
    """Return a message as a failure: what to change follows its first semicolon."""
    found, _, change = message.partition("; ")
    return Verdict(Status.FAIL, found, change)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A line of the doctor's table."""

    name: str
    verdict: Verdict
    seconds: float = 0.0

    @property
    def status(self) -> Status:
        return self.verdict.status

    def record(self) -> dict[str, str | float]:
        """Return the finding as JSON values."""
        return {
            "check": self.name,
            "status": self.status.value,
            "found": self.verdict.found,
            "change": self.verdict.change,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of a config that starts no engine."""

    name: str
    find: Callable[[RunConfig], Verdict]
    """An error of this package that it raises is a failure."""
    needs: tuple[str, ...] = ()
    """Names of checks without whose success this one cannot be made."""
    refuses_run: bool = False
    """Whether a failure keeps a run from starting. False: a run meets it, with an error or a note
    of its own, where the work is done anyway."""
    notes_run: bool = False
    """Whether a run tells its warnings as notes."""
    reads_prompts: bool = False
    """Whether it reads all prompts, which takes a while for millions."""
    per_teacher: bool = False
    """Whether it looks at the one teacher of a config: with several it is made for each alone."""
    remedy: str = "see docs/start/troubleshooting.md"
    """The advice where an error has none."""

    def each(self, config: RunConfig) -> list[tuple[str, RunConfig]]:
        """List what the check is made for: its name in the table, and the config it looks at."""
        if not self.per_teacher or len(config.teachers) < 2:
            return [(self.name, config)]
        return [
            (f"{self.name} ({teacher.name})", config.with_teacher(teacher))
            for teacher in config.teachers
        ]


def ask(check: Check, config: RunConfig, before: dict[str, Status], name: str = "") -> Finding:
    """Make a check, unless one that it needs did not succeed.

    Args:
        before: statuses of the checks made so far, by name.
        name: in the table; empty: the check's.
    """
    name = name or check.name
    lacking = [needed for needed in check.needs if before.get(needed) is Status.FAIL]
    if lacking:
        return Finding(name=name, verdict=skipped(f"needs: {', '.join(lacking)}"))
    began = time.monotonic()
    try:
        verdict = check.find(config)
    except DistillError as error:
        verdict = refusal(error)
        verdict = verdict if verdict.change else replace(verdict, change=check.remedy)
    return Finding(name=name, verdict=verdict, seconds=time.monotonic() - began)
