"""Static batches sample what continuous ones do, and begin every wave with nothing of the last."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwen3_distill.generation.embedded import static_batch
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.embedded.static_batch import StaticBatch
from qwen3_distill.types import FinishReason, Rollout, RolloutRequest
from tests.contract.builders import (
    directory_weights,
    generate,
    make_prompt,
    make_request,
    make_spec,
    run,
    serve,
)
from tests.tiny_models import TinyModels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def build(models: TinyModels, device: str, **settings: object) -> EmbeddedRolloutEngine:
    engine = EmbeddedRolloutEngine(
        models.student,
        device=device,
        dtype="float32",
        max_sequences=8,
        **settings,  # pyright: ignore[reportArgumentType]
    )
    serve(engine, directory_weights(models.student))
    return engine


@pytest.fixture(params=DEVICES)
def pair(
    request: pytest.FixtureRequest, tiny_models: TinyModels
) -> Iterator[tuple[EmbeddedRolloutEngine, EmbeddedRolloutEngine]]:
    """An engine of each kind of batch."""
    both = (
        build(tiny_models, request.param),
        build(tiny_models, request.param, batching="static"),
    )
    yield both
    for engine in both:
        run(engine.close())


def wave(first: int, count: int, *, new_tokens: int = 21, **sampling: Any) -> list[RolloutRequest]:
    return [
        make_request(
            f"r{index}",
            make_prompt(3 + index % 5),
            make_spec(index, max_new_tokens=new_tokens - index % 4, **sampling),
        )
        for index in range(first, first + count)
    ]


def assert_same(static: list[Rollout], continuous: list[Rollout]) -> None:
    for ours, theirs in zip(static, continuous, strict=True):
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        assert ours.finish_reason == theirs.finish_reason
        np.testing.assert_allclose(ours.behavior_logprobs, theirs.behavior_logprobs, atol=2e-5)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.7, "top_k": 9}],
    ids=["plain", "greedy", "top_k", "top_p", "cold_top_k"],
)
def test_both_kinds_of_batch_sample_the_same_tokens(
    pair: tuple[EmbeddedRolloutEngine, EmbeddedRolloutEngine], sampling: dict[str, Any]
) -> None:
    continuous, static = pair
    for requests in (wave(0, 7, **sampling), wave(30, 5, **sampling), wave(50, 19, **sampling)):
        assert_same(generate(static, requests), generate(continuous, requests))


def test_steps_read_what_a_long_answer_has_filled(
    pair: tuple[EmbeddedRolloutEngine, EmbeddedRolloutEngine],
) -> None:
    continuous, static = pair
    requests = wave(0, 3, new_tokens=3 * static_batch._COLUMNS)
    assert_same(generate(static, requests), generate(continuous, requests))


@pytest.mark.parametrize("columns", [64, 256, 512, 576, 4096])
def test_few_widths_hold_all_columns_that_are_filled(columns: int) -> None:
    steps = object.__new__(static_batch._Steps)
    features = static_batch.SamplingFeatures(False, False, False)
    steps._shape = static_batch._Shape(16, columns, features, 0)
    widths = [steps._width(filled) for filled in range(1, columns + 1)]
    assert all(filled <= width <= columns for filled, width in enumerate(widths, 1))
    assert len(set(widths)) <= static_batch._MAX_WIDTHS
    assert widths[0] <= max(columns // 4, static_batch._COLUMNS)


def test_a_shape_is_prepared_once_and_the_oldest_is_freed(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    prepare = static_batch._Steps.__init__

    def counted(self: object, model: object, device: object, shape: object) -> None:
        made.append(shape.num_columns)  # type: ignore[attr-defined]
        prepare(self, model, device, shape)  # type: ignore[arg-type]

    monkeypatch.setattr(static_batch._Steps, "__init__", counted)
    engine = build(tiny_models, "cpu", batching="static")
    for new_tokens in (10, 10, 80, 10, 150, 210, 280, 10):
        generate(engine, wave(0, 2, new_tokens=new_tokens))
    run(engine.close())
    assert made == [64, 128, 192, 256, 320]  # 10 again is kept: it was used in between


def test_the_limit_and_the_end_hold_within_a_read(tiny_models: TinyModels) -> None:
    engine = build(tiny_models, "cpu", batching="static")
    requests = [
        make_request(f"r{n}", make_prompt(4), make_spec(n, max_new_tokens=n)) for n in range(1, 20)
    ]
    rollouts = generate(engine, requests)
    run(engine.close())
    for rollout, request in zip(rollouts, requests, strict=True):
        limit = request.sampling.max_new_tokens
        ended = rollout.finish_reason is FinishReason.STOP
        assert rollout.num_tokens == limit or (ended and rollout.num_tokens < limit)


def test_waiting_rows_begin_when_all_others_have_ended(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves: list[int] = []
    step = StaticBatch.step

    def watched(self: StaticBatch, joining: list[object]) -> None:
        if joining:
            assert not self.rows
            waves.append(len(joining))
        step(self, joining)  # type: ignore[arg-type]

    monkeypatch.setattr(StaticBatch, "step", watched)
    engine = build(tiny_models, "cpu", batching="static")
    asyncio.run(_collect(engine, wave(0, 19)))
    run(engine.close())
    assert waves == [8, 8, 3]


async def _collect(engine: EmbeddedRolloutEngine, requests: list[RolloutRequest]) -> None:
    assert len([rollout async for rollout in engine.generate(requests)]) == len(requests)
