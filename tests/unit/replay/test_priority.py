"""The sampling laws: frequencies against their formulas, weights against the mean they restore."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_distill.config import ProportionalLaw, RankLaw, ReplayConfig, ReplayLaw, UniformLaw
from qwen3_distill.replay.buffer import ReplayBuffer
from qwen3_distill.replay.priority import (
    Draw,
    Floats,
    Masses,
    annealed,
    draw_mass,
    importance_weights,
    priority_mass,
    systematic_draw,
)
from tests.unit.replay.model import scored_rollout

UNIFORM = UniformLaw(kind="uniform")
PRIORITIES = [0.05, 0.2, 0.4, 0.4, 0.9, 1.3, 0.1, 2.0]
STEPS = [3, 9, 5, 9, 1, 8, 9, 2]
NOW = 10
DRAWS = 1500
CHI_SQUARE_7_999 = 24.32
"""The 99.9% point with 7 degrees of freedom."""

LAWS: dict[str, ReplayLaw] = {
    "uniform": UNIFORM,
    "proportional": ProportionalLaw(kind="proportional", alpha=0.6),
    "decayed": ProportionalLaw(kind="proportional", alpha=0.6, age_decay_steps=4.0),
    "floored": ProportionalLaw(kind="proportional", alpha=1.0, uniform_fraction=0.3),
    "rank": RankLaw(kind="rank", alpha=0.7),
    "rank_decayed": RankLaw(kind="rank", alpha=1.0, age_decay_steps=4.0, uniform_fraction=0.2),
}
each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())


def expected_probabilities(law: ReplayLaw) -> np.ndarray:
    """The formulas of docs/guide/replay.md, one rollout at a time."""
    if isinstance(law, UniformLaw):
        return np.full(8, 1 / 8)
    tau = law.age_decay_steps or math.inf
    decayed = [p * math.exp(-(NOW - step) / tau) for p, step in zip(PRIORITIES, STEPS, strict=True)]
    if isinstance(law, ProportionalLaw):
        shares = np.array([value**law.alpha for value in decayed])
    else:
        order = sorted(range(8), key=lambda i: (-decayed[i], i))
        shares = np.array([(order.index(i) + 1) ** -law.alpha for i in range(8)])
    shares /= shares.sum()
    return (1 - law.uniform_fraction) * shares + law.uniform_fraction / 8


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def draw(mass_M: Floats, count: int, seed: int) -> Draw:
    return systematic_draw(Masses(mass_M), count, generator(seed).random())


def chi_square(counts: Counter[int], expected: np.ndarray) -> float:
    seen = np.array([counts[i] for i in range(len(expected))])
    return float(((seen - expected) ** 2 / expected).sum())


def mass_of(law: ReplayLaw) -> Floats:
    stored = priority_mass(law, np.array(PRIORITIES))
    return draw_mass(law, stored, np.array(STEPS), NOW)


def filled_buffer(law: ReplayLaw, *, seed: int = 0, **settings: Any) -> ReplayBuffer:
    """Eight rollouts with the priorities and ages above."""
    config = ReplayConfig(capacity_tokens=1000, max_age_steps=99, law=law, **settings)
    buffer = ReplayBuffer(config, candidates=0, device=torch.device("cpu"), seed=seed)
    buffer.add([scored_rollout(i, 2, 3, step=step) for i, step in enumerate(STEPS)])
    buffer._masses.set(slice(0, 8), priority_mass(law, np.array(PRIORITIES)))
    buffer._oldest_step[:8] = STEPS
    return buffer


@each_law
def test_the_shares_are_those_of_the_law(law: ReplayLaw) -> None:
    mass_M = mass_of(law)
    assert mass_M / mass_M.sum() == pytest.approx(expected_probabilities(law), rel=1e-5)


def chi_square_of_single_draws(drawn_by: ReplayLaw, expected_by: ReplayLaw) -> float:
    mass_M = mass_of(drawn_by)
    drawn = [int(draw(mass_M, 1, seed).places_n[0]) for seed in range(DRAWS)]
    seen = Counter(drawn)
    return chi_square(seen, DRAWS * expected_probabilities(expected_by))


@each_law
def test_single_draws_come_as_often_as_the_law_says(law: ReplayLaw) -> None:
    assert chi_square_of_single_draws(law, law) < CHI_SQUARE_7_999


@pytest.mark.parametrize("law", [law for law in LAWS.values() if law is not UNIFORM])
def test_uniform_draws_would_fail_the_frequency_check(law: ReplayLaw) -> None:
    assert chi_square_of_single_draws(UNIFORM, law) > CHI_SQUARE_7_999


@pytest.mark.parametrize("name", ["uniform", "decayed"])
def test_a_buffer_draws_by_its_law(name: str) -> None:
    drawn, buffer = Counter[int](), filled_buffer(LAWS[name])
    for buffer._seed in range(DRAWS // 2):
        drawn.update(buffer.sample(1, NOW).places_S.tolist())
    expected = DRAWS // 2 * expected_probabilities(LAWS[name])
    assert chi_square(drawn, expected) < CHI_SQUARE_7_999


def capped_probabilities(shares: np.ndarray, count: int) -> np.ndarray:
    """n P_i; what exceeds 1 becomes 1, the rest is shared out again, one rollout at a time."""
    certain = set[int]()
    while True:
        free = [i for i in range(len(shares)) if i not in certain]
        left, total = count - len(certain), sum(shares[i] for i in free)
        over = [i for i in free if left * shares[i] >= total]
        if not over:
            inclusion = np.ones(len(shares))
            inclusion[free] = [left * shares[i] / total for i in free]
            return inclusion
        certain.add(max(over, key=lambda i: shares[i]))
        if len(certain) == len(shares):
            return np.ones(len(shares))


@each_law
@pytest.mark.parametrize("count", [3, 6, 8])
def test_a_draw_of_several_has_the_probabilities_it_states(law: ReplayLaw, count: int) -> None:
    mass_M, draws = mass_of(law), DRAWS // 3
    expected = capped_probabilities(expected_probabilities(law), count)
    seen = np.zeros(8)
    for seed in range(draws):
        drawn = draw(mass_M, count, seed)
        slots = drawn.places_n
        assert len(set(slots.tolist())) == count
        assert drawn.inclusion_n == pytest.approx(expected[slots], rel=1e-5)
        seen[slots] += 1
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(seen / draws - expected) <= 4 * deviation + 1e-6).all()


@given(
    masses=st.lists(st.just(0.0) | st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=60),
    data=st.data(),
)
def test_only_what_has_a_mass_is_drawn_and_never_twice(
    masses: list[float], data: st.DataObject
) -> None:
    mass_M = np.array(masses)
    live = int(np.count_nonzero(mass_M))
    if live == 0:
        return
    count = data.draw(st.integers(1, live))
    drawn = draw(mass_M, count, data.draw(st.integers(0, 2**32)))
    assert len(set(drawn.places_n.tolist())) == count
    assert (mass_M[drawn.places_n] > 0).all()
    assert (drawn.inclusion_n > 0).all()
    assert (drawn.inclusion_n <= 1 + 1e-9).all()
    if count == live:
        assert drawn.inclusion_n == pytest.approx(1.0)


def test_the_last_slots_are_never_drawn_when_they_are_empty() -> None:
    mass_M = np.concatenate([generator(0).random(1000), np.zeros(5)])
    for seed in range(300):
        assert int(draw(mass_M, 997, seed).places_n.max()) < 1000


@pytest.mark.parametrize("offset", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_line_belong_to_what_has_a_mass(offset: float) -> None:
    for count in range(1, 30):
        masses = [0.0, *(0.1 * i for i in range(1, 31)), 0.0]
        mass_M = np.array(masses)
        drawn = systematic_draw(Masses(mass_M), count, offset)
        assert (mass_M[drawn.places_n] > 0).all()


@pytest.mark.parametrize("offset", [0.0, 1 - 2.0**-47, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("power", [1.0, 8.0], ids=["even", "heavy_tailed"])
def test_points_on_an_edge_fall_on_different_places_of_many(offset: float, power: float) -> None:
    """Sums over blocks and over places round differently; either may carry a point past an edge."""
    for seed in range(400):
        rng = generator(seed)
        mass_M = rng.random(int(rng.integers(49, 200))) ** power
        count = int(rng.integers(1, len(mass_M)))
        drawn = systematic_draw(Masses(mass_M), count, offset)
        assert (np.diff(drawn.places_n) > 0).all()
        assert (mass_M[drawn.places_n] > 0).all()


def test_masses_that_change_are_drawn_as_if_they_had_always_been_so() -> None:
    rng = generator(3)
    masses = Masses(rng.random(203))
    for seed in range(200):
        if seed % 2:
            start = int(rng.integers(0, 203))
            here: Any = slice(start, int(rng.integers(start, 204)))
            masses.set(here, rng.random(here.stop - start) if seed % 4 == 1 else 0.0)
        else:
            here = rng.choice(203, size=9, replace=False)
            masses.set(here, rng.random(9) ** 4)
        count = int(rng.integers(1, 1 + np.count_nonzero(masses.mass_M)))
        kept = systematic_draw(masses, count, 0.3)
        fresh = systematic_draw(Masses(masses.mass_M), count, 0.3)
        assert kept.places_n.tolist() == fresh.places_n.tolist()
        assert kept.inclusion_n.tolist() == fresh.inclusion_n.tolist()


# --- Importance weights -------------------------------------------------------------------------

VALUES = np.array([4.0, -1.0, 0.5, 7.0, 2.0, -3.0, 10.0, 1.0])
"""Of some function of the rollouts; its uniform mean is what the weights must restore."""


@each_law
@pytest.mark.parametrize("count", [3, 6])
def test_weighted_draws_have_the_uniform_mean(law: ReplayLaw, count: int) -> None:
    mass_M, means, plain = mass_of(law), [], []
    for seed in range(DRAWS):
        drawn = draw(mass_M, count, seed)
        raw = count / (8 * drawn.inclusion_n)
        weights = importance_weights(drawn.inclusion_n, beta=1.0)
        assert weights == pytest.approx(raw / raw.max(), rel=1e-6)
        values = VALUES[drawn.places_n]
        means.append((raw * values).mean())
        plain.append(values.mean())
    error = np.std(means) / math.sqrt(DRAWS)
    assert abs(np.mean(means) - VALUES.mean()) < 4 * error + 1e-9
    if not isinstance(law, UniformLaw):  # without the weights it is another mean
        assert abs(np.mean(plain) - VALUES.mean()) > 8 * np.std(plain) / math.sqrt(DRAWS)


@pytest.mark.parametrize("law", [UNIFORM, LAWS["decayed"]], ids=["uniform", "decayed"])
def test_weights_correct_for_the_mixture_of_unused_and_used(law: ReplayLaw) -> None:
    """Three of eight are unused, five are drawn: the unused for certain, two of the others."""
    used, count = {0, 2, 4, 5, 7}, 5
    mass = expected_probabilities(law)
    expected = np.ones(8)
    others = sorted(used)
    expected[others] = capped_probabilities(mass[others], 2)
    totals = np.zeros(8)
    buffer = filled_buffer(law, coverage_first=True, beta_start=1.0, beta_end=1.0)
    buffer._uses[others] = 1
    for buffer._seed in range(DRAWS // 2):
        sample = buffer.sample(count, NOW)
        raw = 5 / (8 * expected[sample.places_S])
        assert sample.weights_S == pytest.approx(raw / raw.max(), rel=1e-5)
        totals[sample.places_S] += raw
    # Every rollout's mean weight over draws is its uniform share of them.
    share = totals / (DRAWS // 2)
    deviation = 5 / 8 * np.sqrt((1 / expected - 1) / (DRAWS // 2))
    assert (np.abs(share - 5 / 8) <= 4 * deviation + 1e-9).all()


def test_where_unused_rollouts_are_enough_the_others_do_not_count() -> None:
    buffer = filled_buffer(LAWS["proportional"], coverage_first=True, beta_start=1.0)
    buffer._uses[:4] = 1
    sample = buffer.sample(2, NOW)
    assert set(sample.places_S.tolist()) <= {4, 5, 6, 7}
    shares = expected_probabilities(LAWS["proportional"])
    inclusion = np.zeros(8)
    inclusion[4:] = capped_probabilities(shares[4:], 2)
    raw = 1 / inclusion[sample.places_S]
    assert sample.weights_S == pytest.approx(raw / raw.max(), rel=1e-5)


def test_uniform_draws_have_weight_one() -> None:
    buffer = filled_buffer(UNIFORM)
    assert all(buffer.sample(3, step).weights_S.tolist() == [1.0] * 3 for step in range(20))


def test_beta_is_annealed_over_the_steps_and_tempers_the_weights() -> None:
    settings: dict[str, Any] = {"beta_start": 0.0, "beta_end": 0.8, "beta_steps": 2 * NOW}
    buffer = filled_buffer(LAWS["proportional"], **settings)
    sample = buffer.sample(3, NOW)
    inclusion = capped_probabilities(expected_probabilities(LAWS["proportional"]), 3)
    raw = (3 / (8 * inclusion[sample.places_S])) ** 0.4
    assert sample.weights_S == pytest.approx(raw / raw.max(), rel=1e-5)
    assert [annealed(0.4, 1.0, 4, step) for step in (0, 1, 4, 9)] == pytest.approx(
        [0.4, 0.55, 1.0, 1.0]
    )


def test_an_old_rollout_stays_drawable() -> None:
    law = ProportionalLaw(kind="proportional", age_decay_steps=0.01)
    mass_M = draw_mass(law, np.ones(2), np.array([0, 10_000]), 10_000)
    assert float(mass_M[0]) > 0
