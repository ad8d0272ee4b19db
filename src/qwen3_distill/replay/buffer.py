"""The replay buffer: rings of tokens on the learner's device, without Python loops over what it
keeps.

Per-token values lie in arenas. A rollout stands in consecutive slots: where it would not fit before
the arena's end, it begins at the start again, and less than a rollout's length stays empty. A
sample is therefore read in place, and the layout of micro-batches is the only copy that is made of
it. Rollouts are numbered in the order in which they were added; rollout number i is at ``i % M`` in
every per-rollout array.

Tokens are on the device. A rollout's place, lengths, age, uses and priority are in arrays on the
host, and so are the slots of tokens that were not sampled. Making room, drawing and finding
rollouts therefore launch no kernels and wait for nothing. Only a sample's new priorities come from
the device. ``mass`` is a rollout's unnormalised share of the draws; it is 0 at places without a
rollout and for a dropped one, whose tokens are freed when the ring's oldest end reaches them.

Shape letters: C token slots, M rollouts kept, S rollouts given or drawn, K teacher candidates.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_distill.config import (
    MIN_PRIORITY_NATS,
    ObjectiveSchema,
    ReplayConfig,
    candidates_per_token,
)
from qwen3_distill.errors import AlignmentError, CheckpointError, ConfigError, DataError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.replay.flat import Counts, Flags, FlatRollouts, flatten
from qwen3_distill.replay.priority import (
    Draw,
    Floats,
    Integers,
    Masses,
    annealed,
    draw_mass,
    importance_weights,
    priority_mass,
    systematic_draw,
)
from qwen3_distill.types import Metric, ScoredRollout
from qwen3_distill.utils.seeds import derive_seed

ASSUMED_TOKENS = 32
"""Mean tokens of a rollout, which sets M where the config does not. Shorter rollouts run out of
places before they run out of slots."""

_CAPACITY, _AGE, _REUSE = range(3)
_UNSAMPLED = "is_unsampled_F"


@dataclass(frozen=True, kw_only=True)
class ReplaySample:
    """Rollouts that were drawn, in the order of their places. Valid until rollouts are added."""

    places_S: Counts
    """Indices into the buffer's per-rollout arrays."""
    weights_S: NDArray[np.float32]
    """Importance weights, divided by the largest of them."""
    numbers_S: Counts
    """Each rollout's number: 0 for the first that was ever added."""

    @property
    def num_rollouts(self) -> int:
        return len(self.places_S)


class _Shape(NamedTuple):
    tokens: int
    rollouts: int
    candidates: int


class ReplayBuffer:
    """Scored rollouts, kept to be trained on again.

    Args:
        candidates: K of the teacher's scores; 0: sampled tokens' logprobs only.
        seed: with the step it determines what is drawn.
    """

    def __init__(
        self, config: ReplayConfig, *, candidates: int, device: torch.device, seed: int
    ) -> None:
        self._config = config
        self._device = device
        self._seed = seed
        self._shape = _shape(config, candidates)
        self._arenas = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in _arena_layout(self._shape).items()
        }
        self._is_unsampled: Flags | None = None
        """[C] on the host, see `FlatRollouts`; made when the first such token is added."""
        rollouts = self._shape.rollouts
        self._first = np.zeros(rollouts, dtype=np.int64)
        """Index of a rollout's first token, counted over all laps; modulo C it is the slot."""
        self._prompt_tokens = np.zeros(rollouts, dtype=np.int64)
        self._response_tokens = np.zeros(rollouts, dtype=np.int64)
        self._oldest_step = np.zeros(rollouts, dtype=np.int64)
        self._uses = np.zeros(rollouts, dtype=np.int32)
        self._masses = Masses(np.zeros(rollouts))
        self._evicted = np.zeros(3, dtype=np.int64)
        self._oldest = 0
        """Number of the oldest rollout whose tokens still take slots."""
        self._next = 0
        """Number of the next rollout."""
        self._end = 0
        """Index of its first token, counted like `_first`."""

    @classmethod
    def memory_bytes(cls, config: ReplayConfig, *, candidates: int) -> int:
        """Bytes that a buffer takes on its device, all of them when it is made."""
        layout = _arena_layout(_shape(config, candidates)).values()
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout)

    @property
    def _mass(self) -> Floats:
        """[M] each rollout's unnormalised share of the draws; changed through `_masses` only."""
        return self._masses.mass_M

    @property
    def num_bytes(self) -> int:
        """Bytes that this buffer takes on its device."""
        return self.memory_bytes(self._config, candidates=self._shape.candidates)

    # --- Adding and dropping ----------------------------------------------------------------------

    def add(self, scored: Sequence[ScoredRollout]) -> None:
        """Add rollouts, and drop the oldest to make room.

        A rollout's first priority is the mean |log q - log mu| of its sampled tokens. It equals
        the mean |A| as long as the student's weights are those that sampled them.

        Raises:
            AlignmentError: their scores do not have the K candidates that the buffer was made for.
            DataError: they do not fit, even into an empty buffer, have no score, or a teacher
                sampled some of them: they have no age and no first priority.
        """
        if not scored:
            return
        flat = flatten(scored)
        gaps_F = (flat.teacher_logprob_F - flat.behavior_logprob_F).abs()  # 0 where not sampled
        sums_S = np.add.reduceat(gaps_F.numpy(), flat.starts_S, dtype=np.float64)
        self.add_flat(flat, sums_S / flat.loss_tokens_S)

    def add_flat(self, flat: FlatRollouts, priority_S: Floats) -> None:
        """Add rollouts that are flat already, on any device. See `add`.

        Args:
            priority_S: each rollout's first priority in nats.
        """
        flat = flat.dense()
        self._check(flat, priority_S)
        first_S = self._placed(flat.tokens_S)
        end = int(first_S[-1] + flat.tokens_S[-1])
        self._make_room(flat.num_rollouts, end)
        self._write(flat, first_S)
        self._describe(flat, first_S, priority_S)
        self._next += flat.num_rollouts
        self._end = end

    def _placed(self, tokens_S: Counts) -> Counts:
        """[S] first tokens of new rollouts, counted like `_first`: none passes the arena's end."""
        capacity = self._shape.tokens
        ends_S = np.cumsum(tokens_S)
        left = -self._end % capacity
        before_end = int(np.searchsorted(ends_S, left, side="right"))
        starts_S = self._end + ends_S - tokens_S
        if before_end < len(tokens_S):
            if left + ends_S[-1] - ends_S[before_end] + tokens_S[before_end] > capacity:
                before_end = 0  # the batch would meet its own beginning
            starts_S[before_end:] += self._end + left - starts_S[before_end]
        return starts_S

    def _write(self, flat: FlatRollouts, first_S: Counts) -> None:
        """Copy the tokens into the arenas, in one piece or two."""
        capacity, lap_S = self._shape.tokens, first_S // self._shape.tokens
        split = int(np.searchsorted(lap_S, lap_S[-1]))
        for rows in (slice(0, split), slice(split, None)):
            starts_S = flat.starts_S[rows]
            if not len(starts_S):
                continue
            count = int(flat.tokens_S[rows].sum())
            here, there = int(first_S[rows][0]) % capacity, int(starts_S[0])
            for name, values in flat.tensors():
                self._arenas[name].narrow(0, here, count).copy_(values.narrow(0, there, count))
            self._write_unsampled(
                slice(here, here + count), flat.is_unsampled_F, slice(there, there + count)
            )

    def _write_unsampled(self, here: slice, given: Flags | None, there: slice) -> None:
        if self._is_unsampled is None and given is not None:
            self._is_unsampled = np.zeros(self._shape.tokens, dtype=np.bool_)
        if self._is_unsampled is not None:
            self._is_unsampled[here] = False if given is None else given[there]

    def _check(self, flat: FlatRollouts, priority_S: Floats) -> None:
        if flat.by_teacher_S is not None or not flat.is_scored:
            raise DataError(
                "a replay buffer keeps scored rollouts of the student only: a teacher's answer has "
                "no age, and without a score a rollout has no priority; set replay=null"
            )
        given = {name: tensor.shape[1:] for name, tensor in flat.tensors()}
        if given != {name: arena.shape[1:] for name, arena in self._arenas.items()}:
            raise AlignmentError(
                f"rollouts with {', '.join(given)} for a replay buffer with "
                f"{self._shape.candidates} candidates a token"
            )
        if priority_S.shape != (flat.num_rollouts,):
            raise AlignmentError(f"{priority_S.shape} priorities for {flat.num_rollouts} rollouts")
        tokens, rollouts, _ = self._shape
        if flat.num_rollouts > rollouts or len(flat.token_id_F) > tokens:
            raise DataError(
                f"{flat.num_rollouts} rollouts of {len(flat.token_id_F)} tokens do not fit a "
                f"replay buffer of {rollouts} rollouts and {tokens} tokens; raise "
                "replay.capacity_tokens or replay.capacity_rollouts"
            )

    def _describe(self, flat: FlatRollouts, first_S: Counts, priority_S: Floats) -> None:
        mass_S = self._mass_of(priority_S)
        for here, there in _ring_pieces(self._next, flat.num_rollouts, self._shape.rollouts):
            self._first[here] = first_S[there]
            self._prompt_tokens[here] = flat.prompt_tokens_S[there]
            self._response_tokens[here] = flat.response_tokens_S[there]
            self._oldest_step[here] = flat.oldest_step_S[there]
            self._uses[here] = 0
            self._masses.set(here, mass_S[there])

    def _mass_of(self, priority_S: Floats) -> Floats:
        clipped_S = priority_S.clip(MIN_PRIORITY_NATS, self._config.priority_clip_nats)
        return priority_mass(self._config.law, clipped_S)

    def _make_room(self, num_rollouts: int, end: int) -> None:
        """Drop the oldest rollouts until ``num_rollouts``, with tokens up to ``end``, fit."""
        tokens, rollouts, _ = self._shape
        in_the_way = bisect.bisect_left(
            range(self._oldest, self._next),
            end - tokens,
            key=lambda number: self._first[number % rollouts],
        )
        oldest = max(self._oldest + in_the_way, self._next + num_rollouts - rollouts)
        for here, _ in _ring_pieces(self._oldest, oldest - self._oldest, rollouts):
            self._evicted[_CAPACITY] += np.count_nonzero(self._mass[here])
            self._masses.set(here, 0.0)
        self._oldest = oldest

    def evict_by_age(self, step: int) -> None:
        """Drop the rollouts whose oldest token is older than ``max_age_steps`` at ``step``."""
        old_M = (self._oldest_step < step - self._config.max_age_steps) & (self._mass > 0)
        old = np.flatnonzero(old_M)
        self._evicted[_AGE] += len(old)
        self._masses.set(old, 0.0)

    # --- Drawing ----------------------------------------------------------------------------------

    def sample(self, num_rollouts: int, step: int) -> ReplaySample:
        """Draw distinct rollouts by the config's law; only the buffer's state and ``step`` matter.

        The weights are (1 / (N P))^beta with the probabilities P of this draw, divided by the
        largest of the sample. The loss divides by their sum, so that this division keeps them at
        most 1 and changes no gradient.

        Raises:
            DataError: fewer rollouts may be drawn.
        """
        config = self._config
        mass_M = draw_mass(config.law, self._mass, self._oldest_step, step)
        if config.coverage_first:
            drawn = self._unused_first(mass_M, num_rollouts, step)
        else:
            masses = self._masses if mass_M is self._mass else Masses(mass_M)
            drawn = systematic_draw(masses, num_rollouts, self._offset(step))
        beta = annealed(config.beta_start, config.beta_end, config.beta_steps, step)
        return ReplaySample(
            places_S=drawn.places_n,
            weights_S=importance_weights(drawn.inclusion_n, beta),
            numbers_S=self._oldest + (drawn.places_n - self._oldest) % self._shape.rollouts,
        )

    def _unused_first(self, mass_M: Floats, count: int, step: int) -> Draw:
        """Draw rollouts that were never used; used ones only if there are too few."""
        unused_M = np.where(self._uses == 0, mass_M, 0.0)
        unused = int(np.count_nonzero(unused_M))
        if unused == 0:
            return systematic_draw(Masses(mass_M), count, self._offset(step))
        first = systematic_draw(Masses(unused_M), min(count, unused), self._offset(step))
        if count <= unused:
            return first
        used = Masses(mass_M - unused_M)
        second = systematic_draw(used, count - unused, self._offset(step, "used"))
        places_n: Integers = np.concatenate([first.places_n, second.places_n])
        inclusion_n: Floats = np.concatenate([first.inclusion_n, second.inclusion_n])
        order = places_n.argsort()
        return Draw(places_n[order], inclusion_n[order])

    def _offset(self, step: int, *of: str) -> float:
        """The one random number of a draw, uniform in [0, 1)."""
        return (derive_seed(self._seed, "replay", step, *of) >> 10) * 2.0**-53

    def gather(self, sample: ReplaySample) -> FlatRollouts:
        """The sample's rollouts without a copy: the tensors are the whole arenas.

        Raises:
            DataError: rollouts that were added since took the place of some of the sample's.
        """
        self._check_current(sample)
        places_S = sample.places_S
        arenas: dict[str, Any] = self._arenas
        return FlatRollouts(
            **arenas,
            starts_S=self._first[places_S] % self._shape.tokens,
            prompt_tokens_S=self._prompt_tokens[places_S],
            response_tokens_S=self._response_tokens[places_S],
            oldest_step_S=self._oldest_step[places_S],
            is_unsampled_F=self._is_unsampled,
        )

    def mark_used(self, sample: ReplaySample, priority_S: Tensor) -> None:
        """Note that the sample was trained on: set its priorities, drop rollouts used up.

        Args:
            priority_S: float32 on the device, each rollout's new priority in nats.
        """
        self._check_current(sample)
        places_S = sample.places_S
        mass_S = self._mass_of(priority_S.cpu().numpy().astype(np.float64))
        mass_S[self._mass[places_S] == 0] = 0.0  # dropped meanwhile
        uses_S = self._uses[places_S] + 1
        if self._config.reuse_cap is not None:
            used_up_S = (uses_S >= self._config.reuse_cap) & (mass_S > 0)
            mass_S[used_up_S] = 0.0
            self._evicted[_REUSE] += np.count_nonzero(used_up_S)
        self._uses[places_S] = uses_S
        self._masses.set(places_S, mass_S)

    def _check_current(self, sample: ReplaySample) -> None:
        if sample.numbers_S.min() < self._oldest:
            raise DataError(
                "rollouts were added since the sample was drawn, and took the place of some of it"
            )

    # --- Size and metrics -------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rollouts that may be drawn."""
        return int(np.count_nonzero(self._mass))

    def metrics(self, step: int) -> tuple[Metric, ...]:
        """Rollouts and tokens held at ``step``, their age and use, and counts of those dropped."""
        live_M = self._mass > 0
        live = int(live_M.sum())
        tokens = int((self._prompt_tokens + self._response_tokens)[live_M].sum())
        ages = step - self._oldest_step[live_M]
        uses = int(self._uses[live_M].sum())
        by_capacity, by_age, by_reuse = self._evicted.tolist()
        return (
            Metric.last("replay/rollouts", live),
            Metric.last("replay/tokens", tokens),
            Metric.mean("replay/age_mean_steps", int(ages.sum()), live),
            Metric.max("replay/age_max_steps", int(ages.max(initial=0))),
            Metric.mean("replay/uses_mean", uses, live),
            Metric.last("replay/added", self._next),
            Metric.last("replay/evicted_by_capacity", by_capacity),
            Metric.last("replay/evicted_by_age", by_age),
            Metric.last("replay/evicted_by_reuse", by_reuse),
        )

    # --- Saving -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that `load_state_dict` needs to continue bit for bit; free slots left out."""
        pieces = list(self._pieces_in_use())
        state = {
            name: torch.cat([arena[here] for here, _ in pieces]) if pieces else arena[:0].clone()
            for name, arena in self._arenas.items()
        }
        for name, values in self._host_arrays():
            state[name] = torch.from_numpy(values.copy())
        if self._is_unsampled is not None:
            flags = np.concatenate([self._is_unsampled[here] for here, _ in pieces])
            state[_UNSAMPLED] = torch.from_numpy(flags)
        state["ring"] = torch.tensor([*self._shape, self._oldest, self._next, self._end])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it comes from a buffer of another size or kind.
        """
        try:
            *shape, self._oldest, self._next, self._end = state["ring"].tolist()
            if tuple(shape) != self._shape:
                raise CheckpointError(
                    f"a replay buffer with (tokens, rollouts, candidates) = {tuple(shape)} was "
                    f"saved, the config asks for {tuple(self._shape)}"
                )
            for name, values in self._host_arrays():
                values[:] = state[name].cpu().numpy()
            self._masses = Masses(self._mass)
            for name, arena in self._arenas.items():
                for here, there in self._pieces_in_use():
                    arena[here].copy_(state[name][there])
            # States without this entry, among them all that were saved before it existed, hold
            # rollouts whose responses were sampled as a whole.
            flags = state[_UNSAMPLED].cpu().numpy() if _UNSAMPLED in state else None
            self._is_unsampled = None
            for here, there in self._pieces_in_use():
                self._write_unsampled(here, flags, there)
        except (KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"not a replay buffer's state: {error}") from error

    def digest(self) -> str:
        """Digest of the whole state: buffers with equal digests continue identically."""
        return weights_digest(
            {name: tensor.to(self._device) for name, tensor in self.state_dict().items()}
        )

    def _host_arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        yield "first", self._first
        yield "prompt_tokens", self._prompt_tokens
        yield "response_tokens", self._response_tokens
        yield "oldest_step", self._oldest_step
        yield "uses", self._uses
        yield "mass", self._mass
        yield "evicted", self._evicted

    def _pieces_in_use(self) -> Iterator[tuple[slice, slice]]:
        if self._oldest < self._next:
            first = int(self._first[self._oldest % self._shape.rollouts])
            yield from _ring_pieces(first, self._end - first, self._shape.tokens)


def build_replay(
    config: ReplayConfig, objective: ObjectiveSchema, *, device: torch.device, seed: int
) -> ReplayBuffer:
    """Make the buffer for an objective's scores.

    Raises:
        ConfigError: the device does not have the memory.
    """
    candidates = candidates_per_token(objective)
    try:
        return ReplayBuffer(config, candidates=candidates, device=device, seed=seed)
    except (RuntimeError, MemoryError) as error:  # torch's for want of memory
        size = ReplayBuffer.memory_bytes(config, candidates=candidates) / 2**30
        raise ConfigError(
            f"replay.capacity_tokens={config.capacity_tokens} takes {size:.1f} GiB on {device}, "
            f"which is not available ({str(error).splitlines()[0]}); lower it"
        ) from error


def _shape(config: ReplayConfig, candidates: int) -> _Shape:
    rollouts = config.capacity_rollouts or -(-config.capacity_tokens // ASSUMED_TOKENS)
    return _Shape(config.capacity_tokens, rollouts, candidates)


def _arena_layout(shape: _Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the per-token arenas, by the names of `FlatRollouts`."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "token_id_F": ((shape.tokens,), torch.int32),
        "behavior_logprob_F": ((shape.tokens,), torch.float32),
        "teacher_logprob_F": ((shape.tokens,), torch.float32),
    }
    if shape.candidates:
        each = (shape.tokens, shape.candidates)
        layout["candidate_id_FK"] = (each, torch.int32)
        layout["candidate_logprob_FK"] = (each, torch.float32)
    return layout


def _ring_pieces(start: int, count: int, size: int) -> Iterator[tuple[slice, slice]]:
    """``count`` places of a ring from ``start`` on, as one slice or two, each with the part of
    ``range(count)`` that falls there."""
    first = start % size
    before_end = min(count, size - first)
    if before_end:
        yield slice(first, first + before_end), slice(0, before_end)
    if count > before_end:
        yield slice(0, count - before_end), slice(before_end, count)
