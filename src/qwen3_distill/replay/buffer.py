"""The replay buffer: rings of pages on the learner's device; no Python per token or rollout.

Per-token values lie in arenas of pages. A rollout takes whole pages, one behind another, and may
wrap from the last page to the first: gathering is then an index over pages, each copied whole,
instead of one over tokens, and no room is lost at the ring's end. Rollouts are numbered as they
come; rollout number i has slot ``i % M`` in every per-rollout array.

What the layout needs (pages, lengths) is known when a rollout comes and never changes: it is kept
on the host, so that making room and finding pages never waits for the device. What the drawing
needs (priority, age, uses) is kept on the device. ``mass`` is both share and sign of life: it is
0 in a slot that is empty or whose rollout was dropped. A dropped rollout's pages are free when the
oldest end of the ring reaches them.

Shape letters: P pages, M slots, S rollouts given or drawn, F token slots, K teacher candidates.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen3_distill.config import (
    MIN_PRIORITY_NATS,
    ObjectiveConfig,
    ReplayConfig,
    candidates_per_token,
)
from qwen3_distill.errors import AlignmentError, CheckpointError, DataError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.replay.flat import Counts, FlatRollouts, flatten, spans
from qwen3_distill.replay.priority import (
    Draw,
    annealed,
    draw_mass,
    importance_weights,
    priority_mass,
    systematic_draw,
)
from qwen3_distill.types import Metric, ScoredRollout
from qwen3_distill.utils.seeds import derive_seed

PAGE_TOKENS = 32
"""A page of ids is two cache lines; on average half a page per rollout stays empty."""

_CAPACITY, _AGE, _REUSE = range(3)


@dataclass(frozen=True, kw_only=True)
class ReplaySample:
    """Rollouts that were drawn, in the order of their slots. Good until rollouts are added."""

    slots_S: Counts
    """On the host."""
    weights_S: Tensor
    """float32 on the device: importance weights, divided by the largest of them."""
    numbers_S: Counts
    """When each came: 0 for the first rollout that was ever added."""

    @property
    def num_rollouts(self) -> int:
        return len(self.slots_S)


class _Shape(NamedTuple):
    pages: int
    slots: int
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
        tensors = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in _layout(self._shape).items()
        }
        self._arenas = {name: tensors.pop(name) for name in _arena_layout(self._shape)}
        self._slots = tensors
        slots = self._shape.slots
        self._first_page = np.zeros(slots, dtype=np.int64)
        """Counted on without end; modulo P it is the place."""
        self._prompt_tokens = np.zeros(slots, dtype=np.int64)
        self._response_tokens = np.zeros(slots, dtype=np.int64)
        self._oldest_step = np.zeros(slots, dtype=np.int64)
        self._oldest = 0
        """Number of the oldest rollout whose pages are not free again."""
        self._next = 0
        """Number of the next rollout."""
        self._next_page = 0

    @classmethod
    def memory_bytes(cls, config: ReplayConfig, *, candidates: int) -> int:
        """What a buffer takes on its device, all of it when it is made."""
        layout = _layout(_shape(config, candidates)).values()
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout)

    @property
    def num_bytes(self) -> int:
        """What this one takes: `memory_bytes`."""
        return self.memory_bytes(self._config, candidates=self._shape.candidates)

    # --- Adding and dropping ----------------------------------------------------------------------

    def add(self, scored: Sequence[ScoredRollout]) -> None:
        """Keep rollouts; the oldest make room. Their first priority is that of the stored logprobs:
        the mean |log q - log mu|, which is that of |A| as long as the student is still mu.

        Raises:
            AlignmentError: their scores have not the K candidates that the buffer was made for.
            DataError: they do not fit, even into an empty buffer.
        """
        if not scored:
            return
        flat = flatten(scored, page_tokens=PAGE_TOKENS)
        gaps_F = (flat.teacher_logprob_F - flat.behavior_logprob_F).abs()  # 0 outside responses
        sums_S = np.add.reduceat(gaps_F.numpy(), flat.starts_S, dtype=np.float64)
        self.add_flat(flat, torch.from_numpy(sums_S / flat.response_tokens_S).float())

    def add_flat(self, flat: FlatRollouts, priority_S: Tensor) -> None:
        """Keep rollouts that are flat already, on any device. See `add`.

        Args:
            priority_S: float32, in nats.
        """
        flat = flat.aligned(PAGE_TOKENS)
        self._check(flat, priority_S)
        num_pages = len(flat.token_id_F) // PAGE_TOKENS
        self._make_room(flat.num_rollouts, num_pages)
        for here, there in _ring_pieces(self._next_page, num_pages, self._shape.pages):
            for name, tensor in flat.tensors():
                pages = tensor.view(num_pages, PAGE_TOKENS, *tensor.shape[1:])
                self._arenas[name][here].copy_(pages[there])
        self._describe(flat, priority_S.to(self._device))
        self._next += flat.num_rollouts
        self._next_page += num_pages

    def _check(self, flat: FlatRollouts, priority_S: Tensor) -> None:
        given = dict(flat.tensors())
        expected = {name: shape[2:] for name, (shape, _) in _arena_layout(self._shape).items()}
        if {name: tensor.shape[1:] for name, tensor in given.items()} != expected:
            raise AlignmentError(
                f"rollouts with {', '.join(given)} for a replay buffer with "
                f"{self._shape.candidates} candidates a token"
            )
        if priority_S.shape != (flat.num_rollouts,):
            raise AlignmentError(
                f"{tuple(priority_S.shape)} priorities for {flat.num_rollouts} rollouts"
            )
        pages, slots, _ = self._shape
        if flat.num_rollouts > slots or len(flat.token_id_F) > pages * PAGE_TOKENS:
            raise DataError(
                f"{flat.num_rollouts} rollouts of {flat.tokens_S.sum()} tokens, in pages of "
                f"{PAGE_TOKENS}, do not fit a replay buffer of {slots} rollouts and "
                f"{pages * PAGE_TOKENS} tokens; raise replay.capacity_tokens"
            )

    def _describe(self, flat: FlatRollouts, priority_S: Tensor) -> None:
        tokens_S = flat.tokens_S
        oldest_step_S = torch.from_numpy(flat.oldest_step_S).to(self._device)
        num_tokens_S = torch.from_numpy(tokens_S).to(self._device)
        priority_S = self._clipped(priority_S)
        mass_S = priority_mass(self._config.law, priority_S)
        first_page_S = self._next_page + flat.starts_S // PAGE_TOKENS
        for here, there in _ring_pieces(self._next, flat.num_rollouts, self._shape.slots):
            self._first_page[here] = first_page_S[there]
            self._prompt_tokens[here] = flat.prompt_tokens_S[there]
            self._response_tokens[here] = flat.response_tokens_S[there]
            self._oldest_step[here] = flat.oldest_step_S[there]
            self._slots["oldest_step"][here] = oldest_step_S[there]
            self._slots["tokens"][here] = num_tokens_S[there]
            self._slots["uses"][here] = 0
            self._slots["priority"][here] = priority_S[there]
            self._slots["mass"][here] = mass_S[there]

    def _clipped(self, priority_S: Tensor) -> Tensor:
        return priority_S.clamp(MIN_PRIORITY_NATS, self._config.priority_clip_nats)

    def _make_room(self, num_rollouts: int, num_pages: int) -> None:
        """Free the oldest slots until so many rollouts and pages can follow."""
        pages, slots, _ = self._shape
        least_page = self._next_page + num_pages - pages
        # The rollouts before it begin on pages that the new ones need.
        keep = bisect.bisect_left(
            range(self._oldest, self._next),
            least_page,
            key=lambda number: self._first_page[number % slots],
        )
        oldest = max(self._oldest + keep, self._next + num_rollouts - slots)
        for here, _ in _ring_pieces(self._oldest, oldest - self._oldest, slots):
            mass = self._slots["mass"][here]
            self._slots["evicted"][_CAPACITY] += mass.count_nonzero()
            mass.zero_()
        self._oldest = oldest

    def evict_by_age(self, step: int) -> None:
        """Drop the rollouts whose oldest token is older than ``max_age_steps`` at ``step``."""
        mass_M = self._slots["mass"]
        old_M = self._slots["oldest_step"] < step - self._config.max_age_steps
        self._slots["evicted"][_AGE] += (old_M & (mass_M > 0)).sum()
        mass_M.masked_fill_(old_M, 0.0)

    # --- Drawing ----------------------------------------------------------------------------------

    def sample(self, num_rollouts: int, step: int) -> ReplaySample:
        """Draw different rollouts by the config's law, by the buffer's state and the step alone.

        The weights are (1 / (N P))^beta over the probabilities that rollouts were really drawn
        with, divided by the largest of the sample. The loss divides by their sum, so that this
        changes no gradient; it keeps them at most 1. With ``coverage_first``, N counts what could
        be drawn: only rollouts never used, as long as these are enough.

        Raises:
            DataError: fewer are live.
        """
        uses_M, mass_M = self._slots["uses"], self._slots["mass"]
        live = int(mass_M.count_nonzero())
        if not 1 <= num_rollouts <= live:
            raise DataError(
                f"{num_rollouts} rollouts asked of a replay buffer with {live} that may be drawn"
            )
        config = self._config
        mass_M = draw_mass(config.law, mass_M, self._slots["oldest_step"], step)
        generator = torch.Generator(self._device)
        generator.manual_seed(derive_seed(self._seed, "replay", step))
        drawable = live
        if config.coverage_first:
            drawn, drawable = _unused_first(mass_M, uses_M, num_rollouts, live, generator)
        else:
            drawn = systematic_draw(mass_M, num_rollouts, generator)
        beta = annealed(config.beta_start, config.beta_end, config.beta_steps, step)
        weights_S = importance_weights(drawn.inclusion_n, drawable, beta)
        slots_S = drawn.slots_n.cpu().numpy()
        slots = self._shape.slots
        return ReplaySample(
            slots_S=slots_S,
            weights_S=(weights_S / weights_S.max()).float(),
            numbers_S=self._oldest + (slots_S - self._oldest) % slots,
        )

    def gather(self, sample: ReplaySample) -> FlatRollouts:
        """The sample's rollouts, flat on the device, each from the beginning of a page.

        Raises:
            DataError: rollouts were added since, and some of the sample's are gone.
        """
        self._check_current(sample)
        slots_S = sample.slots_S
        prompt_S, response_S = self._prompt_tokens[slots_S], self._response_tokens[slots_S]
        num_pages_S = -(-(prompt_S + response_S) // PAGE_TOKENS)
        pages = spans(self._first_page[slots_S], num_pages_S) % self._shape.pages
        pages = torch.from_numpy(pages).to(self._device)
        return FlatRollouts(
            **{
                name: arena.index_select(0, pages).flatten(0, 1)
                for name, arena in self._arenas.items()
            },
            starts_S=(np.cumsum(num_pages_S) - num_pages_S) * PAGE_TOKENS,
            prompt_tokens_S=prompt_S,
            response_tokens_S=response_S,
            oldest_step_S=self._oldest_step[slots_S],
        )

    def mark_used(self, sample: ReplaySample, priority_S: Tensor) -> None:
        """The sample was trained on: refresh its priorities, drop what was used up.

        Args:
            priority_S: float32 on the device, in nats, of each of the sample's rollouts.
        """
        self._check_current(sample)
        slots_S = torch.from_numpy(sample.slots_S).to(self._device)
        priority_S = self._clipped(priority_S)
        mass_S = priority_mass(self._config.law, priority_S)
        mass_S = mass_S.masked_fill(self._slots["mass"][slots_S] == 0, 0.0)  # dropped meanwhile
        uses_S = self._slots["uses"][slots_S] + 1
        if self._config.reuse_cap is not None:
            used_up_S = (uses_S >= self._config.reuse_cap) & (mass_S > 0)
            mass_S = mass_S.masked_fill(used_up_S, 0.0)
            self._slots["evicted"][_REUSE] += used_up_S.sum()
        self._slots["uses"][slots_S] = uses_S
        self._slots["priority"][slots_S] = priority_S
        self._slots["mass"][slots_S] = mass_S

    def _check_current(self, sample: ReplaySample) -> None:
        if sample.numbers_S.min() < self._oldest:
            raise DataError(
                "rollouts were added since the sample was drawn, and took the place of some of it"
            )

    # --- Looking at it ----------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rollouts that may be drawn."""
        return int(self._slots["mass"].count_nonzero())

    def metrics(self, step: int) -> tuple[Metric, ...]:
        """What is held at ``step`` and what became of the rest. Waits for the device once."""
        live_M = self._slots["mass"] > 0
        age_M = torch.where(live_M, step - self._slots["oldest_step"], 0)
        values = [
            live_M.sum(),
            torch.where(live_M, self._slots["tokens"], 0).sum(),
            age_M.sum(),
            age_M.max(),
            torch.where(live_M, self._slots["uses"], 0).sum(),
            *self._slots["evicted"],
        ]
        live, tokens, age, oldest, uses, by_capacity, by_age, by_reuse = torch.stack(
            [value.long() for value in values]
        ).tolist()
        return (
            Metric.last("replay/rollouts", live),
            Metric.last("replay/tokens", tokens),
            Metric.mean("replay/age_mean_steps", age, live),
            Metric.max("replay/age_max_steps", oldest),
            Metric.mean("replay/uses_mean", uses, live),
            Metric.last("replay/added", self._next),
            Metric.last("replay/evicted_by_capacity", by_capacity),
            Metric.last("replay/evicted_by_age", by_age),
            Metric.last("replay/evicted_by_reuse", by_reuse),
        )

    # --- Saving -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that `load_state_dict` needs to go on bit for bit; free pages are left out."""
        pages = self._pages_in_use()
        state = {name: arena.index_select(0, pages) for name, arena in self._arenas.items()}
        state |= {name: tensor.clone() for name, tensor in self._slots.items()}
        for name, values in self._host_arrays():
            state[name] = torch.from_numpy(values.copy())
        state["ring"] = torch.tensor([*self._shape, self._oldest, self._next, self._next_page])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`.

        Raises:
            CheckpointError: it is of a buffer of another size or kind.
        """
        try:
            *shape, self._oldest, self._next, self._next_page = state["ring"].tolist()
            if tuple(shape) != self._shape:
                raise CheckpointError(
                    f"a replay buffer with (pages, rollouts, candidates) = {tuple(shape)} was "
                    f"saved, the config asks for {tuple(self._shape)}"
                )
            for name, values in self._host_arrays():
                values[:] = state[name].cpu().numpy()
            for name, tensor in self._slots.items():
                tensor.copy_(state[name])
            pages = self._pages_in_use()
            for name, arena in self._arenas.items():
                arena.zero_()
                arena[pages] = state[name].to(self._device)
        except (KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"not a replay buffer's state: {error}") from error

    def digest(self) -> str:
        """Of the whole state: equal for buffers that will go on alike."""
        return weights_digest(
            {name: tensor.to(self._device) for name, tensor in self.state_dict().items()}
        )

    def _host_arrays(self) -> Iterator[tuple[str, Counts]]:
        yield "first_page", self._first_page
        yield "prompt_tokens", self._prompt_tokens
        yield "response_tokens", self._response_tokens
        yield "oldest_step_on_host", self._oldest_step

    def _pages_in_use(self) -> Tensor:
        first = self._next_page
        if self._oldest < self._next:
            first = int(self._first_page[self._oldest % self._shape.slots])
        pages = np.arange(first, self._next_page) % self._shape.pages
        return torch.from_numpy(pages).to(self._device)


def build_replay(
    config: ReplayConfig, objective: ObjectiveConfig, *, device: torch.device, seed: int
) -> ReplayBuffer:
    """The buffer for an objective's scores."""
    return ReplayBuffer(
        config, candidates=candidates_per_token(objective), device=device, seed=seed
    )


def _unused_first(
    mass_M: Tensor, uses_M: Tensor, count: int, live: int, generator: torch.Generator
) -> tuple[Draw, int]:
    """Rollouts never used before any other; and how many rollouts could be drawn at all."""
    unused_M = torch.where(uses_M == 0, mass_M, 0.0)
    unused = int(unused_M.count_nonzero())
    if unused == 0:
        return systematic_draw(mass_M, count, generator), live
    first = systematic_draw(unused_M, min(count, unused), generator)
    if count <= unused:
        return first, unused
    second = systematic_draw(mass_M - unused_M, count - unused, generator)
    both = Draw(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
    order = both.slots_n.argsort()
    return Draw(both.slots_n[order], both.inclusion_n[order]), live


def _shape(config: ReplayConfig, candidates: int) -> _Shape:
    pages = -(-config.capacity_tokens // PAGE_TOKENS)
    return _Shape(pages, min(pages, config.capacity_rollouts or pages), candidates)


def _arena_layout(shape: _Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Per-token arenas by the names of `FlatRollouts`."""
    arena = (shape.pages, PAGE_TOKENS)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "token_id_F": (arena, torch.int32),
        "behavior_logprob_F": (arena, torch.float32),
        "teacher_logprob_F": (arena, torch.float32),
    }
    if shape.candidates:
        layout["candidate_id_FK"] = ((*arena, shape.candidates), torch.int32)
        layout["candidate_logprob_FK"] = ((*arena, shape.candidates), torch.float32)
    return layout


def _layout(shape: _Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Everything on the device."""
    slots = (shape.slots,)
    return _arena_layout(shape) | {
        "oldest_step": (slots, torch.int64),
        "tokens": (slots, torch.int32),
        "uses": (slots, torch.int32),
        "priority": (slots, torch.float32),
        "mass": (slots, torch.float32),
        "evicted": ((3,), torch.int64),
    }


def _ring_pieces(start: int, count: int, size: int) -> Iterator[tuple[slice, slice]]:
    """``count`` places of a ring from ``start`` on, as one slice or two; each with its part of
    ``range(count)``."""
    first = start % size
    before_end = min(count, size - first)
    if before_end:
        yield slice(first, first + before_end), slice(0, before_end)
    if count > before_end:
        yield slice(0, count - before_end), slice(before_end, count)
