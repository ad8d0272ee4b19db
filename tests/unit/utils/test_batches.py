from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qwen3_distill.utils.batches import padded_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=40)
BUDGET = st.integers(1, 200)


@given(lengths=LENGTHS, max_tokens=BUDGET)
def test_every_index_occurs_exactly_once(lengths: list[int], max_tokens: int) -> None:
    groups = padded_batches(lengths, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(groups)


@given(lengths=LENGTHS, max_tokens=BUDGET)
def test_padded_groups_keep_the_budget_or_hold_one_long_sequence(
    lengths: list[int], max_tokens: int
) -> None:
    for group in padded_batches(lengths, max_tokens):
        longest = max(lengths[index] for index in group)
        assert longest * len(group) <= max_tokens or len(group) == 1


@given(lengths=LENGTHS, max_tokens=BUDGET)
def test_no_group_could_have_taken_the_next_sequence(lengths: list[int], max_tokens: int) -> None:
    groups = padded_batches(lengths, max_tokens)
    for group, after in pairwise(groups):
        assert lengths[after[0]] <= min(lengths[index] for index in group)  # longest first
        assert lengths[group[0]] * (len(group) + 1) > max_tokens


@given(lengths=LENGTHS, max_tokens=BUDGET)
def test_packing_is_deterministic(lengths: list[int], max_tokens: int) -> None:
    assert padded_batches(lengths, max_tokens) == padded_batches(tuple(lengths), max_tokens)


def test_equal_lengths_stay_in_order() -> None:
    assert padded_batches([4, 4, 9, 4], 12) == [[2], [0, 1, 3]]


def test_nothing_packs_into_nothing() -> None:
    assert padded_batches([], 10) == []
