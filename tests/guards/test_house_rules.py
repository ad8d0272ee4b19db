"""House rules that the linters do not know: sizes, the wording of docstrings, described rooms."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "qwen3_distill"
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
LONG_FILES = {"src/qwen3_distill/types.py"}  # the records are read together
NOT_A_ROOM = {"environments/extras"}  # files that are copied into engines' environments

OPENING = re.compile(r"(?:Of|What|Those|Whoever|How it|As)\b")
"""Openings that hide the subject of a docstring's first line."""


def _names(files: list[Path]) -> list[str]:
    return [file.relative_to(ROOT).as_posix() for file in files]


def _python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def _rooms() -> list[Path]:
    folders = sorted({file.parent for file in PACKAGE.rglob("*.py")})
    return [f for f in folders if not _is_under(f.relative_to(PACKAGE).as_posix(), NOT_A_ROOM)]


def _is_under(name: str, folders: set[str]) -> bool:
    return any(name == folder or name.startswith(f"{folder}/") for folder in folders)


# --- Sizes ----------------------------------------------------------------------------------------


def oversized(name: str, text: str) -> Iterator[str]:
    """Name what is too long: the file itself, and each function from its `def` to its end."""
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES and name not in LONG_FILES:
        yield f"{name} has {lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                place = f"{name}:{node.lineno} {node.name}"
                yield f"{place} has {lines} lines, at most {MAX_FUNCTION_LINES}"


@pytest.mark.parametrize("name", _names(_python_files("src", "scripts", "benchmarks")))
def test_no_file_and_no_function_is_too_long(name: str) -> None:
    assert list(oversized(name, (ROOT / name).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("keyword", ["def", "async def"])
@pytest.mark.parametrize(("body_lines", "num_problems"), [(59, 0), (60, 1)])
def test_size_guard_counts_a_function_from_def_to_end(
    keyword: str, body_lines: int, num_problems: int
) -> None:
    body = "        pass\n" * body_lines
    text = f"class A:\n    @staticmethod\n    {keyword} f():\n{body}"
    assert len(list(oversized("a.py", text))) == num_problems


@pytest.mark.parametrize(
    ("name", "lines", "num_problems"),
    [("a.py", 500, 0), ("a.py", 501, 1), ("src/qwen3_distill/types.py", 501, 0)],
)
def test_size_guard_counts_the_lines_of_a_file(name: str, lines: int, num_problems: int) -> None:
    assert len(list(oversized(name, "a = 1\n" * lines))) == num_problems


# --- Wording --------------------------------------------------------------------------------------


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring: of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for statement in node.body:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(docstring))):
                    yield statement.lineno, docstring.strip()


def riddles(name: str, text: str) -> list[str]:
    """Name the docstrings whose first line hides its subject."""
    return [
        f"{name}:{line} {docstring.splitlines()[0]}"
        for line, docstring in docstrings(text)
        if OPENING.match(docstring)
    ]


@pytest.mark.parametrize("name", _names(_python_files("src")))
def test_docstrings_begin_with_their_subject(name: str) -> None:
    assert riddles(name, (ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("first_line", "is_riddle"),
    [
        ("Of the rollouts of one step.", True),
        ("What a step adds at its peak.", True),
        ("Those that are not over.", True),
        ("Whoever calls it waits.", True),
        ("How it is operated.", True),
        ("As the summary has it.", True),
        ("\n    What stands in the second line.", True),
        ("Return what a step adds.", False),
        ("Assign a rollout.", False),
        ("Offer the tokens.", False),
        ("How many rollouts run.", False),
    ],
)
@pytest.mark.parametrize(
    "template",
    [
        '"""{}"""\n',
        'class A:\n    """{}"""\n',
        'class A:\n    """A class."""\n\n    a: int\n    """{}"""\n',
        'async def f():\n    """{}"""\n',
        'class A:\n    def f(self):\n        r"""{}"""\n',
        'A = 1\n"""{}"""\n',
    ],
)
def test_wording_guard_tells_good_from_bad(template: str, first_line: str, is_riddle: bool) -> None:
    assert len(riddles("a.py", template.format(first_line))) == is_riddle


# --- Rooms ----------------------------------------------------------------------------------------


def describes_itself(room: Path) -> bool:
    """Return whether the folder is a package whose `__init__.py` has a docstring."""
    file = room / "__init__.py"
    return file.is_file() and bool(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", _names(_rooms()))
def test_a_room_says_what_it_is_for(name: str) -> None:
    assert describes_itself(ROOT / name)


def test_room_guard_tells_good_from_bad(tmp_path: Path) -> None:
    assert not describes_itself(tmp_path)
    (tmp_path / "__init__.py").write_text("from os import path\n")
    assert not describes_itself(tmp_path)
    (tmp_path / "__init__.py").write_text('"""Judges answers."""\n')
    assert describes_itself(tmp_path)


def test_guards_see_the_files_that_they_are_for() -> None:
    assert "src/qwen3_distill/types.py" in LONG_FILES
    assert {"generation", "generation/vllm", "pipeline/assembly", "utils"} <= {
        room.relative_to(PACKAGE).as_posix() for room in _rooms()
    }
    assert len(_python_files("src", "scripts", "benchmarks")) > 100
