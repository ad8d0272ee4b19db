"""Groups of ranks: dealing, K ranks taking the step of one, and the loss of a rank."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwen3_distill.config import (
    EmbeddedTraining,
    FullTuning,
    LoraTuning,
    OptimizerConfig,
    ProportionalLaw,
    ReplayConfig,
    SampledReverseKL,
)
from qwen3_distill.errors import ConfigError, EngineStartError, LearnerLost
from qwen3_distill.training.embedded.hosted import hosted_embedded_learner
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.group import GroupLearner, port_on_this_machine
from qwen3_distill.training.rank_place import RankPlace, deal, shares_of
from qwen3_distill.training.ranks import Ranks
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import Batch, ScoredRollout, TeacherScore
from tests.contract.adapters import build_group
from tests.contract.builders import run, synthetic_rollout
from tests.tiny_models import TinyModels

LENGTHS = [(1, 1), (9, 30), (40, 2), (3, 17), (12, 1), (1, 55), (25, 8)]
SMOOTH = OptimizerConfig(learning_rate=1e-2, eps=1e-2, weight_decay=0.1)


def scored(seed: int, prompt: int, response: int) -> ScoredRollout:
    rng = np.random.default_rng([seed, 7])
    rollout = synthetic_rollout(
        prompt, response, seed, behavior_logprobs=-rng.uniform(1, 9, response)
    )
    score = TeacherScore(teacher_id="t", logprobs=-rng.uniform(1, 9, response).astype(np.float32))
    return ScoredRollout(rollout=rollout, score=score)


def ragged_batch(count: int = len(LENGTHS)) -> Batch:
    """Rollouts of uneven lengths, each with a weight and a task reward of its own."""
    rollouts = [scored(i, *LENGTHS[i]) for i in range(count)]
    rng = np.random.default_rng(3)
    return replace(
        Batch.uniform(rollouts),
        importance_weights=rng.uniform(0.2, 1, count).astype(np.float32),
        task_advantages=rng.normal(size=count).astype(np.float32),
    )


def settings_of(models: TinyModels, **changes: Any) -> LearnerSettings[EmbeddedTraining]:
    training = EmbeddedTraining(
        kind="embedded",
        device="cpu",
        own_process=True,
        threads=1,
        micro_batch_tokens=60,
        optimizer=SMOOTH,
        **changes,
    )
    return LearnerSettings(
        model_dir=models.student,
        training=training,
        objective=SampledReverseKL(kind="sampled_reverse_kl"),
        total_steps=9,
        seed=0,
        # Draws follow the priorities, which every rank learns for its own share of a step.
        replay=ReplayConfig(
            capacity_tokens=1024,
            max_age_steps=8,
            law=ProportionalLaw(kind="proportional", alpha=2.0),
            priority_clip_nats=20.0,
        ),
    )


# --- Dealing --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_every_rollout_is_dealt_once_and_the_loads_are_close(
    tokens: list[int], num_ranks: int
) -> None:
    dealt = deal(tokens, num_ranks)
    assert sorted(index for rank in dealt for index in rank) == list(range(len(tokens)))
    loads = [sum(tokens[index] for index in rank) for rank in dealt]
    assert max(loads) - min(loads) <= max(tokens, default=0)


def test_shares_carry_the_numbers_of_the_whole_step() -> None:
    batch = ragged_batch(2)
    shares = shares_of(batch, 3, lag_steps=4)
    assert [share.batch is None for share in shares].count(True) == 1
    assert {share.denominator for share in shares} == {batch.denominator}
    assert {share.num_loss_tokens for share in shares} == {batch.num_loss_tokens}
    longest = {(share.longest_id, share.longest_tokens, share.lag_steps) for share in shares}
    assert longest == {("s1/9+30", 39, 4)}


# --- Steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "tuning", [FullTuning(kind="full"), LoraTuning(kind="lora", rank=4)], ids=["full", "lora"]
)
def test_ranks_take_the_step_that_one_learner_takes(
    tiny_models: TinyModels, tmp_path: Path, num_ranks: int, tuning: Any
) -> None:
    config = settings_of(tiny_models, tuning=tuning)
    alone = build_embedded_learner(
        replace(config, training=config.training.model_copy(update={"own_process": False}))
    )
    group = build_group(config, num_ranks)
    run(group.start())
    assert group.version == alone.version
    for count in (7, 2, 1):  # with fewer rollouts than ranks
        batch = ragged_batch(count)
        one, many = run(alone.update(batch)), run(group.update(batch))
        assert many.num_loss_tokens == one.num_loss_tokens
        assert many.loss == pytest.approx(one.loss, rel=1e-5)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
        if num_ranks == 1:
            assert many.version == one.version  # bit for bit
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    run(alone.save_state(tmp_path / "one"))
    run(group.save_state(tmp_path / "many"))
    assert_close(tmp_path / "one", tmp_path / "many")
    run(group.close())


def test_every_rank_is_traced_and_its_tokens_are_counted(tiny_models: TinyModels) -> None:
    group = build_group(settings_of(tiny_models), 3)
    spans: list[tuple[str, str]] = []

    @contextmanager
    def span(member: str, work: str) -> Iterator[None]:
        spans.append((member, work))
        yield

    group.span = span
    run(group.start())
    batch = ragged_batch(2)
    run(group.update(batch))
    assert sorted(spans) == [
        ("rank_0", "1 rollouts"),
        ("rank_1", "1 rollouts"),
        ("rank_2", "0 rollouts"),
    ]
    tokens = [s.rollout.prompt.token_ids.size + s.rollout.num_tokens for s in batch.scored]
    counted = [group.counters[f"fleet/rank_{rank}_tokens"] for rank in range(3)]
    # A pass reads all tokens but the last one.
    assert counted == [max(tokens) - 1, min(tokens) - 1, 0]
    run(group.start())
    assert group.counters["fleet/rank_2_restarts"] == 1
    run(group.close())


def assert_close(left: Path, right: Path) -> None:
    one = load_file(left / "weights.safetensors")
    many = load_file(right / "weights.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-5, atol=2e-6)


def test_ranks_replay_what_one_learner_replays(tiny_models: TinyModels, tmp_path: Path) -> None:
    config = settings_of(tiny_models)
    alone = build_embedded_learner(
        replace(config, training=config.training.model_copy(update={"own_process": False}))
    )
    group = build_group(config, 2)
    run(group.start())
    for learner in (alone, group):
        run(learner.admit([scored(i, *LENGTHS[i]) for i in range(7)]))
    for _ in range(3):
        one, many = run(alone.update_replayed(4)), run(group.update_replayed(4))
        assert many.num_loss_tokens == one.num_loss_tokens
        assert many.loss == pytest.approx(one.loss, rel=1e-4)
    state = tmp_path / "state"
    state.mkdir()
    run(group.save_state(state))
    other = build_group(config, 3)
    run(other.start())
    run(other.load_state(state, group.version))
    assert other.version == group.version
    assert run(other.update_replayed(4)).loss == pytest.approx(
        run(group.update_replayed(4)).loss, rel=1e-4
    )
    run(group.close())
    run(other.close())


# --- Faults ---------------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_group_and_the_state_goes_on(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = settings_of(tiny_models)
    ranks = [hosted_embedded_learner(config, log=tmp_path / f"{i}.log") for i in range(2)]
    group = GroupLearner(ranks, timeout_s=60.0)
    run(group.start())
    run(group.update(ragged_batch()))
    run(group.save_state(tmp_path))
    saved = group.version
    following = run(group.update(ragged_batch())).version
    ranks[1].host.kill()
    with pytest.raises(LearnerLost, match="rank 1 of 2 failed, and the group was ended with it"):
        run(group.update(ragged_batch()))
    assert not any(rank.host.is_running for rank in ranks)
    run(group.start())
    run(group.load_state(tmp_path, saved))
    assert run(group.update(ragged_batch())).version == following
    run(group.close())


def test_ranks_with_different_weights_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    config = settings_of(tiny_models, tuning=LoraTuning(kind="lora", rank=4))
    ranks = [
        hosted_embedded_learner(replace(config, seed=seed), log=tmp_path / f"{seed}.log")
        for seed in (0, 1)
    ]
    group = GroupLearner(ranks, timeout_s=60.0)
    run(group.start())  # B is 0: their merged weights are the same still
    with pytest.raises(LearnerLost, match="the ranks have different weights"):
        run(group.update(ragged_batch()))
    run(group.close())


def test_ranks_that_do_not_meet_are_named() -> None:
    with closing(port_on_this_machine()) as meeting:
        place = RankPlace(index=1, count=2, address=meeting.address, timeout_s=1.0)
        with pytest.raises(EngineStartError, match=r"rank 1 of 2 did not meet .* within 1 s"):
            Ranks(place, torch.device("cpu"))


def test_nobody_else_gets_the_port_at_which_ranks_are_to_meet() -> None:
    tried: list[int] = []

    class FakeRank:
        """FAKE: tries to take the port before it would meet the others there."""

        place: RankPlace

        async def start(self) -> None:
            port = int(self.place.address.rpartition(":")[2])
            with closing(socket.socket()) as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
            tried.append(port)
            raise EngineStartError("that is all")

        async def close(self) -> None: ...

    group = GroupLearner([cast(Any, FakeRank())], timeout_s=1.0)
    with pytest.raises(EngineStartError, match="that is all"):
        run(group.start())
    with closing(socket.socket()) as other:  # it is given back
        other.bind(("127.0.0.1", tried[0]))


def test_a_group_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one rank"):
        GroupLearner([], timeout_s=1.0)
