"""Greedy rows of the embedded sampler."""

import torch

from qwen3_distill.generation.embedded.sampling import RowSampler
from tests.contract.builders import make_spec

CPU = torch.device("cpu")
LOGITS = torch.tensor([[0.1, 2.0, 1.9, -1.0], [3.0, 0.0, 2.9, 1.0], [0.5, 0.4, 0.45, 0.6]])
MOST_LIKELY = [1, 0, 3]


def test_a_greedy_row_takes_the_most_likely_token_at_logprob_zero() -> None:
    sampler = RowSampler([make_spec(seed, temperature=0.0, top_k=2) for seed in range(3)], CPU)
    for _ in range(4):
        ids, logprobs = sampler.sample(LOGITS)
        assert ids.tolist() == MOST_LIKELY
        assert logprobs.tolist() == [0.0, 0.0, 0.0]


def test_greedy_rows_leave_the_others_their_bits() -> None:
    warm = RowSampler([make_spec(seed) for seed in range(3)], CPU)
    mixed = RowSampler([make_spec(0), make_spec(1, temperature=0.0), make_spec(2)], CPU)
    for _ in range(8):
        (ids, logprobs), (mixed_ids, mixed_logprobs) = warm.sample(LOGITS), mixed.sample(LOGITS)
        assert mixed_ids[[0, 2]].tolist() == ids[[0, 2]].tolist()
        assert torch.equal(mixed_logprobs[[0, 2]], logprobs[[0, 2]])
        assert mixed_ids[1] == MOST_LIKELY[1]


def test_rows_stay_greedy_when_they_are_selected_and_joined() -> None:
    mixed = RowSampler([make_spec(0), make_spec(1, temperature=0.0)], CPU)
    greedy = mixed.select([1]).joined(RowSampler([make_spec(2, temperature=0.0)], CPU))
    for _ in range(8):
        assert greedy.sample(LOGITS[1:])[0].tolist() == MOST_LIKELY[1:]
