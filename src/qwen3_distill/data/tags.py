"""The tag of a prompt, which names its teacher where a run has several."""

from collections import Counter
from collections.abc import Iterable, Mapping

from qwen3_distill.types import Prompt

TAG_KEY = "teacher"
"""Key of a prompt's ``task_data`` that holds its tag; absent where there is one teacher."""


def tag_of(prompt: Prompt) -> str | None:
    """Return a prompt's tag; None where there is one teacher."""
    return prompt.task_data.get(TAG_KEY)


def group_by_tag(tags: Iterable[str]) -> dict[str, list[int]]:
    """Return the positions of every tag, tags in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for index, tag in enumerate(tags):
        groups.setdefault(tag, []).append(index)
    return groups


class TagSchedule:
    """The tag of every prompt that a run draws, by its number, so that tags have their weights.

    Number n gets the tag whose count among the numbers before lies furthest below its share of
    n + 1; of equal ones the first by name. So among any first n numbers every tag has its share of
    n, less than one prompt apart for two tags, and the order follows from the weights alone.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        self._shares = {tag: weight / total for tag, weight in sorted(weights.items())}
        self._drawn: Counter[str] = Counter()
        self._places: list[tuple[str, int]] = []

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(self._shares)

    def place(self, number: int) -> tuple[str, int]:
        """Return the tag of number ``number``, and how many numbers before it have that tag."""
        while len(self._places) <= number:
            self._append()
        return self._places[number]

    def _append(self) -> None:
        drawn = len(self._places) + 1
        tag = max(self._shares, key=lambda one: self._shares[one] * drawn - self._drawn[one])
        self._places.append((tag, self._drawn[tag]))
        self._drawn[tag] += 1
