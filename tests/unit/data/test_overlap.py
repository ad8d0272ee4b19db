"""Problems that are both trained on and evaluated on are found by their text."""

import pytest

from qwen3_distill.config import TaskPrompts
from qwen3_distill.data.overlap import find_overlap
from qwen3_distill.data.sources import FixedSource, Message, RawPrompt, build_source


def source(name: str, *texts: str, system: str | None = None) -> FixedSource:
    first = () if system is None else (Message(role="system", content=system),)
    return FixedSource(
        [
            RawPrompt(
                prompt_id=f"{name}:{number}",
                messages=(*first, Message(role="user", content=text)),
            )
            for number, text in enumerate(texts)
        ]
    )


@pytest.mark.parametrize(
    ("held_out", "shared"),
    [
        ("What is 2 + 2?", True),
        ("  what is\n2 + 2? ", True),
        ("What is \uff12 + 2?", True),  # a full-width digit
        ("What is 2 + 3?", False),
        ("What is 2 + 2", False),
    ],
)
def test_texts_are_compared_after_normalisation(held_out: str, shared: bool) -> None:
    training = source("train", "other", "What is 2 + 2?", system="Think.")
    overlap = find_overlap(training, source("test", "new", held_out), num_problems=9)
    assert (overlap is not None) is shared
    if overlap is not None:
        assert str(overlap).startswith(
            "1 of 2 held-out problems are also training prompts, e.g. test:1 is train:1: "
        )


def test_suffixes_do_not_count_and_every_held_out_problem_does() -> None:
    training = source("train", "a\nBox it.", "b\nBox it.", "a\nBox it.")
    held_out = source("test", "a!", "a!", "c!", "b!")
    overlap = find_overlap(
        training, held_out, num_problems=9, training_suffix="\nBox it.", held_out_suffix="!"
    )
    assert overlap is not None
    assert (overlap.num_shared, overlap.num_held_out) == (3, 4)
    assert (overlap.held_out_id, overlap.training_id) == ("test:0", "train:0")
    first = find_overlap(training, held_out, num_problems=1, training_suffix="\nBox it.")
    assert first is None


def test_endless_task_shares_nothing() -> None:
    task = build_source(TaskPrompts(kind="task"))
    assert find_overlap(task, source("test", "a"), num_problems=3) is None
    assert find_overlap(source("train", "a"), task, num_problems=3) is None
