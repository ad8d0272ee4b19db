"""What the embedded engine does beyond the contract: who shares a step, and how it ends."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from qwen3_distill.errors import EngineError
from qwen3_distill.generation.embedded import decode_batch
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.types import Rollout
from tests.contract.builders import (
    collect,
    directory_weights,
    generate,
    long_requests,
    make_prompt,
    make_request,
    make_spec,
    prefixes_when,
    ragged_requests,
    run,
    serve,
)
from tests.tiny_models import TinyModels


def build(models: TinyModels, max_sequences: int) -> EmbeddedRolloutEngine:
    engine = EmbeddedRolloutEngine(
        models.student, device="cpu", dtype="float32", max_sequences=max_sequences
    )
    serve(engine, directory_weights(models.student))
    return engine


@pytest.fixture
def engine(tiny_models: TinyModels) -> Iterator[EmbeddedRolloutEngine]:
    built = build(tiny_models, max_sequences=8)
    yield built
    run(built.close())


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Rows, new positions and cached positions of every forward pass."""
    seen: list[tuple[int, int, int]] = []
    forward = decode_batch.next_token_logits

    def watched(model: Any, ids_BT: Tensor, mask_BT: Tensor, *rest: Any) -> Tensor:
        seen.append((ids_BT.shape[0], ids_BT.shape[1], mask_BT.shape[1]))
        return forward(model, ids_BT, mask_BT, *rest)

    monkeypatch.setattr(decode_batch, "next_token_logits", watched)
    return seen


def bits(rollouts: list[Rollout]) -> list[tuple[bytes, bytes]]:
    return [(r.response_ids.tobytes(), r.behavior_logprobs.tobytes()) for r in rollouts]


def test_one_call_gives_the_same_bits_whatever_came_before(
    engine: EmbeddedRolloutEngine, tiny_models: TinyModels
) -> None:
    requests = ragged_requests(8)
    expected = bits(generate(build(tiny_models, max_sequences=8), requests))

    async def other_work() -> None:
        stream = engine.generate(long_requests(5))
        await asyncio.gather(anext(stream), collect(engine, ragged_requests(11)))
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue] - a generator

    run(other_work())
    assert bits(generate(engine, requests)) == expected


def test_requests_of_one_call_are_decoded_together_from_their_first_token(
    engine: EmbeddedRolloutEngine, shapes: list[tuple[int, int, int]]
) -> None:
    requests = [
        make_request(f"r{i}", make_prompt(3 + i), make_spec(i, max_new_tokens=5)) for i in range(8)
    ]
    generate(engine, requests)
    assert shapes[:2] == [(8, 10, 10), (8, 1, 11)]


def test_rows_that_leave_make_room_before_the_others_have_finished(
    engine: EmbeddedRolloutEngine, shapes: list[tuple[int, int, int]]
) -> None:
    long = make_request("long", make_prompt(4), make_spec(1, max_new_tokens=100))
    short = [
        make_request(f"s{i}", make_prompt(4), make_spec(i, max_new_tokens=4)) for i in range(70)
    ]
    rollouts = generate(engine, [long, *short])
    steps = [rows for rows, new, _ in shapes if new == 1]
    assert max(steps) <= 8
    assert len(steps) == rollouts[0].num_tokens - 1  # the short ones took no step of their own
    assert sum(steps) < 1.6 * sum(rollout.num_tokens - 1 for rollout in rollouts)


def test_the_cache_stays_as_wide_as_its_longest_row(
    engine: EmbeddedRolloutEngine, shapes: list[tuple[int, int, int]]
) -> None:
    requests = [
        make_request(f"r{i}", make_prompt(1 + i % 5), make_spec(i, max_new_tokens=10 + i % 7))
        for i in range(100)
    ]
    generate(engine, requests)
    assert max(width for *_, width in shapes) <= 5 + 16 + 16  # since the last joining at most


def test_few_waiting_rows_join_at_last_though_the_batch_is_busy(
    engine: EmbeddedRolloutEngine,
) -> None:
    async def join() -> int:
        background = asyncio.create_task(collect(engine, long_requests(4, new_tokens=200)))
        await prefixes_when(engine, bool)
        late = make_request("late", make_prompt(3), make_spec(max_new_tokens=1))
        await collect(engine, [late])
        (oldest, *_) = await engine.prefixes()
        assert not background.done()
        await background
        return oldest.response_ids.size

    assert run(join()) < 20


# --- Ends ---------------------------------------------------------------------------------------


def test_an_error_reaches_every_call_and_the_engine_works_on(
    engine: EmbeddedRolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Tensor:
        raise FloatingPointError("by hand")

    async def fail_under_way() -> list[Any]:
        calls = [asyncio.create_task(collect(engine, ragged_requests(n))) for n in (3, 9)]
        await prefixes_when(engine, bool)
        with monkeypatch.context() as patch:
            patch.setattr(decode_batch, "next_token_logits", fail)
            waiting = asyncio.gather(*calls, return_exceptions=True)
            return await asyncio.wait_for(waiting, 60)

    for result in run(fail_under_way()):
        assert isinstance(result, FloatingPointError)
    assert len(generate(engine, ragged_requests())) == len(ragged_requests())


def test_close_ends_what_waits_with_an_error(engine: EmbeddedRolloutEngine) -> None:
    async def close_under_way() -> None:
        calls = [asyncio.create_task(collect(engine, long_requests(n))) for n in (3, 9)]
        await prefixes_when(engine, bool)
        await engine.close()
        for call in calls:
            with pytest.raises(EngineError, match="closed"):
                await call

    run(close_under_way())
    assert run(engine.prefixes()) == []


def test_a_cancelled_call_leaves_the_others_alone(engine: EmbeddedRolloutEngine) -> None:
    expected = generate(engine, long_requests(3))
    others = [
        make_request(f"other{i}", make_prompt(5), make_spec(i, max_new_tokens=200))
        for i in range(9)
    ]

    async def cancel_one() -> list[Rollout]:
        cancelled = asyncio.create_task(collect(engine, others))
        await prefixes_when(engine, bool)
        kept = asyncio.create_task(collect(engine, long_requests(3)))
        await prefixes_when(engine, lambda prefixes: max(p.response_ids.size for p in prefixes) > 9)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        rollouts = await kept
        assert not await engine.prefixes()
        return rollouts

    by_id = {rollout.rollout_id: rollout for rollout in run(cancel_one())}
    assert {id: r.response_ids.tolist() for id, r in by_id.items()} == {
        r.rollout_id: r.response_ids.tolist() for r in expected
    }


def test_an_engine_may_go_from_one_event_loop_to_the_next(tiny_models: TinyModels) -> None:
    engine = build(tiny_models, max_sequences=2)
    stream = engine.generate(long_requests(3))

    async def leave_it_running() -> None:
        await anext(stream)

    asyncio.run(leave_it_running())
    rollouts = asyncio.run(collect(engine, ragged_requests(3)))
    assert len(rollouts) == 3
    asyncio.run(engine.close())
