"""Which rollouts are asked for and settled: each once, across any number of resumes."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.pipeline.in_progress import Outstanding
from qwen3_distill.types import RunCursor, WeightVersion

VERSION = WeightVersion(step=0, digest="0")


def cursor(prompts_drawn: int = 0, outstanding: tuple[int, ...] = ()) -> RunCursor:
    return RunCursor(
        step=0, prompts_drawn=prompts_drawn, weight_version=VERSION, outstanding=outstanding
    )


def test_prompts_are_asked_for_whole_and_in_order() -> None:
    book = Outstanding(cursor(), samples_per_prompt=3)
    assert book.ask(7) == [0, 1, 2, 3, 4, 5]
    assert book.ask(2) == []
    assert book.ask(3) == [6, 7, 8]
    assert (len(book), book.prompts_drawn) == (9, 3)


def test_what_a_process_left_behind_comes_first_and_does_not_open_new_prompts_early() -> None:
    book = Outstanding(cursor(4, (2, 5, 6)), samples_per_prompt=2)
    assert (len(book), book.num_waiting) == (3, 3)
    assert book.ask(2) == [2, 5]
    assert book.ask(4) == [6, 8, 9]
    assert book.num_waiting == 0


def test_a_rollout_is_settled_once() -> None:
    book = Outstanding(cursor(), samples_per_prompt=1)
    book.ask(2)
    book.settle([1])
    for number in (1, 2):
        with pytest.raises(ValueError, match=f"rollout {number} is settled a second time, or was"):
            book.settle([number])


def test_a_harvested_rollout_is_not_sampled_again_after_a_resume() -> None:
    book = Outstanding(cursor(), samples_per_prompt=1)
    book.ask(3)
    book.harvest(1)
    assert book.to_resume() == (0, 2)
    assert len(book) == 3


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.data())
def test_every_number_below_the_frontier_is_settled_once_or_outstanding(
    samples: int, data: st.DataObject
) -> None:
    """Asks, settlements and resumes in any order, against sets."""
    book, asked, settled = Outstanding(cursor(), samples_per_prompt=samples), Counter(), set[int]()
    running: set[int] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["ask", "settle", "resume"]))
        if action == "ask":
            room = data.draw(st.integers(0, 10))
            numbers = book.ask(room)
            assert len(numbers) <= room
            assert not running & set(numbers)
            running |= set(numbers)
            asked.update(numbers)
        elif action == "settle" and running:
            chosen = data.draw(st.sets(st.sampled_from(sorted(running))))
            book.settle(chosen)
            running -= chosen
            settled |= chosen
        elif action == "resume":
            left = cursor(book.prompts_drawn, book.to_resume())
            book, running = Outstanding(left, samples_per_prompt=samples), set()
        everything = set(range(book.prompts_drawn * samples))
        assert settled | set(book.numbers()) == everything
        assert not settled & set(book.numbers())
        assert running <= set(book.numbers())
