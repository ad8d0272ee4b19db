"""docs/extend/architecture.md agrees with the folders and with the import contract."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "qwen3_distill"
PAGE = ROOT / "docs" / "extend" / "architecture.md"
NOT_A_ROOM = "environments/extras/"  # files that are copied into engines' environments

_LAYERS_BLOCK = re.compile(r"^```layers\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LAYERS_SETTING = re.compile(r"^layers = (\[.*?^\])", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| *`([\w./-]+)/` *\| *(\S.*?) *\|", re.MULTILINE)

Layers = list[list[str]]
"""From top to bottom; the rooms of one layer do not import one another."""


def layers_of_page(text: str) -> Layers:
    """Read the block titled ``layers``: one layer per line, rooms separated by `` | ``."""
    (block,) = _LAYERS_BLOCK.findall(text)
    return [line.split(" | ") for line in block.splitlines()]


def layers_of_contract(text: str) -> Layers:
    """Read import-linter's layers in a pyproject.toml, without the package's name."""
    (setting,) = _LAYERS_SETTING.findall(text)
    rows = [line.split(" | ") for line in ast.literal_eval(setting)]
    return [[name.removeprefix("qwen3_distill.") for name in row] for row in rows]


def rooms_of_page(text: str) -> list[str]:
    """Read the first column of the table of rooms; each row needs a description."""
    return [room for room, _ in _ROW.findall(text)]


def rooms_of_tree(package: Path) -> set[str]:
    """List the folders that hold Python files, below the package."""
    names = {file.parent.relative_to(package).as_posix() for file in package.rglob("*.py")} - {"."}
    return {name for name in names if not f"{name}/".startswith(NOT_A_ROOM)}


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_page_has_every_room_once_and_no_other(page: str) -> None:
    rooms = rooms_of_page(page)
    assert sorted(rooms) == sorted(rooms_of_tree(PACKAGE))


def test_page_has_the_layers_of_the_import_contract(page: str) -> None:
    assert layers_of_page(page) == layers_of_contract((ROOT / "pyproject.toml").read_text())


def test_every_room_and_module_has_its_layer(page: str) -> None:
    placed = [name for layer in layers_of_page(page) for name in layer]
    modules = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    rooms = {name.partition("/")[0] for name in rooms_of_tree(PACKAGE)}
    assert sorted(placed) == sorted(modules | rooms)


# --- The readers themselves -----------------------------------------------------------------------

TEXT = """
```
not | this
```

```layers
cli
a | b
```

| room | does |
|---|---|
| `a/` | reads files |
| `a/b-c/` | writes `x/` too |
| `empty/` | |
| plain | no code |
"""


def test_readers_read_the_block_and_the_table() -> None:
    assert layers_of_page(TEXT) == [["cli"], ["a", "b"]]
    assert rooms_of_page(TEXT) == ["a", "a/b-c"]


def test_page_without_one_block_of_layers_is_an_error() -> None:
    for text in ("", TEXT + TEXT):
        with pytest.raises(ValueError, match="unpack"):
            layers_of_page(text)


def test_contract_reader_keeps_order_and_siblings() -> None:
    text = 'layers = [\n    "qwen3_distill.b | qwen3_distill.a",\n    "qwen3_distill.c",\n]\n'
    assert layers_of_contract(text) == [["b", "a"], ["c"]]


def test_tree_reader_sees_nested_rooms(tmp_path: Path) -> None:
    for name in ("a/x.py", "a/b/x.py", "c/x.txt", "environments/extras/x.py", "x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert rooms_of_tree(tmp_path) == {"a", "a/b"}
