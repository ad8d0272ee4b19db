"""Rollouts are drawn and settled once each, across any number of resumes."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.pipeline.in_progress import RolloutsInProgress
from qwen3_distill.types import RunCursor, WeightVersion

VERSION = WeightVersion(step=0, digest="0")


def cursor(prompts_drawn: int = 0, outstanding: tuple[int, ...] = ()) -> RunCursor:
    return RunCursor(
        step=0, prompts_drawn=prompts_drawn, weight_version=VERSION, outstanding=outstanding
    )


def test_prompts_are_drawn_whole_and_in_order() -> None:
    book = RolloutsInProgress(cursor(), samples_per_prompt=3)
    assert book.draw(7) == [0, 1, 2, 3, 4, 5]
    assert book.draw(2) == []
    assert book.draw(3) == [6, 7, 8]
    assert (len(book), book.prompts_drawn) == (9, 3)


def test_rollouts_of_an_earlier_process_are_drawn_first_and_do_not_open_new_prompts_early() -> None:
    book = RolloutsInProgress(cursor(4, (2, 5, 6)), samples_per_prompt=2)
    assert (len(book), book.num_to_resample) == (3, 3)
    assert book.draw(2) == [2, 5]
    assert book.draw(4) == [6, 8, 9]
    assert book.num_to_resample == 0


def test_a_rollout_is_settled_once() -> None:
    book = RolloutsInProgress(cursor(), samples_per_prompt=1)
    book.draw(2)
    book.settle([1])
    for number in (1, 2):
        with pytest.raises(ValueError, match=f"rollout {number} is settled a second time, or was"):
            book.settle([number])


def test_a_harvested_rollout_is_not_sampled_again_after_a_resume() -> None:
    book = RolloutsInProgress(cursor(), samples_per_prompt=1)
    book.draw(3)
    book.mark_harvested(1)
    assert book.to_resume() == (0, 2)
    assert len(book) == 3


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.data())
def test_every_drawn_number_is_settled_once_or_in_progress(
    samples: int, data: st.DataObject
) -> None:
    """Draws, settlements and resumes in any order, compared with sets."""
    book = RolloutsInProgress(cursor(), samples_per_prompt=samples)
    drawn: Counter[int] = Counter()
    settled: set[int] = set()
    running: set[int] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["draw", "settle", "resume"]))
        if action == "draw":
            room = data.draw(st.integers(0, 10))
            numbers = book.draw(room)
            assert len(numbers) <= room
            assert not running & set(numbers)
            running |= set(numbers)
            drawn.update(numbers)
        elif action == "settle" and running:
            chosen = data.draw(st.sets(st.sampled_from(sorted(running))))
            book.settle(chosen)
            running -= chosen
            settled |= chosen
        elif action == "resume":
            left = cursor(book.prompts_drawn, book.to_resume())
            book, running = RolloutsInProgress(left, samples_per_prompt=samples), set()
        everything = set(range(book.prompts_drawn * samples))
        assert settled | set(book.numbers()) == everything
        assert not settled & set(book.numbers())
        assert running <= set(book.numbers())
