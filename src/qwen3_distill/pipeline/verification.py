"""Checks rollouts while the next stages run, so that no step waits for its verifier."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from qwen3_distill.types import Rollout


class BackgroundVerifier:
    """Gives rollouts their rewards; those that were begun early are there when a step asks.

    It has one thread: a verifier's process answers one question at a time.

    Args:
        check: gives a bool, or a reward in [0, 1].
    """

    def __init__(self, check: Callable[[Rollout], float]) -> None:
        self._check = check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verifier")
        self._begun: dict[str, Future[float]] = {}

    def begin(self, rollouts: Iterable[Rollout]) -> None:
        """Check whole rollouts in the background, each once until `forget`."""
        for rollout in rollouts:
            if rollout.is_whole and rollout.rollout_id not in self._begun:
                self._begun[rollout.rollout_id] = self._thread.submit(self._check, rollout)

    def reward(self, rollout: Rollout) -> float:
        """Return a rollout's reward; one that was not begun is checked now.

        Raises:
            DataError, EngineError: the check failed, in the background or now.
        """
        begun = self._begun.get(rollout.rollout_id)
        return float(self._check(rollout) if begun is None else begun.result())

    def forget(self) -> None:
        """Drop all rewards: the step that they belong to is over."""
        for begun in self._begun.values():
            begun.cancel()
        self._begun = {}

    def close(self) -> None:
        """End the thread; a check under way ends by its own time limit."""
        self.forget()
        self._thread.shutdown(wait=False)
