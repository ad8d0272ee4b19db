"""The states of a fleet's members, under any order of reports."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.errors import EngineLost
from qwen3_distill.hosts.fleet_state import FleetState, MemberState

LIVE = (MemberState.STARTING, MemberState.STALE, MemberState.SERVING)


def serving_fleet(size: int = 3, *, max_restarts: int = 2, minimum: int = 1) -> FleetState:
    state = FleetState(size, max_restarts=max_restarts, minimum=minimum)
    for i in range(size):
        state.started(i, 1)
        state.verified(i, 1)
    return state


def test_a_member_serves_only_after_it_was_started_and_verified() -> None:
    state = FleetState(1, max_restarts=1, minimum=1)
    state.verified(0, 1)
    assert state.state(0) is MemberState.STARTING
    state.started(0, 1)
    assert state.state(0) is MemberState.STALE
    assert not state.serving
    state.verified(0, 1)
    assert state.serving == [0]


def test_a_member_that_was_started_again_is_stale() -> None:
    state = serving_fleet()
    assert state.lost(1, 1, "killed")
    again = state.restarting(1)
    state.started(1, again)
    assert state.state(1) is MemberState.STALE
    assert state.serving == [0, 2]


def test_one_death_is_reported_once() -> None:
    state = serving_fleet()
    assert state.lost(1, 1, "killed")
    assert not state.lost(1, 1, "killed")
    again = state.restarting(1)
    assert not state.lost(1, 1, "a late report of the first death")
    assert state.state(1) is MemberState.STARTING
    assert state.lost(1, again, "killed again")


def test_a_late_verification_of_an_earlier_start_changes_nothing() -> None:
    state = serving_fleet()
    state.lost(0, 1, "killed")
    state.started(0, state.restarting(0))
    state.verified(0, 1)
    assert state.state(0) is MemberState.STALE


def test_a_member_is_retired_when_its_restarts_are_used_up() -> None:
    state = serving_fleet(2, max_restarts=1, minimum=2)
    state.lost(0, 1, "first")
    start = state.restarting(0)
    state.check()
    state.lost(0, start, "second")
    assert state.state(0) is MemberState.RETIRED
    with pytest.raises(ValueError, match="retired, not lost"):
        state.restarting(0)
    with pytest.raises(EngineLost, match=r"fewer than the minimum of 2.*\n.*member 0: second"):
        state.check()


def test_a_fleet_that_begins_anew_has_its_budget_again() -> None:
    state = serving_fleet(1, max_restarts=0)
    state.lost(0, 1, "killed")
    assert state.state(0) is MemberState.RETIRED
    state.begin_anew()
    assert state.state(0) is MemberState.STARTING
    assert state.num_restarts == 0
    state.started(0, 1)
    assert state.state(0) is MemberState.STARTING, "a report from before"
    state.started(0, state.start_of(0))
    assert state.state(0) is MemberState.STALE


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["started", "verified", "outdated", "lost", "restarting"]),
        st.integers(0, 2),
        st.integers(-1, 0),  # a report about the current start, or the one before
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.integers(0, 3))
def test_no_order_of_reports_lets_an_unverified_member_serve(
    events: list[tuple[str, int, int]], max_restarts: int
) -> None:
    state = FleetState(3, max_restarts=max_restarts, minimum=1)
    verified = [False] * 3
    for event, i, offset in events:
        before, start = state.state(i), state.start_of(i) + offset
        if event == "restarting":
            if before is MemberState.LOST:
                state.restarting(i)
        elif event == "lost":
            state.lost(i, start, "x")
        else:
            getattr(state, event)(i, start)
        now = state.state(i)
        if now is MemberState.SERVING and before is not MemberState.SERVING:
            assert event == "verified"
            assert offset == 0
            assert before is MemberState.STALE
            verified[i] = True
        if before is MemberState.RETIRED:
            assert now is MemberState.RETIRED
        if offset == -1 and event != "restarting":
            assert now is before, "a report about an earlier start"
        assert state.restarts_of(i) <= max_restarts
    assert all(verified[i] for i in state.serving)
