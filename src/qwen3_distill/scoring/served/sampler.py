"""A served teacher as a `Sampler`: evaluation measures its accuracy with it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from qwen3_distill.errors import EngineError
from qwen3_distill.scoring.served.client import backoff_s
from qwen3_distill.scoring.served.endpoint import ServedEndpoint
from qwen3_distill.scoring.served.faults import Fault, FaultKind, Refused, ReplyError, Unanswered
from qwen3_distill.types import ModelIdentity, Rollout, RolloutRequest, WeightVersion


class ServedSampler:
    """A `Sampler` that sends prompts to the scoring servers.

    The servers draw their own random numbers: the same request gives another answer the next time,
    unless they run with ``enable-deterministic-inference``.

    Args:
        version: names the teacher's weights in the rollouts.
    """

    def __init__(
        self, endpoint: ServedEndpoint, identity: ModelIdentity, version: WeightVersion
    ) -> None:
        self._endpoint = endpoint
        self._identity = identity
        self._version = version

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout, None]:
        """See `Sampler.generate`.

        Raises:
            EngineError: a request got no answer after all attempts, or a server's logprobs are not
                those of the distribution that it samples from.
        """
        await self._endpoint.check_sampling(self._identity.eos_ids)
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
        wire = self._endpoint.wire
        body = wire.answer_body(request, eos_ids, vocab_size)
        budget = request.sampling.max_new_tokens
        fault = Fault(FaultKind.CONNECTION, "not asked")
        for attempt in range(1, max_attempts + 1):
            try:
                reply = await self._endpoint.ask_for_answer(
                    body,
                    tokens=int(request.prompt.token_ids.size) + budget,
                    max_bytes=wire.answer_reply_limit(request),
                    max_new_tokens=budget,
                )
                return wire.read_answer(
                    reply, request, eos_ids, self._version, vocab_size=vocab_size
                )
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
