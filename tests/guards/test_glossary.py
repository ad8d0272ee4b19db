"""The glossary is in order, and the classes and files that it names exist."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "qwen3_distill"
PAGE = ROOT / "docs" / "reference" / "glossary.md"

_TERM = re.compile(r"^\*\*(.+?)\.?\*\*", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")


def problems(text: str, package: Path) -> Iterator[str]:
    """Name terms out of order, and classes and files that the package does not have."""
    terms = _TERM.findall(text)
    for before, term in itertools.pairwise(terms):
        if before >= term:
            yield f"{term} after {before}"
    source = "\n".join(file.read_text(encoding="utf-8") for file in package.rglob("*.py"))
    for code in _CODE.findall(text):
        name = code.partition(".")[0]
        if re.fullmatch(r"[a-z_]+(?:/[a-z_]+)*(?:/|\.py)", code):
            if not (package / code).exists():
                yield f"file {code}"
        elif re.fullmatch(r"[A-Z]\w+", name):
            members = code.split(".")[1:]
            if not re.search(rf"^class {name}\b", source, re.MULTILINE):
                yield f"class {name}"
            elif any(not re.search(rf"\b{member}\b", source) for member in members):
                yield f"member {code}"


def test_glossary_is_in_order_and_names_what_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(_TERM.findall(text)) > 30
    assert set(problems(text, PACKAGE)) == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**a.** `Apple`\n\n**b.** `core.py`, `inner/`, `Apple.eat`, `setting`, `max_x: 3`", []),
        ("**b.** x\n\n**a** (an a). y", ["a after b"]),
        ("**a.** x\n\n**a.** y", ["a after a"]),
        ("**a.** `Pear`", ["class Pear"]),
        ("**a.** `Apple.fly`", ["member Apple.fly"]),
        ("**a.** `gone.py` `inner/gone.py`", ["file gone.py", "file inner/gone.py"]),
    ],
)
def test_guard_tells_good_from_bad(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "core.py").write_text("class Apple:\n    def eat(self): ...\n")
    assert list(problems(text, tmp_path)) == expected
