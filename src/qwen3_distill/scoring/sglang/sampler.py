"""The SGLang teacher as a `Sampler`: evaluation measures its accuracy with it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from qwen3_distill.errors import EngineError
from qwen3_distill.scoring.sglang.client import backoff_s
from qwen3_distill.scoring.sglang.endpoint import SglangEndpoint
from qwen3_distill.scoring.sglang.faults import Fault, FaultKind, Refused, ReplyError, Unanswered
from qwen3_distill.scoring.sglang.wire import answer_body, answer_reply_limit, read_answer
from qwen3_distill.types import ModelIdentity, Rollout, RolloutRequest, WeightVersion


class SglangSampler:
    """A `Sampler` that sends prompts to the scoring servers.

    The servers draw their own random numbers: the same request gives another answer the next time,
    unless they run with ``enable-deterministic-inference``.

    Args:
        version: names the teacher's weights in the rollouts.
    """

    def __init__(
        self, endpoint: SglangEndpoint, identity: ModelIdentity, version: WeightVersion
    ) -> None:
        self._endpoint = endpoint
        self._identity = identity
        self._version = version

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout, None]:
        """See `Sampler.generate`.

        Raises:
            EngineError: a request got no answer after all attempts.
        """
        for request in requests:
            self._endpoint.check_vocabulary(request.rollout_id, request.prompt.token_ids)
        tasks = [asyncio.create_task(self._answer(request)) for request in requests]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, request: RolloutRequest) -> Rollout:
        eos_ids, vocab_size = self._identity.eos_ids, self._identity.vocab_size
        max_attempts = self._endpoint.config.max_attempts
        body = answer_body(request, eos_ids, vocab_size)
        budget = request.sampling.max_new_tokens
        fault = Fault(FaultKind.CONNECTION, "not asked")
        for attempt in range(1, max_attempts + 1):
            try:
                reply = await self._endpoint.ask_for_answer(
                    body,
                    tokens=int(request.prompt.token_ids.size) + budget,
                    max_bytes=answer_reply_limit(request),
                    max_new_tokens=budget,
                )
                return read_answer(reply, request, eos_ids, self._version, vocab_size=vocab_size)
            except (Unanswered, ReplyError) as error:
                fault = error.fault
            except Refused as error:
                raise EngineError(f"{request.rollout_id}: {error}") from error
            if attempt < max_attempts:
                self._endpoint.count(f"evaluate/retried_{fault.kind.value}")
                await asyncio.sleep(backoff_s(attempt))
        raise EngineError(
            f"{request.rollout_id}: the teacher gave no answer in {max_attempts} "
            f"attempts: {fault.detail}"
        )
