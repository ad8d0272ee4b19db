"""The embedded rollout engine's process, with the pause in its steps that `slow_steps` has."""

import time
from collections.abc import Sequence

from qwen3_distill.generation.embedded.decode_batch import DecodeBatch, DecodeRow
from qwen3_distill.generation.embedded.worker import EmbeddedRolloutWorker
from qwen3_distill.hosts.serve import serve_worker
from tests.contract.builders import LONG, SLOW_STEP_S


class SlowBatch(DecodeBatch):
    def step(self, joining: Sequence[DecodeRow]) -> None:
        super().step(joining)
        if any(row.request.sampling.max_new_tokens >= LONG for row in self.rows):
            time.sleep(SLOW_STEP_S)


if __name__ == "__main__":
    from qwen3_distill.generation.embedded import engine as embedded

    embedded.DecodeBatch = SlowBatch
    serve_worker(EmbeddedRolloutWorker())
