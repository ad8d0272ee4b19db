from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.protocols import FullWeights
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel
from tests.tiny_models import TinyModels

FIRST = WeightVersion(step=0, digest="a")
SECOND = WeightVersion(step=1, digest="b")


def some_weights() -> dict[str, Tensor]:
    return {"w": torch.arange(4.0), "b": torch.ones(2, requires_grad=True)}


def some_payload() -> FullWeights:
    return FullWeights(tensors=some_weights())


def test_the_channel_gives_back_what_was_published() -> None:
    channel, weights = MemoryChannel(), some_weights()
    channel.publish(FIRST, FullWeights(tensors=weights))
    fetched = channel.fetch(FIRST).tensors
    assert fetched.keys() == weights.keys()
    assert all(torch.equal(fetched[name], weights[name]) for name in weights)
    assert not any(tensor.requires_grad for tensor in fetched.values())


def test_the_channel_keeps_a_copy() -> None:
    channel, weights = MemoryChannel(), some_weights()
    channel.publish(FIRST, FullWeights(tensors=weights))
    weights["w"].add_(1)  # the optimizer writes into its own tensors
    weights["extra"] = torch.zeros(1)
    assert channel.fetch(FIRST).tensors["w"].tolist() == [0, 1, 2, 3]
    assert channel.fetch(FIRST).tensors.keys() == {"w", "b"}


def test_only_the_newest_version_can_be_fetched() -> None:
    channel = MemoryChannel()
    channel.publish(FIRST, some_payload())
    channel.publish(SECOND, FullWeights(tensors={"w": torch.zeros(1)}))
    assert channel.fetch(SECOND).tensors.keys() == {"w"}
    with pytest.raises(WeightVersionError, match=r"holds .*step=1.* not .*step=0"):
        channel.fetch(FIRST)


@pytest.mark.parametrize("change", [{"step": 3}, {"digest": "other"}], ids=str)
def test_a_version_must_match_in_step_and_digest(change: dict[str, int | str]) -> None:
    channel = MemoryChannel()
    channel.publish(FIRST, some_payload())
    with pytest.raises(WeightVersionError):
        channel.fetch(replace(FIRST, **change))


def test_an_empty_channel_holds_nothing() -> None:
    with pytest.raises(WeightVersionError, match="holds nothing"):
        MemoryChannel().fetch(FIRST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_is_published_as_step_0(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    channel = MemoryChannel()
    version = publish_directory(tiny_models.student, channel, dtype=dtype)
    fetched = channel.fetch(version).tensors
    model = load_model(tiny_models.student, device=torch.device("cpu"), dtype=dtype)
    expected = dict(model.named_parameters())
    assert version == WeightVersion(step=0, digest=weights_digest(expected))
    assert version.digest == weights_digest(fetched)
    assert all(torch.equal(fetched[name], tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in fetched.values()} == {dtype}


def test_a_directory_has_the_same_version_every_time(tiny_models: TinyModels) -> None:
    versions = {
        publish_directory(path, MemoryChannel(), dtype=torch.float32)
        for path in (tiny_models.student, tiny_models.student, tiny_models.teacher)
    }
    assert len(versions) == 2
