"""Tokens per second of every engine of a fleet, from its counters and its busy seconds."""

import re
from collections.abc import Mapping

MEMBER = r"(rollout|teacher|rank)_(\d+)"
"""Names of engines and ranks in metrics and on tracks, e.g. ``rollout_0``; a regular expression."""
_TOKENS = re.compile(rf"fleet/({MEMBER})_tokens")


class FleetRates:
    """Turns the engines' totals of tokens into tokens per second, step by step.

    Args:
        counters: of the engines, before the first step.
    """

    def __init__(self, counters: Mapping[str, float]) -> None:
        self._before = dict(counters)

    def of_step(self, values: Mapping[str, float | None]) -> dict[str, float]:
        """Return ``fleet/{member}_tok_s``: a step's tokens by the seconds of its work.

        Tokens count when they are answered: one batch of a long answer may lie in two steps, and
        its tokens in the second. An engine without work in a step has no rate.

        Args:
            values: metrics of the step, with ``fleet/{member}_tokens`` and ``time/{member}_s``.
        """
        rates: dict[str, float] = {}
        for key, total in values.items():
            found = _TOKENS.fullmatch(key)
            if found is None or total is None:
                continue
            tokens = total - self._before.get(key, 0.0)
            self._before[key] = total
            busy_s = values.get(f"time/{found[1]}_s")
            if busy_s:
                rates[f"fleet/{found[1]}_tok_s"] = tokens / busy_s
        return rates
