"""Tests are skipped by their marks, not by a folder or a parameter of the same name."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_collection_modifyitems
from tests.engines import ENGINE_NAMES

NAMES = (*ENGINE_NAMES, "cluster", "gpu")


class Item:
    """Stands for an item of pytest, with one name among its keywords and maybe among its marks."""

    def __init__(self, name: str, *, is_marked: bool) -> None:
        self.keywords = {name: True}
        self._marks = {name} if is_marked else set[str]()
        self.reasons: list[str] = []

    def get_closest_marker(self, name: str) -> bool | None:
        return True if name in self._marks else None

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.reasons.append(mark.kwargs["reason"])


# The ids differ from the names: else these tests would be what is skipped for a keyword.
@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"named {name}")
def test_a_keyword_is_no_mark(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engines.INSTALLED", SimpleNamespace(python={}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config: Any = SimpleNamespace(getoption=lambda _: False)
    named, marked = Item(name, is_marked=False), Item(name, is_marked=True)
    items: list[Any] = [named, marked]
    pytest_collection_modifyitems(config, items)
    assert (named.reasons, len(marked.reasons)) == ([], 1)
