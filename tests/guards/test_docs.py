"""Links and paths in the documentation lead somewhere; messages that it quotes exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])

_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?: {4}|\t).*$", re.MULTILINE)
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
_HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)
_FOLDERS = "src|docs|configs|tests|benchmarks|scripts|models"
_PATH = re.compile(rf"(?:{_FOLDERS})/[\w./*-]*")
_NUMBER = re.compile(r"NNNN.*")  # of a file to be made, as in docs/adr/NNNN-title.md


def prose(text: str) -> str:
    """Without code blocks: what commands name may be made by them."""
    return _INDENTED.sub("", _FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The link targets that headings make."""
    titles = _HEADING.findall(_FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def problems(page: Path, text: str, root: Path) -> Iterator[str]:
    """Links and paths of a page that lead nowhere."""
    body = prose(text)
    for link in _LINK.findall(_INLINE_CODE.sub("", body)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if name and not target.exists():
            yield f"link {link}"
        elif anchor and target.suffix == ".md":
            content = target.read_text(encoding="utf-8") if name else text
            if anchor not in anchors(content):
                yield f"anchor {link}"
    for code in _INLINE_CODE.findall(body):
        if _PATH.fullmatch(code) and not _leads_somewhere(code, root):
            yield f"path {code}"


def _leads_somewhere(path: str, root: Path) -> bool:
    return any(root.glob(_NUMBER.sub("*", path)))


NAMED_PAGE = re.compile(r"docs/[\w./-]*\.md")
CODE = sorted(
    path
    for pattern in ("src/**/*.py", "benchmarks/**/*.py", "scripts/**/*.py", "configs/*.yaml")
    for path in ROOT.glob(pattern)
)


def test_pages_that_code_and_configs_name_exist() -> None:
    named = {
        (str(path.relative_to(ROOT)), page)
        for path in (*CODE, ROOT / "Makefile")
        for page in NAMED_PAGE.findall(path.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name[1]).is_file()] == []


def test_there_is_a_readme() -> None:
    assert README.is_file(), "README.md is missing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_the_page_exist(page: Path) -> None:
    assert list(problems(page, page.read_text(encoding="utf-8"), ROOT)) == []


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "adr").mkdir(parents=True)
    (tmp_path / "docs" / "adr" / "0001-x.md").write_text("# Why so?\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](adr/0001-x.md) [b](adr/0001-x.md#why-so) [c](https://x.org/y)", []),
        ("# Here\n[a](#here)", []),
        ("`docs/adr/0001-x.md`, `docs/adr/NNNN-title.md` `docs/adr/*.md` `docs/`", []),
        ("```\ncat docs/no.md\n[a](no.md)\n```\n\n    `docs/no.md`\n", []),
        ("`make docs/` `a/b`", []),
        ("[a](no.md)", ["link no.md"]),
        ("![a](no.png)", ["link no.png"]),
        ("[a](adr/0001-x.md#no)", ["anchor adr/0001-x.md#no"]),
        ("[a](#no)", ["anchor #no"]),
        ("see `docs/no.md`", ["path docs/no.md"]),
        ("see `src/*.py`", ["path src/*.py"]),
    ],
)
def test_guard_tells_good_from_bad(text: str, expected: list[str], site: Path) -> None:
    assert list(problems(site / "docs" / "page.md", text, site)) == expected


# --- Messages -----------------------------------------------------------------------------------

TROUBLESHOOTING = ROOT / "docs" / "start" / "troubleshooting.md"


def quoted_messages(text: str) -> list[str]:
    """The messages in the first column of tables that have a column ``message``."""
    found: list[str] = []
    quotes = False
    for line in text.splitlines():
        if not line.startswith("|"):
            quotes = False
        elif line.startswith("| message |"):
            quotes = True
        elif quotes:
            found += _INLINE_CODE.findall(line.split(" | ")[0])
    return found


def texts_of(source: str) -> list[str]:
    """The strings of a module. Whatever an f-string inserts is a line break here."""
    tree = ast.parse(source)
    texts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "\n" for p in node.values)
            texts.append("".join(str(part) for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def is_said(message: str, texts: list[str]) -> bool:
    """Whether one text has the message's parts in order; ``...`` stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("..."))
    return any(re.search(pattern, text, re.DOTALL) for text in texts)


def test_every_message_of_the_troubleshooting_page_is_said_by_the_code() -> None:
    texts = [
        text
        for path in ROOT.glob("src/**/*.py")
        for text in texts_of(path.read_text(encoding="utf-8"))
    ]
    messages = quoted_messages(TROUBLESHOOTING.read_text(encoding="utf-8"))
    assert len(messages) > 40
    assert [message for message in messages if not is_said(message, texts)] == []


def test_guard_tells_said_messages_from_others() -> None:
    page = "`x`\n| message | cause |\n|---|---|\n| `no ... in it`, `gone` | `why` |\n\n| `y` | |"
    assert quoted_messages(page) == ["no ... in it", "gone"]
    texts = texts_of("a = f'no {b} ' f'in it'\nc = 'go' 'ne'\nd = 'no'")
    assert is_said("no ... in it", texts)
    assert is_said("gone", texts)
    assert not is_said("in it ... no", texts)
    assert not is_said("no in it", texts)
