"""The verifier's thread: what runs beside the step, what is checked once, and what fails."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from qwen3_distill.errors import EngineError
from qwen3_distill.pipeline.verification import BackgroundVerifier
from qwen3_distill.types import FinishReason, Rollout
from tests.contract.builders import synthetic_rollout

ROLLOUTS = [synthetic_rollout(3, 4, seed) for seed in range(4)]
REWARDS = {rollout.rollout_id: seed / 4 for seed, rollout in enumerate(ROLLOUTS)}


class Check:
    """Gives `REWARDS`; waits before the first one until ``go``."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.seen: list[tuple[str, int]] = []

    def __call__(self, rollout: Rollout) -> float:
        assert self.go.wait(60)
        self.seen.append((rollout.rollout_id, threading.get_ident()))
        if rollout.rollout_id not in REWARDS:
            raise EngineError("made up")
        return REWARDS[rollout.rollout_id]


@pytest.fixture
def check() -> Check:
    return Check()


@pytest.fixture
def verifier(check: Check) -> Iterator[BackgroundVerifier]:
    verifier = BackgroundVerifier(check)
    yield verifier
    check.go.set()
    verifier.close()


def test_begun_checks_run_while_the_caller_goes_on(
    check: Check, verifier: BackgroundVerifier
) -> None:
    verifier.begin(ROLLOUTS)  # returns, though no check can end yet
    assert check.seen == []
    check.go.set()
    assert {r.rollout_id: verifier.reward(r) for r in reversed(ROLLOUTS)} == REWARDS
    threads = {thread for _, thread in check.seen}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_rollout_is_checked_once_a_step(check: Check, verifier: BackgroundVerifier) -> None:
    check.go.set()
    for _ in range(2):
        verifier.begin(ROLLOUTS[:2])
        for _ in range(2):
            assert verifier.reward(ROLLOUTS[1]) == REWARDS[ROLLOUTS[1].rollout_id]
    assert verifier.reward(ROLLOUTS[0]) == 0
    assert len(check.seen) == 2
    verifier.forget()
    verifier.begin(ROLLOUTS[:2])
    verifier.reward(ROLLOUTS[1])
    assert len(check.seen) == 4


def test_a_rollout_that_was_not_begun_is_checked_at_once(
    check: Check, verifier: BackgroundVerifier
) -> None:
    check.go.set()
    assert verifier.reward(ROLLOUTS[3]) == 0.75


def test_pieces_are_not_checked(check: Check, verifier: BackgroundVerifier) -> None:
    check.go.set()
    verifier.begin([replace(ROLLOUTS[0], finish_reason=FinishReason.HARVESTED)])
    verifier.begin(ROLLOUTS[1:2])
    verifier.reward(ROLLOUTS[1])
    assert [name for name, _ in check.seen] == [ROLLOUTS[1].rollout_id]


def test_a_check_that_fails_fails_where_its_reward_is_asked_for(
    check: Check, verifier: BackgroundVerifier
) -> None:
    check.go.set()
    odd = replace(ROLLOUTS[0], rollout_id="odd")
    verifier.begin([odd])
    with pytest.raises(EngineError, match="made up"):
        verifier.reward(odd)


def test_checks_that_wait_are_dropped_at_the_end(
    check: Check, verifier: BackgroundVerifier
) -> None:
    verifier.begin(ROLLOUTS)
    verifier.close()
    check.go.set()
    verifier._thread.shutdown(wait=True)
    assert len(check.seen) <= 1
