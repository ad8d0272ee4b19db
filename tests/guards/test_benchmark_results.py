"""Every number in benchmarks/results says how it was made and can be read by a program."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

GOOD: dict[str, Any] = {
    "name": "speed",
    "command": "python benchmarks/speed.py",
    "commit": "8533ac947665638aedb25c1b662d7994e6da4d9a",
    "machine": {"cpu": "x", "cpus": 2},
    "versions": {"torch": "2.13.0"},
    "figures": {"tokens_per_s": 120.5, "runs": 3},
    "notes": "more keys are welcome",
}


def problems(result: Any, stem: str) -> Iterator[str]:
    """What is wrong with the content of ``{stem}.json``."""
    if not isinstance(result, dict):
        yield "not an object"
        return
    if result.get("name") != stem:
        yield f"name is {result.get('name')!r}, expected the file's {stem!r}"
    for key, kinds in {
        "command": str,
        "commit": str,
        "machine": (dict, str),
        "versions": dict,
        "figures": dict,
    }.items():
        if not isinstance(result.get(key), kinds) or not result[key]:
            yield f"{key} is {result.get(key)!r}"
    figures = result.get("figures")
    for key, value in figures.items() if isinstance(figures, dict) else ():
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"figures.{key} is {value!r}, expected a number"
        elif not math.isfinite(value):
            yield f"figures.{key} is not finite"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_result_says_how_it_was_made(file: Path) -> None:
    assert list(problems(json.loads(file.read_text(encoding="utf-8")), file.stem)) == []


def test_good_result_has_no_problems() -> None:
    assert list(problems(GOOD, "speed")) == []
    assert list(problems(GOOD | {"machine": "one H100"}, "speed")) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "other"}, "name"),
        ({"command": ""}, "command"),
        ({"command": ["python"]}, "command"),
        ({"commit": None}, "commit"),
        ({"machine": 2}, "machine"),
        ({"versions": "2.13"}, "versions"),
        ({"figures": {}}, "figures"),
        ({"figures": [1.0]}, "figures"),
        ({"figures": {"a": math.nan}}, "figures.a"),
        ({"figures": {"a": math.inf}}, "figures.a"),
        ({"figures": {"a": "1.0"}}, "figures.a"),
        ({"figures": {"a": True}}, "figures.a"),
        ({"figures": {"a": {"b": 1.0}}}, "figures.a"),
    ],
)
def test_bad_result_has_its_problem_named(change: dict[str, Any], word: str) -> None:
    (problem,) = problems(GOOD | change, "speed")
    assert problem.startswith(word)


@pytest.mark.parametrize("key", ["name", "command", "commit", "machine", "versions", "figures"])
def test_missing_key_is_a_problem(key: str) -> None:
    (problem,) = problems({k: v for k, v in GOOD.items() if k != key}, "speed")
    assert problem.startswith(key)


def test_list_is_a_problem() -> None:
    assert list(problems([], "speed")) == ["not an object"]
