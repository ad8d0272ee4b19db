"""Work goes to the member that has the least of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.hosts.routing import OutstandingTokens


def test_the_member_with_the_fewest_tokens_is_chosen_and_of_equals_the_first() -> None:
    tokens = OutstandingTokens(3)
    assert tokens.least([2, 0, 1]) == 0
    tokens.add(0, 5)
    assert tokens.least([0, 1, 2]) == 1
    assert tokens.least([0]) == 0


def test_more_than_was_added_cannot_be_taken_off() -> None:
    tokens = OutstandingTokens(1)
    tokens.add(0, 5)
    with pytest.raises(ValueError, match="5 outstanding tokens, not 6"):
        tokens.remove(0, 6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 5))
def test_no_member_has_more_than_the_mean_and_one_piece(sizes: list[int], members: int) -> None:
    tokens = OutstandingTokens(members)
    for size in sizes:
        tokens.add(tokens.least(range(members)), size)
    held = [tokens.of(i) for i in range(members)]
    assert sum(held) == sum(sizes)
    assert max(held) <= sum(sizes) / members + max(sizes)
