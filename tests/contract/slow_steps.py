"""A pause in vLLM's steps while a long request runs, so that a test gets to act on what runs.

Loaded by the engine through ``logits_processors``; logits stay as they are.
"""
# pyright: reportMissingImports=false

import time
from typing import Any

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from tests.contract.builders import LONG, SLOW_STEP_S


class SlowSteps(LogitsProcessor):
    def __init__(self, *_: Any) -> None:
        self._long: dict[int, bool] = {}

    def update_state(self, batch_update: Any) -> None:
        """Called before each step."""
        process_dict_updates(self._long, batch_update, _is_long)
        if self._long:
            time.sleep(SLOW_STEP_S)

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True


def _is_long(parameters: SamplingParams, *_: Any) -> bool | None:
    return True if (parameters.max_tokens or 0) >= LONG else None
