"""Which rollouts of a run are asked for, and which are done with. Bookkeeping only.

Rollout n of a run is sample n % G of prompt n // G. It is *asked for* once, and *settled* once: by
the step that trained on it, or by being dropped. What is asked for and not settled is outstanding;
a checkpoint keeps the numbers, and a resumed run asks for them again.
"""

from collections.abc import Iterable, Set

from qwen3_distill.types import RunCursor


class Outstanding:
    """The rollouts that a run has under way.

    Args:
        samples_per_prompt: G; a prompt's samples are asked for together.
    """

    def __init__(self, cursor: RunCursor, *, samples_per_prompt: int) -> None:
        self._samples = samples_per_prompt
        self._prompts_drawn = cursor.prompts_drawn
        self._again = list(cursor.outstanding)
        """Of the process before: to be asked for first."""
        self._numbers: set[int] = set(cursor.outstanding)
        self._in_pieces: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def numbers(self) -> Set[int]:
        """All that is asked for, or left to be, and not settled."""
        return self._numbers

    @property
    def num_waiting(self) -> int:
        """Outstanding rollouts that this process has not asked for yet."""
        return len(self._again)

    def ask(self, room: int) -> list[int]:
        """Numbers of up to ``room`` more rollouts, in order; those left by a process before first.

        New prompts are taken whole: fewer than ``room`` where the samples of one do not fit.
        """
        again, self._again = self._again[:room], self._again[room:]
        if self._again:
            return again
        prompts = (room - len(again)) // self._samples
        first = self._prompts_drawn * self._samples
        new = list(range(first, first + prompts * self._samples))
        self._prompts_drawn += prompts
        self._numbers.update(new)
        return again + new

    def harvest(self, number: int) -> None:
        """Note that a piece of a running rollout was trained on.

        From here on a resume does not ask for it again: its first tokens would count twice.
        """
        if number in self._numbers:
            self._in_pieces.add(number)

    def settle(self, numbers: Iterable[int]) -> None:
        """These are trained on or dropped, for good.

        Raises:
            ValueError: one of them is not outstanding.
        """
        for number in numbers:
            if number not in self._numbers:
                raise ValueError(f"rollout {number} is settled a second time, or was never begun")
            self._numbers.discard(number)
            self._in_pieces.discard(number)

    @property
    def prompts_drawn(self) -> int:
        return self._prompts_drawn

    def to_resume(self) -> tuple[int, ...]:
        """For `RunCursor.outstanding`."""
        return tuple(sorted(self._numbers - self._in_pieces))
