"""The figures of the precision audit, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from qwen3_distill.errors import DataError
from qwen3_distill.scoring.precision import coarse_kl, compare_scores
from qwen3_distill.types import Rollout, TopKScore
from tests.contract.builders import synthetic_rollout


def rollout_with(behavior: list[float], ids: list[int]) -> Rollout:
    made = synthetic_rollout(2, len(ids), behavior_logprobs=behavior)
    return replace(made, response_ids=np.array(ids, dtype=np.int32))


def score(logprobs: list[float], ids: list[list[int]], values: list[list[float]]) -> TopKScore:
    return TopKScore(
        teacher_id="t",
        logprobs=np.array(logprobs),
        candidate_ids=np.array(ids),
        candidate_logprobs=np.array(values),
    )


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_figures_of_three_tokens() -> None:
    rollout = rollout_with([-1.0, -2.0, -3.0], [5, 6, 7])
    ids, values = [[0], [0], [0]], [[-0.5]] * 3
    exact = score([-0.9, -2.5, -3.0], ids, values)
    #   gap:       +0.1  -0.2  -0.6; advantage: + + (flips not), - - , 0 and -: flips
    served = score([-0.8, -2.7, -3.6], ids, values)
    report = compare_scores([rollout], [served], [exact])
    assert (report.num_rollouts, report.num_tokens) == (1, 3)
    assert report.mean_abs_nats == pytest.approx(0.3, abs=1e-6)
    assert report.mean_nats == pytest.approx(-0.7 / 3, abs=1e-6)
    assert report.p99_abs_nats == pytest.approx(0.2 + 0.98 * 0.4, abs=1e-6)
    assert report.sign_flips == pytest.approx(1 / 3)


def test_figures_are_over_tokens_not_over_rollouts() -> None:
    short, long = rollout_with([-1.0], [5]), rollout_with([-1.0] * 3, [5, 6, 7])
    same = [score([-2.0], [[0]], [[-0.5]]), score([-2.0] * 3, [[0]] * 3, [[-0.5]] * 3)]
    other = [score([-2.4], [[0]], [[-0.5]]), score([-2.0] * 3, [[0]] * 3, [[-0.5]] * 3)]
    report = compare_scores([short, long], other, same)
    assert report.mean_abs_nats == pytest.approx(0.1, abs=1e-6)
    assert report.num_tokens == 4


def test_equal_scores_differ_in_nothing() -> None:
    rollout = rollout_with([-1.0], [5])
    same = score(log(0.2), [[5, 1]], [log(0.2, 0.1)])
    report = compare_scores([rollout], [same], [same])
    assert (report.mean_abs_nats, report.p99_abs_nats, report.sign_flips) == (0, 0, 0)
    assert report.kl_nats == pytest.approx(0, abs=1e-12)


def test_the_kl_is_over_the_tokens_that_both_know_and_the_rest() -> None:
    ids = np.array([9])  # sampled; among the candidates of neither
    p = score(log(0.05), [[1, 2]], [log(0.5, 0.3)])
    q = score(log(0.10), [[2, 3]], [log(0.4, 0.2)])
    # Both know 2 and 9; the rest is 0.65 and 0.5.
    expected = 0.3 * math.log(0.3 / 0.4) + 0.05 * math.log(0.05 / 0.1) + 0.65 * math.log(0.65 / 0.5)
    assert coarse_kl(ids, p, q)[0] == pytest.approx(expected, abs=1e-6)
    swapped = 0.4 * math.log(0.4 / 0.3) + 0.1 * math.log(2) + 0.5 * math.log(0.5 / 0.65)
    assert coarse_kl(ids, q, p)[0] == pytest.approx(swapped, abs=1e-6)
    assert abs(expected - swapped) > 1e-3


def test_a_sampled_candidate_counts_once() -> None:
    p = score(log(0.5), [[1, 2]], [log(0.5, 0.3)])
    q = score(log(0.6), [[1, 2]], [log(0.6, 0.2)])
    expected = 0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(0.3 / 0.2)  # the rest is 0.2 in both
    assert coarse_kl(np.array([1]), p, q)[0] == pytest.approx(expected, abs=1e-6)


def test_the_estimate_is_a_lower_bound_and_exact_over_the_whole_vocabulary() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, q = (rng.dirichlet(np.full(8, 0.7)) for _ in range(2))
        full = float((p * np.log(p / q)).sum())
        token = int(rng.integers(8))
        estimates = []
        for k in (1, 3, 8):
            tops = [np.argsort(-x)[:k] for x in (p, q)]
            scores = [
                score(log(x[token]), [top.tolist()], [np.log(x[top]).tolist()])
                for x, top in zip((p, q), tops, strict=True)
            ]
            estimates.append(coarse_kl(np.array([token]), *scores)[0])
        assert max(estimates[:-1]) <= full + 1e-5
        assert estimates[-1] == pytest.approx(full, abs=1e-5)


def test_no_rest_is_no_infinity() -> None:
    p = score(log(1.0), [[1]], [log(1.0)])
    q = score(log(0.5), [[1]], [log(0.5)])
    assert coarse_kl(np.array([1]), p, q)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert math.isfinite(coarse_kl(np.array([1]), q, p)[0])


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(DataError, match="no rollouts"):
        compare_scores([], [], [])
