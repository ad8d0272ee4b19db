"""Numbers of the rollouts that a run has drawn and not settled. Bookkeeping only.

Rollout n of a run is sample n % G of prompt n // G. It is *drawn* once, and *settled* once: by the
step that trained on it, or by being dropped. Between the two it is in progress. A checkpoint keeps
these numbers, and a resumed run samples them again.
"""

from collections.abc import Iterable, Set

from qwen3_distill.types import RunCursor


class RolloutsInProgress:
    """The rollouts that a run has drawn and neither trained on nor dropped.

    Args:
        cursor: where the run starts; its outstanding rollouts are to be sampled again.
        samples_per_prompt: G; a prompt's samples are drawn together.
    """

    def __init__(self, cursor: RunCursor, *, samples_per_prompt: int) -> None:
        self._samples = samples_per_prompt
        self._prompts_drawn = cursor.prompts_drawn
        self._to_resample = list(cursor.outstanding)
        self._numbers: set[int] = set(cursor.outstanding)
        self._in_pieces: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def numbers(self) -> Set[int]:
        """Numbers of all rollouts that were drawn and neither trained on nor dropped."""
        return self._numbers

    @property
    def num_to_resample(self) -> int:
        """Number of rollouts that an earlier process left and this one has not started again."""
        return len(self._to_resample)

    def draw(self, limit: int) -> list[int]:
        """Draw up to ``limit`` rollouts in order: those of an earlier process, then new ones.

        New prompts are drawn whole, so fewer come where the samples of one prompt do not fit.
        """
        again, self._to_resample = self._to_resample[:limit], self._to_resample[limit:]
        if self._to_resample:
            return again
        prompts = (limit - len(again)) // self._samples
        first = self._prompts_drawn * self._samples
        new = list(range(first, first + prompts * self._samples))
        self._prompts_drawn += prompts
        self._numbers.update(new)
        return again + new

    def mark_harvested(self, number: int) -> None:
        """Note that a piece of a running rollout was trained on.

        A resumed run does not sample it again: its first tokens would be trained on twice.
        """
        if number in self._numbers:
            self._in_pieces.add(number)

    def settle(self, numbers: Iterable[int]) -> None:
        """Note that rollouts were trained on or dropped, for good.

        Raises:
            ValueError: one of them is not in progress.
        """
        for number in numbers:
            if number not in self._numbers:
                raise ValueError(f"rollout {number} is settled a second time, or was never drawn")
            self._numbers.discard(number)
            self._in_pieces.discard(number)

    @property
    def prompts_drawn(self) -> int:
        return self._prompts_drawn

    def to_resume(self) -> tuple[int, ...]:
        """Numbers for `RunCursor.outstanding`: all but those with a piece trained on."""
        return tuple(sorted(self._numbers - self._in_pieces))
