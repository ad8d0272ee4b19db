"""The buffer against a model of it in plain Python: nothing lost, nothing twice, bits as added."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file

from qwen3_distill.config import ReplayConfig
from qwen3_distill.errors import AlignmentError, CheckpointError, DataError
from qwen3_distill.replay.buffer import ASSUMED_TOKENS, ReplayBuffer
from qwen3_distill.replay.flat import FlatRollouts, flatten, spans
from qwen3_distill.types import ScoredRollout
from tests.unit.replay.model import ModelBuffer, num_tokens, scored_rollout

CPU = torch.device("cpu")
TESTS = Path(__file__).resolve().parents[2]


def buffer_of(
    tokens: int = 400, *, candidates: int = 0, seed: int = 3, **settings: Any
) -> ReplayBuffer:
    config = ReplayConfig.model_validate({"capacity_tokens": tokens, **settings})
    return ReplayBuffer(config, candidates=candidates, device=CPU, seed=seed)


def numbers(buffer: ReplayBuffer) -> list[int]:
    """Of the live rollouts, by drawing all of them."""
    return buffer.sample(len(buffer), step=0).numbers_S.tolist() if len(buffer) else []


def metric(buffer: ReplayBuffer, name: str, step: int = 0) -> float:
    (value,) = [m.value for m in buffer.metrics(step) if m.key == f"replay/{name}"]
    return value


def assert_holds(flat: FlatRollouts, expected: list[ScoredRollout]) -> None:
    """Bit for bit the rollouts given, in their order."""
    assert flat.num_rollouts == len(expected)
    for row, scored in enumerate(expected):
        rollout, score = scored.rollout, scored.score
        start, prompt = int(flat.starts_S[row]), rollout.prompt.token_ids.size
        assert (flat.prompt_tokens_S[row], flat.response_tokens_S[row]) == (
            prompt,
            rollout.num_tokens,
        )
        assert flat.oldest_step_S[row] == rollout.versions[0].version.step
        stop = start + prompt + rollout.num_tokens
        ids = np.concatenate([rollout.prompt.token_ids, rollout.response_ids])
        assert np.array_equal(flat.token_id_F[start:stop], ids)
        response = [start + prompt + t for s in rollout.sampled for t in range(s.start, s.stop)]
        assert flat.loss_tokens_S[row] == len(response)
        others = set(range(start + prompt, stop)) - set(response)
        if flat.is_unsampled_F is None:
            assert not others
        else:
            assert set(np.flatnonzero(flat.is_unsampled_F[start:stop]) + start) == others
        assert np.array_equal(flat.behavior_logprob_F[response], rollout.behavior_logprobs)
        assert np.array_equal(flat.teacher_logprob_F[response], score.logprobs)
        for name in ("candidate_id", "candidate_logprob"):
            values = getattr(flat, f"{name}_FK")
            if values is not None:
                assert np.array_equal(values[response], getattr(score, f"{name}s"))


def spread(flat: FlatRollouts) -> FlatRollouts:
    """The same rollouts with three slots of nonsense before each."""
    starts_S = flat.starts_S + 3 * np.arange(1, flat.num_rollouts + 1)
    target = torch.from_numpy(spans(starts_S, flat.tokens_S))
    moved: dict[str, Any] = {}
    for name, values in flat.tensors():
        size = len(values) + 3 * flat.num_rollouts
        moved[name] = values.new_full((size, *values.shape[1:]), 77)
        moved[name][target] = values
    if flat.is_unsampled_F is not None:
        moved["is_unsampled_F"] = np.ones(len(moved["token_id_F"]), dtype=np.bool_)
        moved["is_unsampled_F"][target] = flat.is_unsampled_F
    return replace(flat, starts_S=starts_S, **moved)


class BufferMachine(RuleBasedStateMachine):
    """Any order of additions, evictions, draws and restarts."""

    @initialize(
        tokens=st.integers(60, 500),
        rollouts=st.none() | st.integers(3, 9),
        candidates=st.sampled_from([0, 2]),
        reuse_cap=st.none() | st.integers(1, 3),
        coverage_first=st.booleans(),
        max_age_steps=st.integers(0, 3),
        law=st.sampled_from(
            [
                {"kind": "uniform"},
                {"kind": "proportional", "age_decay_steps": 2.0},
                {"kind": "rank", "uniform_fraction": 0.1},
            ]
        ),
    )
    def build(self, candidates: int, tokens: int, rollouts: int | None, **settings: Any) -> None:
        def fresh() -> ReplayBuffer:
            return buffer_of(tokens, candidates=candidates, capacity_rollouts=rollouts, **settings)

        self.fresh = fresh
        self.candidates, self.step = candidates, 0
        self.buffer = fresh()
        self.coverage_first = settings["coverage_first"]
        self.max_age = settings["max_age_steps"]
        self.model = ModelBuffer(
            tokens=tokens,
            rollouts=rollouts or -(-tokens // ASSUMED_TOKENS),
            reuse_cap=settings["reuse_cap"],
        )

    @rule(
        lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4),
        with_gaps=st.booleans(),
        staleness=st.integers(0, 2),
        unsampled_every=st.sampled_from([0, 0, 2, 7]),
    )
    def add(
        self,
        lengths: list[tuple[int, int]],
        with_gaps: bool,
        staleness: int,
        unsampled_every: int,
    ) -> None:
        scored = [
            scored_rollout(
                self.model.added + i,
                p,
                r,
                step=max(0, self.step - staleness),
                candidates=self.candidates,
                unsampled_every=unsampled_every,
            )
            for i, (p, r) in enumerate(lengths)
        ]
        if sum(map(sum, lengths)) > self.model.tokens or len(scored) > self.model.rollouts:
            before = self.buffer.digest()
            with pytest.raises(DataError, match="do not fit"):
                self.buffer.add(scored)
            assert self.buffer.digest() == before
            return
        if with_gaps:
            self.buffer.add_flat(spread(flatten(scored)), np.ones(len(scored)))
        else:
            self.buffer.add(scored)
        self.model.add(scored)

    @rule()
    def evict(self) -> None:
        self.buffer.evict_by_age(self.step)
        self.model.evict_older_than(self.max_age, self.step)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), forget=st.booleans())
    def train(self, data: st.DataObject, forget: bool) -> None:
        live = {held.number: held for held in self.model.live}
        count = data.draw(st.integers(1, len(live)))
        sample = self.buffer.sample(count, self.step)
        drawn = sample.numbers_S.tolist()
        assert len(set(drawn)) == count
        assert set(drawn) <= live.keys()
        if self.coverage_first:
            unused = {number for number, held in live.items() if held.uses == 0}
            assert len(unused & set(drawn)) == min(count, len(unused))
        assert_holds(self.buffer.gather(sample), [live[number].scored for number in drawn])
        assert sample.weights_S.max() == 1
        assert sample.weights_S.min() > 0
        if not forget:
            self.buffer.mark_used(sample, torch.rand(count))
            self.model.mark_used(drawn)
        self.step += 1

    @rule()
    def restart(self) -> None:
        state = {name: tensor.clone() for name, tensor in self.buffer.state_dict().items()}
        restored = self.fresh()
        restored.load_state_dict(state)
        assert restored.digest() == self.buffer.digest()
        self.buffer = restored

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        live = self.model.live
        assert len(self.buffer) == len(live)
        if live:
            everything = self.buffer.sample(len(live), self.step)
            assert sorted(everything.numbers_S.tolist()) == [held.number for held in live]
        values = {m.key.removeprefix("replay/"): m.value for m in self.buffer.metrics(self.step)}
        assert values["rollouts"] == len(live)
        assert values["added"] == self.model.added
        for reason, count in self.model.evicted.items():
            assert values[f"evicted_by_{reason}"] == count
        gone = sum(self.model.evicted.values())
        assert values["added"] == values["rollouts"] + gone
        tokens = [num_tokens(held.scored) for held in live]
        assert values["tokens"] == sum(tokens) <= self.model.tokens
        if live:
            ages = [self.step - held.oldest_step for held in live]
            assert values["age_max_steps"] == max(ages)
            assert values["age_mean_steps"] == pytest.approx(np.mean(ages))
            assert values["uses_mean"] == pytest.approx(np.mean([held.uses for held in live]))


TestAgainstTheModel = BufferMachine.TestCase
TestAgainstTheModel.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


# --- What is known in advance -------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [0, 5])
@pytest.mark.parametrize("rollouts", [None, 7])
def test_the_memory_is_known_before_it_is_taken(candidates: int, rollouts: int | None) -> None:
    config = ReplayConfig(capacity_tokens=1000, capacity_rollouts=rollouts)
    buffer = ReplayBuffer(config, candidates=candidates, device=CPU, seed=0)
    held = list(buffer._arenas.values())
    expected = ReplayBuffer.memory_bytes(config, candidates=candidates)
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == expected
    storages = {tensor.untyped_storage().data_ptr() for tensor in held}
    for first in range(0, 400, 4):
        buffer.add([scored_rollout(first, 20, 30, candidates=candidates) for _ in range(3)])
        buffer.mark_used(buffer.sample(2, first), torch.rand(2))
    held = list(buffer._arenas.values())
    assert {tensor.untyped_storage().data_ptr() for tensor in held} == storages


def test_a_rollout_that_would_pass_the_end_begins_at_the_start() -> None:
    buffer = buffer_of(tokens=100)
    rollouts = [scored_rollout(i, 10, 20) for i in range(5)]
    buffer.add(rollouts[:3])
    assert numbers(buffer) == [0, 1, 2]
    buffer.add([rollouts[3]])  # ten slots are left at the end
    assert sorted(numbers(buffer)) == [1, 2, 3]
    sample = buffer.sample(3, 0)
    flat = buffer.gather(sample)
    assert sorted(flat.starts_S.tolist()) == [0, 30, 60]
    assert_holds(flat, [rollouts[number] for number in sample.numbers_S])


def test_a_batch_that_would_meet_its_own_beginning_starts_over() -> None:
    buffer = buffer_of(tokens=100)
    buffer.add([scored_rollout(0, 10, 50)])
    batch = [scored_rollout(i, 10, 15) for i in (1, 2, 3, 4)]  # one of them fits behind it
    buffer.add(batch)
    assert sorted(numbers(buffer)) == [1, 2, 3, 4]
    sample = buffer.sample(4, 0)
    assert_holds(buffer.gather(sample), [batch[number - 1] for number in sample.numbers_S])


def test_a_batch_is_added_whole_or_not_at_all() -> None:
    buffer = buffer_of(tokens=100)
    buffer.add([scored_rollout(0, 10, 10)])
    with pytest.raises(DataError, match="4 rollouts of 120 tokens"):
        buffer.add([scored_rollout(i, 20, 10) for i in range(4)])
    assert (numbers(buffer), metric(buffer, "evicted_by_capacity")) == ([0], 0)
    buffer.add([])
    assert metric(buffer, "added") == 1


def test_what_is_drawn_is_read_where_it_lies() -> None:
    buffer = buffer_of()
    buffer.add([scored_rollout(i, 10, 20) for i in range(3)])
    flat = buffer.gather(buffer.sample(2, 0))
    arenas = {values.data_ptr() for values in buffer._arenas.values()}
    assert {values.data_ptr() for _, values in flat.tensors()} == arenas
    dense = flat.dense()
    assert len(dense.token_id_F) == 60
    assert dense.dense() is dense


def test_scores_of_another_kind_are_refused() -> None:
    with pytest.raises(AlignmentError, match="2 candidates a token"):
        buffer_of(candidates=2).add([scored_rollout(0, 3, 4)])
    with pytest.raises(AlignmentError, match="0 candidates a token"):
        buffer_of().add([scored_rollout(0, 3, 4, candidates=2)])
    with pytest.raises(AlignmentError, match="2 candidates a token"):
        buffer_of(candidates=2).add([scored_rollout(0, 3, 4, candidates=3)])
    mixed = [scored_rollout(0, 3, 4, candidates=2), scored_rollout(1, 3, 4, candidates=3)]
    with pytest.raises(AlignmentError, match="candidates a token"):
        buffer_of(candidates=2).add(mixed)


@pytest.mark.parametrize("count", [0, 3])
def test_no_more_can_be_drawn_than_is_there(count: int) -> None:
    buffer = buffer_of()
    buffer.add([scored_rollout(i, 2, 3) for i in range(2)])
    with pytest.raises(DataError, match=f"{count} rollouts asked of a replay buffer with 2"):
        buffer.sample(count, 0)


def test_a_sample_that_was_overwritten_is_refused() -> None:
    buffer = buffer_of(tokens=15, capacity_rollouts=3)
    buffer.add([scored_rollout(i, 2, 3) for i in range(3)])
    sample = buffer.sample(3, 0)
    buffer.add([scored_rollout(3, 2, 3)])
    with pytest.raises(DataError, match="took the place"):
        buffer.gather(sample)
    with pytest.raises(DataError, match="took the place"):
        buffer.mark_used(sample, torch.ones(3))


def test_a_place_that_is_taken_again_was_never_used() -> None:
    buffer = buffer_of(capacity_rollouts=2)
    buffer.add([scored_rollout(i, 2, 3) for i in range(2)])
    buffer.mark_used(buffer.sample(2, 0), torch.ones(2))
    buffer.add([scored_rollout(2, 2, 3)])
    assert metric(buffer, "uses_mean") == 0.5


def test_marking_brings_nothing_back() -> None:
    buffer = buffer_of()
    buffer.add([scored_rollout(i, 2, 3) for i in range(3)])
    sample = buffer.sample(3, 0)
    buffer.evict_by_age(9)
    buffer.mark_used(sample, torch.ones(3))
    assert len(buffer) == 0


# --- Priorities ---------------------------------------------------------------------------------


def test_the_first_priority_is_the_mean_gap_of_the_stored_logprobs() -> None:
    buffer = buffer_of(law={"kind": "proportional", "alpha": 1.0})
    buffer.add([scored_rollout(7, 20, 40), scored_rollout(3, 1, 1)])
    # The teacher's logprob is twice the student's: the gap is (address + 1) / 1e5.
    expected = [(7000 + np.arange(20, 60) + 1).mean() / 1e5, 3002 / 1e5]
    assert buffer._mass[:2].tolist() == pytest.approx(expected, rel=1e-5)


def test_tokens_that_were_not_sampled_do_not_count_in_the_first_priority() -> None:
    buffer = buffer_of(law={"kind": "proportional", "alpha": 1.0})
    buffer.add([scored_rollout(7, 20, 40, unsampled_every=4)])
    sampled = [t for t in range(40) if t % 4 != 3]
    expected = (7000 + 20 + np.array(sampled) + 1).mean() / 1e5
    assert buffer._mass[0] == pytest.approx(expected, rel=1e-5)


def test_priorities_are_clipped_and_refreshed_where_they_belong() -> None:
    buffer = buffer_of(law={"kind": "proportional", "alpha": 2.0}, priority_clip_nats=1.5)
    buffer.add([scored_rollout(i, 2, 3) for i in range(4)])
    sample = buffer.sample(4, 0)
    buffer.mark_used(sample, torch.tensor([0.5, 9.0, 0.0, 1.0]))
    assert buffer._mass[:4].tolist() == pytest.approx([0.25, 2.25, 1e-6, 1.0])


# --- Going on after a restart -------------------------------------------------------------------


def test_what_is_drawn_depends_on_state_seed_and_step_alone() -> None:
    def filled(seed: int = 3) -> ReplayBuffer:
        buffer = buffer_of(seed=seed, law={"kind": "proportional"})
        buffer.add([scored_rollout(i, 2, 3) for i in range(12)])
        return buffer

    one, other, elsewhere = filled(), filled(), filled(seed=4)
    torch.manual_seed(0)
    drawn = [one.sample(3, step).places_S.tolist() for step in range(20)]
    torch.manual_seed(1)
    again = [other.sample(3, step).places_S.tolist() for step in reversed(range(20))]
    assert drawn == again[::-1]
    assert len({tuple(slots) for slots in drawn}) > 1
    assert drawn != [elsewhere.sample(3, step).places_S.tolist() for step in range(20)]


def test_a_restored_buffer_draws_as_the_one_that_was_saved() -> None:
    """More rollouts than the places that a draw sums up as one."""

    def filled() -> ReplayBuffer:
        return buffer_of(tokens=2000, law={"kind": "proportional"}, capacity_rollouts=150)

    rng = np.random.default_rng(0)
    buffer, restored = filled(), filled()
    for first in (0, 85):
        buffer.add([scored_rollout(i, 2, 3) for i in range(first, first + 85)])
    restored.load_state_dict(buffer.state_dict())
    for step in range(20):
        sample, again = buffer.sample(6, step), restored.sample(6, step)
        assert sample.places_S.tolist() == again.places_S.tolist()
        assert sample.weights_S.tolist() == again.weights_S.tolist()
        priority_S = torch.from_numpy(rng.random(6).astype(np.float32))
        buffer.mark_used(sample, priority_S)
        restored.mark_used(again, priority_S)


def test_a_state_of_another_buffer_is_refused() -> None:
    state = buffer_of().state_dict()
    for other in (buffer_of(tokens=399), buffer_of(candidates=2), buffer_of(capacity_rollouts=3)):
        with pytest.raises(CheckpointError, match="was saved, the config asks for"):
            other.load_state_dict(state)
    del state["uses"]
    with pytest.raises(CheckpointError, match="uses"):
        buffer_of().load_state_dict(state)


def test_a_state_from_before_sampled_spans_continues_bit_for_bit() -> None:
    """The file was saved by the code of schema 2 after 4 additions and an update of 2 rollouts."""

    def fresh() -> ReplayBuffer:
        law = {"kind": "proportional"}
        return buffer_of(tokens=60, candidates=2, capacity_rollouts=4, law=law)

    saved = load_file(TESTS / "data" / "replay_one_span.safetensors")
    buffer = fresh()
    with_spans = [scored_rollout(9, 5, 6, candidates=2, unsampled_every=2)]
    buffer.add(with_spans)  # of which nothing may stay
    buffer.load_state_dict(saved)
    assert buffer.digest() == "b485ad0c56365789"
    assert buffer.sample(2, 6).numbers_S.tolist() == [1, 3]
    rollouts = [scored_rollout(i, 5, 6 + i, step=i, candidates=2) for i in range(4)]
    sample = buffer.sample(4, 6)
    assert_holds(buffer.gather(sample), [rollouts[number] for number in sample.numbers_S])
    again = buffer.state_dict()
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    # The same additions give the same state today.
    repeated = fresh()
    for rollout in rollouts:
        repeated.add([rollout])
    repeated.mark_used(repeated.sample(2, 5), torch.tensor([0.5, 0.25]))
    assert repeated.digest() == "b485ad0c56365789"


def test_only_tokens_that_were_not_sampled_take_memory_on_the_host() -> None:
    buffer = buffer_of()
    buffer.add([scored_rollout(0, 2, 7)])
    assert buffer._is_unsampled is None
    assert flatten([scored_rollout(0, 2, 7)]).is_unsampled_F is None
    buffer.add([scored_rollout(1, 2, 7, unsampled_every=3)])
    assert buffer._is_unsampled is not None
    assert np.flatnonzero(buffer._is_unsampled).tolist() == [9 + 2 + 2, 9 + 2 + 5]


def test_the_digest_tells_states_apart() -> None:
    buffer = buffer_of()
    seen = {buffer.digest()}
    buffer.add([scored_rollout(i, 2, 3) for i in range(3)])
    seen.add(buffer.digest())
    buffer.mark_used(buffer.sample(1, 0), torch.ones(1))
    seen.add(buffer.digest())
    buffer.evict_by_age(9)
    assert len(seen | {buffer.digest()}) == 4
