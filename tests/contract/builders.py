"""Builders that the contract suites share."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from qwen3_distill.hosts.host import Host, MakeHost
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.ports import (
    FullWeights,
    RolloutEngine,
    StreamingRolloutEngine,
    TeacherScorer,
)
from qwen3_distill.scoring.views import SameView
from qwen3_distill.types import (
    FinishReason,
    Prompt,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    SamplingSpec,
    ScoringJob,
    TeacherScore,
    TokenSpan,
    VersionSpan,
    WeightVersion,
)
from qwen3_distill.weights.memory import MemoryChannel
from tests.tiny_models import EOS_ID

T = TypeVar("T")


class Hosted(Protocol):
    """An engine in a host."""

    @property
    def host(self) -> Host: ...


def pid_of(hosted: Hosted) -> int:
    """Leader of the process group that an engine's worker is in."""
    pid = getattr(hosted.host, "pid", None)
    assert isinstance(pid, int)
    return pid


def with_module(module: str, make_host: MakeHost = LocalProcess) -> MakeHost:
    """Makes hosts that run another worker, a module of these tests."""
    return lambda spec: make_host(replace(spec, module=module))


VERSION = WeightVersion(step=0, digest="synthetic")


_LOOP = asyncio.new_event_loop()
HANGS_S = 300
"""What takes longer hangs: an engine's start is a minute where a machine is busy."""
LONG = 400
"""New tokens of a rollout that a test acts on while it runs."""
SLOW_STEP_S = 0.005
"""Added to a step while such a rollout runs, in engines with a process of their own: a step
of a tiny model ends before a busy machine has woken the process that is to look at it."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """On one loop for the whole session: engines in processes of their own are bound to theirs."""
    return _LOOP.run_until_complete(asyncio.wait_for(work, HANGS_S))


def draws_after(action: Callable[[], object]) -> tuple[float, float, float]:
    """The next numbers of the global generators, each seeded before the action."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    action()
    return random.random(), np.random.random(), torch.rand(()).item()


def make_prompt(length: int, seed: int = 0) -> Prompt:
    """Random byte tokens."""
    ids = np.random.default_rng([seed, length]).integers(0, 256, size=length)
    return Prompt(prompt_id=f"p{seed}/{length}", token_ids=ids.astype(np.int32))


def make_spec(seed: int = 0, **overrides: Any) -> SamplingSpec:
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 24,
    }
    return SamplingSpec(seed=seed, **(settings | overrides))


def make_request(rollout_id: str, prompt: Prompt, spec: SamplingSpec) -> RolloutRequest:
    return RolloutRequest(rollout_id=rollout_id, prompt=prompt, sampling=spec)


def ragged_requests(count: int = 14, **overrides: Any) -> list[RolloutRequest]:
    """Prompts of 1 to 40 tokens, 1 to 30 new tokens, one seed each."""
    return [
        make_request(
            f"r{i}",
            make_prompt(1 + (i * 17) % 40, seed=i),
            make_spec(seed=100 + i, **({"max_new_tokens": 1 + (i * 11) % 30} | overrides)),
        )
        for i in range(count)
    ]


async def collect(engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """All rollouts that come, as they come."""
    return [rollout async for rollout in engine.generate(requests)]


async def prefixes_when(
    engine: StreamingRolloutEngine, ready: Callable[[list[RolloutPrefix]], bool]
) -> list[RolloutPrefix]:
    """The first prefixes that are ``ready``."""
    for _ in range(20_000):
        if ready(prefixes := await engine.prefixes()):
            return prefixes
        await asyncio.sleep(0.0005)
    raise AssertionError("never ready")


@asynccontextmanager
async def paused(engine: StreamingRolloutEngine) -> AsyncIterator[None]:
    """A test that fails here leaves no paused engine to the next."""
    await engine.pause()
    try:
        yield
    finally:
        await engine.resume()


async def collecting_when(
    engine: StreamingRolloutEngine,
    requests: Sequence[RolloutRequest],
    ready: Callable[[list[RolloutPrefix]], bool],
) -> tuple["asyncio.Task[list[Rollout]]", list[RolloutPrefix]]:
    """A task that collects the requests, and the first of their prefixes that are ``ready``.

    Where a machine holds up the look at them until all have ended, they are begun again.
    """
    for _ in range(100):
        collecting = asyncio.create_task(collect(engine, requests))
        while not collecting.done():
            if ready(prefixes := await engine.prefixes()):
                return collecting, prefixes
            await asyncio.sleep(0.0005)
        await collecting
    raise AssertionError("never ready")


def longest(prefixes: Sequence[RolloutPrefix]) -> int:
    """New tokens of the longest."""
    return max((prefix.response_ids.size for prefix in prefixes), default=0)


def long_requests(
    count: int, new_tokens: int = 90, prompt_tokens: int = 12
) -> list[RolloutRequest]:
    """Requests that run for a while."""
    return [
        make_request(
            f"long{i}", make_prompt(prompt_tokens), make_spec(i, max_new_tokens=new_tokens)
        )
        for i in range(count)
    ]


def generate(engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """All rollouts, in the order of the requests, each exactly once."""

    rollouts = run(collect(engine, requests))
    by_id = {rollout.rollout_id: rollout for rollout in rollouts}
    assert len(by_id) == len(rollouts) == len(requests)
    return [by_id[request.rollout_id] for request in requests]


def synthetic_rollout(
    prompt_tokens: int,
    response_tokens: int,
    seed: int = 0,
    *,
    behavior_logprobs: Iterable[float] | None = None,
    version: WeightVersion = VERSION,
    sampled: Sequence[tuple[int, int]] = (),
) -> Rollout:
    """Random tokens that no model sampled, for scorers and learners.

    Args:
        sampled: spans of the response that count as sampled; left out: all of it.
    """
    rng = np.random.default_rng([seed, prompt_tokens, response_tokens])
    num_sampled = sum(stop - start for start, stop in sampled) or response_tokens
    values = np.full(num_sampled, -5.0) if behavior_logprobs is None else behavior_logprobs
    return Rollout(
        rollout_id=f"s{seed}/{prompt_tokens}+{response_tokens}",
        prompt=make_prompt(prompt_tokens, seed),
        sampling=make_spec(seed, max_new_tokens=response_tokens),
        response_ids=rng.integers(0, 256, size=response_tokens).astype(np.int32),
        behavior_logprobs=np.array(list(values), dtype=np.float32),
        versions=(VersionSpan(start=0, stop=num_sampled, version=version),),
        finish_reason=FinishReason.LENGTH,
        sampled=tuple(TokenSpan(start=start, stop=stop) for start, stop in sampled),
    )


def directory_weights(model_dir: Path) -> dict[str, Tensor]:
    model = load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def likelier_eos(weights: Mapping[str, Tensor], factor: float = 2.0) -> dict[str, Tensor]:
    """Weights of a tied model that ends an answer about every 40 tokens."""
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed["model.embed_tokens.weight"][EOS_ID] *= factor
    return changed


def published(weights: Mapping[str, Tensor], step: int = 0) -> tuple[WeightVersion, MemoryChannel]:
    """A channel that holds the weights under their true digest."""
    version = WeightVersion(step=step, digest=weights_digest(weights))
    channel = MemoryChannel()
    channel.publish(version, FullWeights(tensors=weights))
    return version, channel


def serve(engine: RolloutEngine, weights: Mapping[str, Tensor], step: int = 0) -> WeightVersion:
    version, channel = published(weights, step)
    run(engine.load(version, channel))
    return version


_STARTED: list[TeacherScorer] = []


def started(teacher: TeacherScorer) -> TeacherScorer:
    """Closed by `close_started`."""
    run(teacher.start())
    _STARTED.append(teacher)
    return teacher


def close_started() -> None:
    while _STARTED:
        run(_STARTED.pop().close())


def jobs_of(rollouts: Iterable[Rollout]) -> list[ScoringJob]:
    """Jobs of a teacher that reads the student's own tokens."""
    return [SameView().job(rollout) for rollout in rollouts]


def scores_of(teacher: TeacherScorer, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
    """Every rollout's score; none may be missing."""
    results = run(teacher.score(jobs_of(rollouts)))
    scores = [result for result in results if isinstance(result, TeacherScore)]
    assert len(scores) == len(results) == len(rollouts)
    return scores
