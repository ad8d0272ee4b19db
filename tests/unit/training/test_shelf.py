"""Tensors beside one another in blocks that are lent."""

import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.config import LoraTuning
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training import shelf
from qwen3_distill.training.lora import add_adapters, merged_parameters
from qwen3_distill.training.shelf import Shelf, shelf_bytes
from tests.tiny_models import TinyModels


def blocks_of(tensors: dict[str, Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


def test_tensors_lie_beside_one_another_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "BLOCK_BYTES", 4096)
    like = [torch.randn(7, 30), torch.randn(100).bfloat16(), torch.randn(900), torch.randn(40)]
    made = Shelf(sum(shelf_bytes(values.nbytes) for values in like))
    places = [made.like(values) for values in like]
    for place, values in zip(places, like, strict=True):
        assert (place.shape, place.dtype, place.device) == (
            values.shape,
            values.dtype,
            values.device,
        )
        place.copy_(values)
    for place, values in zip(places, like, strict=True):
        assert torch.equal(place, values)
        assert place.storage_offset() * place.itemsize % 512 == 0
    # The third fills a block, and the last block is no larger than what is left.
    sizes = [places[number].untyped_storage().nbytes() for number in (0, 2, 3)]
    assert sizes == [4096, 4096, 512]
    assert places[1].untyped_storage().data_ptr() == places[0].untyped_storage().data_ptr()


def test_a_tensor_larger_than_a_block_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "BLOCK_BYTES", 512)
    large = torch.randn(1000)
    place = Shelf(shelf_bytes(large.nbytes)).like(large)
    assert place.untyped_storage().nbytes() == 4096


def test_a_block_is_free_when_its_tensors_are() -> None:
    made = Shelf(2 * 512)
    first = made.like(torch.zeros(10))
    kept = weakref.ref(first.untyped_storage())
    second = made.like(torch.zeros(10))
    del first, made
    gc.collect()
    assert torch.equal(second.zero_(), torch.zeros(10))
    assert kept() is not None
    del second
    gc.collect()
    assert kept() is None


def adapted(tiny_models: TinyModels) -> PreTrainedModel:
    core = load_model(tiny_models.student, device=torch.device("cpu"), dtype=torch.float32)
    add_adapters(core, LoraTuning(kind="lora", rank=2, alpha=2.0), seed=0)
    for name, parameter in core.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return core


def test_a_published_version_lies_in_few_blocks(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_distill.training.lora.lends", lambda _: True)
    core = adapted(tiny_models)
    one_by_one = dict(merged_parameters(core))
    together = dict(merged_parameters(core, lent=True))
    assert weights_digest(together) == weights_digest(one_by_one)
    base = {parameter.untyped_storage().data_ptr() for parameter in core.parameters()}
    merged = {
        name: tensor
        for name, tensor in together.items()
        if tensor.untyped_storage().data_ptr() not in base
    }
    assert len(merged) >= 7
    assert len(blocks_of(merged)) == 1
    assert merged[next(iter(merged))].untyped_storage().nbytes() == sum(
        shelf_bytes(tensor.nbytes) for tensor in merged.values()
    )


def test_what_is_published_on_a_cpu_is_sent_without_what_lies_beside_it(
    tiny_models: TinyModels,
) -> None:
    core = adapted(tiny_models)
    tensors = dict(merged_parameters(core, lent=True))
    bytes_of_all = sum(tensor.nbytes for tensor in tensors.values())
    assert len(pickle.dumps(tensors)) < 1.1 * bytes_of_all + 1000 * len(tensors)
