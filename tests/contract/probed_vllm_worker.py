"""A rollout worker that also says what its served weights give to a prompt."""
# pyright: reportMissingImports=false

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.generation.vllm.worker import VllmWorker, compat
from qwen3_distill.hosts.serve import serve_worker


class ProbedWorker(VllmWorker):
    async def prompt_logprobs(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """[T - 1] nats of every token but the first, under the served weights at temperature 1."""
        from vllm import SamplingParams  # noqa: PLC0415 - after the worker has set its variables
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        parameters = SamplingParams(
            temperature=1.0,
            max_tokens=1,  # one token must be sampled and is ignored
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        outputs = [
            output
            async for output in self._engine.generate(
                compat.prompt(token_ids, self._num_loads),
                parameters,
                "prompt-logprobs",
                lora_request=self._adapter(),
            )
        ]
        rows = zip(outputs[-1].prompt_logprobs[1:], list(token_ids)[1:], strict=True)
        return np.array([row[token].logprob for row, token in rows], dtype=np.float32)


if __name__ == "__main__":
    serve_worker(ProbedWorker())
