"""Counts what odd inputs of a kind did, and reports a kind's progress."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

_MAX_EXAMPLES = 10
_LINE_EVERY_S = 5.0


@dataclass
class Counts:
    """Counts of what became of the inputs of one kind.

    ``tried`` counts all of them. An input adds to ``tracebacks`` if it raised anything but an error
    of this package, to ``wrong`` if it was read as something it does not say, to ``hangs`` if it
    outlived its deadline, to ``key_leaks`` if a secret reached a message or a file.
    """

    tried: int = 0
    tracebacks: int = 0
    wrong: int = 0
    hangs: int = 0
    key_leaks: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return self.tracebacks + self.wrong + self.hangs + self.key_leaks

    def traceback(self, example: str) -> None:
        self.tracebacks += 1
        self._keep(f"traceback: {example}")

    def mistake(self, example: str) -> None:
        self.wrong += 1
        self._keep(f"wrong: {example}")

    def hang(self, example: str) -> None:
        self.hangs += 1
        self._keep(f"hang: {example}")

    def key_leak(self, example: str) -> None:
        self.key_leaks += 1
        self._keep(f"key leak: {example}")

    def _keep(self, example: str) -> None:
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(ascii(example)[1:-1][:600])


Kind: TypeAlias = Callable[[int, int], Counts]
"""Tries ``count`` inputs made from ``seed``; the same arguments make the same inputs."""


class Progress:
    """Prints a kind's rate and remaining time, a line every few seconds.

    Args:
        total: inputs that the kind will try.
    """

    def __init__(self, kind: str, total: int) -> None:
        self._kind, self._total = kind, total
        self._began = self._last = time.monotonic()

    def show(self, counts: Counts) -> None:
        """Call this after every input; most calls print nothing."""
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S and counts.tried < self._total:
            return
        self._last = now
        rate = counts.tried / max(now - self._began, 1e-9)
        left_s = (self._total - counts.tried) / rate if rate else float("inf")
        print(
            f"{self._kind}: {counts.tried}/{self._total}, {rate:.0f}/s, {left_s:.0f} s left, "
            f"{counts.failures} failures",
            file=sys.stderr,
            flush=True,
        )
