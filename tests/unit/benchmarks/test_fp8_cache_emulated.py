"""The emulation of a cache in FP8: what each case rounds; with nothing rounded, the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.learning.fp8_cache_emulated import CASES, Passes, attend, in_float8
from tests.tiny_models import write_model

IDS = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m", seed=3)


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_nothing_rounded_is_the_model_itself(directory: Path) -> None:
    with torch.no_grad():
        logits = load(directory)(IDS).logits[:, 5:].flatten(0, 1)
    found = Passes(load(directory), IDS, 5).logprobs("exact")
    torch.testing.assert_close(found, logits.log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_every_case_moves_the_logprobs_and_each_in_its_own_way(directory: Path) -> None:
    passes = Passes(load(directory), IDS, 5)
    found = [passes.logprobs(case) for case in CASES]
    for number, mine in enumerate(found):
        for other in found[:number]:
            assert not torch.equal(mine, other)
        assert float((mine - found[0]).abs().mean()) < 0.5


def test_a_case_rounds_what_its_name_says() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 6, 16, generator=generator) for heads in (4, 2, 2))
    rounded = [in_float8(values) for values in (query, key, value)]

    def exact(*given: torch.Tensor) -> torch.Tensor:
        return attend(*given, scale=0.25, case="exact")

    keys_values = attend(query, key, value, 0.25, "keys_values")
    queries = attend(query, key, value, 0.25, "queries")
    assert torch.equal(keys_values, exact(query, *rounded[1:]))
    assert torch.equal(queries, exact(*rounded))
    assert not torch.equal(queries, keys_values)
    assert torch.equal(attend(query, key, value, 0.25, "bfloat16"), exact(query, key, value))
    assert not torch.equal(attend(query, key, value, 0.25, "probabilities"), queries)


def test_what_is_too_large_for_float8_is_cut() -> None:
    assert in_float8(torch.tensor([1000.0, -1000.0, 1.06])).tolist() == [448.0, -448.0, 1.0]
