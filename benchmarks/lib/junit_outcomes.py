"""Counts test outcomes in the JUnit files that pytest writes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree


def outcomes(files: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Return the numbers of passed, failed (or erroneous) and skipped tests, by file name."""
    suites: dict[str, dict[str, int]] = {}
    for file in files:
        counts = Counter(passed=0, failed=0, skipped=0)
        for case in ElementTree.parse(file).getroot().iter("testcase"):
            bad = case.find("failure") is not None or case.find("error") is not None
            skipped = case.find("skipped") is not None
            counts["failed" if bad else "skipped" if skipped else "passed"] += 1
        suites[file.stem] = dict(counts)
    return suites
