"""vLLM whose model is divided over two cards: each process reads its own weights back."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from torch import Tensor

from qwen3_distill.config import LoraTuning
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.weights.directory import DirectoryChannel
from tests.contract.builders import (
    directory_weights,
    generate,
    likelier_eos,
    ragged_requests,
    run,
    serve,
    with_module,
)
from tests.contract.reference import behavior_gap, reference_model
from tests.contract.test_vllm_engine import adapter_weights, merged, serve_adapter
from tests.contract.vllm_adapter import build_vllm
from tests.engines import INSTALLED
from tests.tiny_models import write_model

pytestmark = [
    pytest.mark.weekly,
    pytest.mark.vllm,
    pytest.mark.skipif(INSTALLED.device == "cuda", reason="needs two cards in one engine"),
]

PARITY_NATS, FAR_NATS = 1e-4, 0.05


def write(tmp_path_factory: pytest.TempPathFactory, num_key_value_heads: int) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "student"
    return write_model(folder, seed=0, num_key_value_heads=num_key_value_heads)


@pytest.fixture(scope="module", params=[1, 2], ids=["a shared key-value head", "a head each"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def of_one_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose only key-value head both processes have."""
    return write(tmp_path_factory, 1)


def divided(
    model: Path, lora: LoraTuning | None = None, module: str | None = None
) -> HostedRolloutEngine:
    """An engine whose model is divided over two processes of this machine."""
    hosts = {} if module is None else {"make_host": with_module(module)}
    return build_vllm(model, lora=lora, tensor_parallel=2, **hosts)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[HostedRolloutEngine]:
    built = divided(model)
    yield built
    run(built.close())


def gap(engine: HostedRolloutEngine, model: Path, weights: Mapping[str, Tensor]) -> float:
    reference = reference_model(model, weights)
    return max(behavior_gap(reference, rollout) for rollout in generate(engine, ragged_requests()))


def test_whole_weights_are_served_and_replaced(engine: HostedRolloutEngine, model: Path) -> None:
    base = directory_weights(model)
    first = likelier_eos(base)
    serve(engine, first, step=1)
    assert gap(engine, model, first) < PARITY_NATS
    moved = {name: tensor + 0.05 for name, tensor in base.items()}
    serve(engine, moved, step=2)
    assert gap(engine, model, moved) < PARITY_NATS
    assert gap(engine, model, first) > FAR_NATS


def test_weights_of_another_shape_are_refused(engine: HostedRolloutEngine, model: Path) -> None:
    odd = directory_weights(model)
    name = next(name for name in odd if name.endswith("o_proj.weight"))
    odd[name] = odd[name][:, :-2].contiguous()
    with pytest.raises(WeightVersionError, match=r"o_proj.weight was published with shape"):
        serve(engine, odd, step=3)


def test_adapters_are_served_and_replaced(of_one_head: Path, tmp_path: Path) -> None:
    base = directory_weights(of_one_head)
    channel = DirectoryChannel(tmp_path)
    engine = divided(of_one_head, lora=LoraTuning(kind="lora", rank=4, alpha=12.0))
    try:
        for step in (1, 2):
            adapter = adapter_weights(base, seed=step)
            serve_adapter(engine, channel, adapter, step)
            assert gap(engine, of_one_head, merged(base, adapter)) < PARITY_NATS
    finally:
        run(engine.close())


def test_a_part_that_stays_behind_is_seen(of_one_head: Path) -> None:
    engine = divided(of_one_head, module="tests.contract.half_loaded_vllm_worker")
    try:
        first = directory_weights(of_one_head)
        serve(engine, first, step=1)
        moved = {name: tensor + 0.05 for name, tensor in first.items()}
        with pytest.raises(WeightVersionError, match="in use is not the published one"):
            serve(engine, moved, step=2)
    finally:
        run(engine.close())
