"""Beginning a step's passes again where the device's memory did not suffice.

Until the optimizer steps, passes leave nothing but gradients. So a step that ran out of memory may
begin again, with what it had left dropped: it is the same step. What stopped it is often no lack
but memory in pieces too small (`segments`), and nothing is in pieces then.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from qwen3_distill.training.memory_lack import memory_lack
from qwen3_distill.types import Metric

Result = TypeVar("Result")


class Room:
    """The tokens that a step passes at a time: fewer, for good, where memory keeps lacking.

    The first lack of memory is followed by the same passes. Each further one halves the
    micro-batches, as long as one with several rollouts is what failed: the step stays the same but
    for the order of its sums.

    Args:
        micro_batch_tokens: the most tokens at a time.
        forget: drops what a failed attempt left on the device.
        may_begin_again: whether this learner can, alone: not where others take part in its passes.
    """

    def __init__(
        self, micro_batch_tokens: int, forget: Callable[[], None], *, may_begin_again: bool
    ) -> None:
        self.micro_batch_tokens = micro_batch_tokens
        self.num_rollouts = 0
        """Rollouts of the micro-batch that is being passed; the passes set it."""
        self._forget = forget
        self._may_begin_again = may_begin_again
        self._has_lacked = False
        self._retries = 0

    def find(self, passes: Callable[["Room"], Result]) -> Result:
        """Return what the passes of a step return, at the first attempt with enough memory.

        Raises:
            OutOfMemoryError: it did not suffice for one rollout, or the step cannot begin again.
        """
        self._retries = 0
        while True:
            with memory_lack() as lack:
                return passes(self)
            self._forget()
            if not self._make():
                again = f" Begun {self._retries + 1} times, at last with micro-batches of at most "
                again += f"{self.micro_batch_tokens} tokens."
                raise torch.OutOfMemoryError(f"{lack.text}{again if self._retries else ''}")
            self._retries += 1

    def metrics(self) -> tuple[Metric, ...]:
        """Metrics of the last step; none before the first lack."""
        if not self._has_lacked:
            return ()
        return (
            Metric.sum("train/memory_retries", self._retries),
            Metric.max("train/micro_batch_tokens", self.micro_batch_tokens),
        )

    def _make(self) -> bool:
        """Make room after a lack; return whether to begin again."""
        is_first, self._has_lacked = not self._has_lacked, True
        if not self._may_begin_again:
            return False
        if not is_first and self.num_rollouts > 1 and self.micro_batch_tokens > 1:
            self.micro_batch_tokens //= 2
            return True
        return self._retries == 0
