"""Computes the exact expected gradient of each form of the objective, on stale samples.

    python -m benchmarks.learning.estimators

One state with `--vocabulary` tokens; the student's, the teacher's and the sampling student's logits
are normal, the last at KL(mu || pi) = 0.047 nats from the student's. The expectation over a ~ mu of

    ratio(a) (log q(a) - log p(a)) grad log pi(a),   p = pi (current advantage) or mu (old)

is a sum over the vocabulary, so nothing is sampled. Figures: the cosine of this gradient with the
direction that lowers KL(pi || q), mean over `--states`. Gradients are those of the logits, not of a
network.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.lib.common import RESULTS, write_result

Array = NDArray[np.float64]
CLIP, CAP = 0.2, 2.0


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def at_distance(log_pi: Array, noise: Array, nats: float) -> Array:
    """Find log mu = log softmax(log pi + s noise) with KL(mu || pi) = ``nats``, by bisection."""
    low, high = 0.0, 8.0
    for _ in range(60):
        scale = (low + high) / 2
        log_mu = log_softmax(log_pi + scale * noise)
        low, high = (scale, high) if np.exp(log_mu) @ (log_mu - log_pi) < nats else (low, scale)
    return log_softmax(log_pi + low * noise)


def clipped(ratio: Array, advantage: Array) -> Array:
    """PPO's surrogate: no gradient where the clip binds."""
    binds = np.where(advantage > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)
    return np.where(binds, 0.0, ratio)


RATIOS: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda ratio, _: np.ones_like(ratio),
    "full": lambda ratio, _: ratio,
    "truncated": lambda ratio, _: np.minimum(ratio, CAP),
    "ppo_clip": clipped,
}


def cosines(rng: np.random.Generator, vocabulary: int, nats: float) -> dict[str, float]:
    log_pi, log_q = (log_softmax(3 * rng.standard_normal(vocabulary)) for _ in range(2))
    log_mu = at_distance(log_pi, rng.standard_normal(vocabulary), nats)
    pi, mu = np.exp(log_pi), np.exp(log_mu)
    # Minus the gradient of KL(pi || q) by the logits.
    wanted = -pi * (log_pi - log_q - pi @ (log_pi - log_q))
    out: dict[str, float] = {}
    for advantage, log_p in (("current", log_pi), ("old", log_mu)):
        values = log_q - log_p
        for name, ratio_of in RATIOS.items():
            weights = mu * ratio_of(np.exp(log_pi - log_mu), values) * values
            got = weights - pi * weights.sum()  # grad log pi(a) by the logits is e_a - pi
            norms = np.linalg.norm(got) * np.linalg.norm(wanted)
            out[f"{advantage}_{name}"] = float(got @ wanted / norms)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--nats", type=float, default=0.047)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    states = [cosines(rng, arguments.vocabulary, arguments.nats) for _ in range(arguments.states)]
    figures = {key: float(np.mean([state[key] for state in states])) for key in states[0]}
    for key, value in sorted(figures.items(), key=lambda item: -item[1]):
        print(f"{key:20} {value:.3f}")
    settings = {name: value for name, value in vars(arguments).items() if name != "results"}
    print(write_result("estimators", figures, folder=arguments.results, settings=settings))


if __name__ == "__main__":
    main()
