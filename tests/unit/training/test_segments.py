"""Memory that grows, and memory that can be lent: real settings of PyTorch, but no device."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3_distill.config import EmbeddedTraining, LoraTuning, OptimizerConfig, SampledReverseKL
from qwen3_distill.training import segments
from qwen3_distill.training.embedded import worker
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.embedded.worker import EmbeddedLearnerWorker
from qwen3_distill.training.segments import describe_segments, grow_segments, lendable
from qwen3_distill.training.settings import LearnerSettings
from tests.tiny_models import TinyModels
from tests.unit.training.test_learner import batch_of

CUDA = torch.device("cuda")
OTHERS = "max_split_size_mb:256,roundup_power2_divisions:[256:1,512:2,>:4]"


def settings_now() -> str:
    """By PyTorch where it tells (2.11 does not)."""
    return getattr(torch._C, "_accelerator_getAllocatorSettings", segments._settings)()


def set_to(settings: str) -> None:
    torch._C._accelerator_setAllocatorSettings(settings)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    before = settings_now()
    yield
    set_to(before)


@pytest.mark.parametrize(
    "growing", ["expandable_segments:True", f"{OTHERS},expandable_segments:True"]
)
def test_what_is_lent_is_not_in_growing_segments_and_other_settings_stay(growing: str) -> None:
    set_to(growing)
    with contextlib.suppress(torch.OutOfMemoryError), lendable():
        assert settings_now() == growing.replace("True", "False")
        assert describe_segments() == "fixed"
        raise torch.OutOfMemoryError
    assert settings_now() == growing
    assert describe_segments() == "growing"


@pytest.mark.parametrize("fixed", ["", OTHERS, "expandable_segments:False"])
def test_where_segments_are_fixed_nothing_is_set(
    fixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to(fixed)
    monkeypatch.setattr(segments, "_set", None)
    with lendable():
        assert settings_now() == fixed


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A CUDA device without memory; ``fails`` when it is asked for some."""
    state: dict[str, Any] = {"fails": None, "asked": 0}

    def empty(*_: Any, **options: Any) -> None:
        assert options["device"] == CUDA
        state["asked"] += 1
        if state["fails"]:
            raise state["fails"]

    monkeypatch.setattr(segments.torch, "empty", empty)
    monkeypatch.setattr(segments.torch.cuda, "empty_cache", lambda: None)
    return state


def test_segments_grow_from_now_on(device: dict[str, Any]) -> None:
    set_to(OTHERS)
    grow_segments(CUDA)
    assert settings_now() == f"{OTHERS},expandable_segments:True"
    assert device["asked"] == 1


def test_a_driver_without_such_memory_is_left_alone(device: dict[str, Any]) -> None:
    set_to(OTHERS)
    device["fails"] = RuntimeError("CUDA driver error: unknown error")
    grow_segments(CUDA)
    assert (settings_now(), device["asked"]) == (OTHERS, 1)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_environments_choice_stays(
    name: str, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:False")
    grow_segments(CUDA)
    assert (settings_now(), device["asked"]) == ("", 0)


def test_nothing_is_set_for_a_cpu(device: dict[str, Any]) -> None:
    grow_segments(torch.device("cpu"))
    assert (settings_now(), device["asked"]) == ("", 0)


def test_a_torch_that_does_not_tell_its_settings_has_those_of_the_environment(
    device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list[str]()
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", written.append)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", OTHERS)
    grow_segments(CUDA)
    assert describe_segments() == "growing"
    with lendable():
        assert describe_segments() == "fixed"
    on, off = (f"{OTHERS},expandable_segments:{choice}" for choice in (True, False))
    assert written == [on, off, on]


# --- Where it is used ---------------------------------------------------------------------------


def settings_of(models: TinyModels) -> LearnerSettings[EmbeddedTraining]:
    training = EmbeddedTraining(
        kind="embedded",
        device="cpu",
        tuning=LoraTuning(kind="lora", rank=4),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    return LearnerSettings(
        model_dir=models.student,
        training=training,
        objective=SampledReverseKL(kind="sampled_reverse_kl"),
        total_steps=9,
        seed=0,
    )


def test_merged_weights_are_made_in_memory_that_can_be_lent(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = build_embedded_learner(settings_of(tiny_models))
    asyncio.run(learner.update(batch_of(3)))
    published = learner.payload().tensors
    set_to("expandable_segments:True")
    made, empty = dict[int, str](), torch.empty

    def noting(*size: Any, **options: Any) -> Tensor:
        new = empty(*size, **options)
        made[new.untyped_storage().data_ptr()] = describe_segments()
        return new

    monkeypatch.setattr("qwen3_distill.training.lora.lends", lambda _: True)
    monkeypatch.setattr(torch, "empty", noting)
    again = learner.payload().tensors
    adapted = [name for name in again if name.endswith("_proj.weight")]
    assert adapted
    blocks = {again[name].untyped_storage().data_ptr() for name in adapted}
    assert {made[block] for block in blocks} == {"fixed"}
    assert describe_segments() == "growing"
    assert all(torch.equal(again[name], published[name]) for name in published)


def test_a_worker_loads_into_memory_that_can_be_lent_and_steps_in_memory_that_grows(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, grown = list[str](), list[torch.device]()

    def build(*arguments: Any, **options: Any) -> Any:
        loading.append(describe_segments())
        return build_embedded_learner(*arguments, **options)

    def grow(device: torch.device) -> None:
        grown.append(device)
        set_to("expandable_segments:True")

    monkeypatch.setattr(worker, "build_embedded_learner", build)
    monkeypatch.setattr(worker, "grow_segments", grow)
    served = EmbeddedLearnerWorker()
    for seed in range(2):  # opened again in the same process
        served.open(replace(settings_of(tiny_models), seed=seed))
    assert loading == ["fixed", "fixed"]
    assert grown == [torch.device("cpu")] * 2


# --- On a device --------------------------------------------------------------------------------


def grows(tensor: Tensor) -> bool:
    """Whether the device tells that a tensor lies in a growing segment."""
    address = tensor.data_ptr()
    return any(
        segment["is_expandable"]
        for segment in torch.cuda.memory_snapshot()
        if segment["address"] <= address < segment["address"] + segment["total_size"]
    )


@pytest.mark.gpu
def test_on_a_gpu_lent_memory_is_fixed_and_the_rest_grows() -> None:
    def new() -> Tensor:
        return torch.empty(64 << 20, dtype=torch.uint8, device="cuda")

    grow_segments(torch.device("cuda"))
    assert grows(new())  # it is free again, and of the size that is asked for next
    with lendable():
        lent = new()
        assert not grows(lent)
    assert grows(new())
    assert torch.equal(lent.fill_(7), torch.full_like(lent, 7))
