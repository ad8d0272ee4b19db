"""The embedded teacher that follows the student: which weights it has, and that it names them."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.config import MovingAverage, RefreshedEvery
from qwen3_distill.errors import CheckpointError, WeightVersionError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.ports import LoraWeights
from qwen3_distill.scoring.cache import CachedTeacher
from qwen3_distill.scoring.embedded.following import STATE_FILE, FollowingEmbeddedTeacher
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.types import SampledRequest, TeacherScore, WeightVersion
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.builders import directory_weights, jobs_of, published, synthetic_rollout
from tests.tiny_models import TinyModels

EVERY_2 = RefreshedEvery(kind="every", steps=2)
EVERY_1 = RefreshedEvery(kind="every", steps=1)
AVERAGE = MovingAverage(kind="ema", decay=0.9)
JOBS = jobs_of([synthetic_rollout(4, 6, seed) for seed in range(3)])


def following(
    models: TinyModels, refresh: RefreshedEvery | MovingAverage, dtype: str = "float32"
) -> FollowingEmbeddedTeacher:
    return FollowingEmbeddedTeacher(frozen(models.student, dtype), refresh)


def frozen(directory: Path, dtype: str = "float32") -> EmbeddedTeacher:
    return EmbeddedTeacher(
        directory,
        request=SampledRequest(),
        device="cpu",
        dtype=dtype,
        batch_tokens=4096,
        chunk_tokens=64,
    )


def student_at(models: TinyModels, step: int) -> dict[str, Tensor]:
    """Weights of a student that moved."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: tensor + 0.05 * step * torch.randn(tensor.shape, generator=generator)
        for name, tensor in directory_weights(models.student).items()
    }


def follow(
    teacher: FollowingEmbeddedTeacher, models: TinyModels, *steps: int
) -> FollowingEmbeddedTeacher:
    for step in steps:
        asyncio.run(teacher.follow(*published(student_at(models, step), step)))
    return teacher


def scores(teacher: Any) -> list[TeacherScore]:
    found = asyncio.run(teacher.score(JOBS))
    assert all(isinstance(score, TeacherScore) for score in found)
    return found


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# --- Which weights ------------------------------------------------------------------------------


def test_the_teacher_begins_as_the_student(tiny_models: TinyModels) -> None:
    teacher = following(tiny_models, EVERY_2)
    assert teacher.teacher_id == teacher.initial_teacher_id
    assert teacher.teacher_id == frozen(tiny_models.student).teacher_id
    follow(teacher, tiny_models)
    asyncio.run(teacher.follow(*published(student_at(tiny_models, 0), 0)))
    assert same(teacher.inner.weights, directory_weights(tiny_models.student))


def test_every_two_steps_the_teacher_becomes_the_student(tiny_models: TinyModels) -> None:
    teacher = following(tiny_models, EVERY_2)
    for step in range(1, 6):
        follow(teacher, tiny_models, step)
        assert same(teacher.inner.weights, student_at(tiny_models, step - step % 2)), step


def test_an_average_is_the_formulas(tiny_models: TinyModels) -> None:
    teacher = follow(following(tiny_models, AVERAGE), tiny_models, 1, 2, 3)
    expected = {n: t.double() for n, t in directory_weights(tiny_models.student).items()}
    for step in (1, 2, 3):
        student = student_at(tiny_models, step)
        expected = {n: 0.9 * t + 0.1 * student[n].double() for n, t in expected.items()}
    for name, tensor in teacher.inner.weights.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)


def test_an_average_below_bfloat16s_steps_is_not_rounded_away(tiny_models: TinyModels) -> None:
    slow = MovingAverage(kind="ema", decay=0.999)
    teacher = following(tiny_models, slow, "bfloat16")
    start = directory_weights(tiny_models.student)
    student = {name: tensor + 0.2 for name, tensor in start.items()}
    for step in range(1, 201):
        asyncio.run(teacher.follow(*published(student, step)))
    moved = 0.2 * (1 - 0.999**200)
    for name, tensor in teacher.inner.weights.items():
        assert tensor.dtype == torch.bfloat16
        # Half a step of bfloat16 at the start, where it is rounded, and at the end.
        torch.testing.assert_close(tensor.float(), start[name] + moved, rtol=2**-7, atol=2e-3)


def test_every_score_names_the_weights_it_comes_from(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    teacher = following(tiny_models, EVERY_1)
    before = scores(teacher)
    follow(teacher, tiny_models, 1)
    after = scores(teacher)
    digest = weights_digest(student_at(tiny_models, 1))
    assert {score.teacher_id for score in after} == {f"student#{digest}@float32"}
    assert {score.teacher_id for score in before} == {teacher.initial_teacher_id}
    assert not np.array_equal(before[0].logprobs, after[0].logprobs)


def test_a_cache_serves_no_score_of_other_weights(tiny_models: TinyModels, tmp_path: Path) -> None:
    teacher = following(tiny_models, EVERY_1)
    cached = CachedTeacher(teacher, SampledRequest(), tmp_path)

    async def both() -> tuple[list[Any], list[Any], list[Any]]:
        await cached.start()
        first = await cached.score(JOBS)
        await teacher.follow(*published(student_at(tiny_models, 1), 1))
        second, direct = await cached.score(JOBS), await teacher.score(JOBS)
        await cached.close()
        return first, second, direct

    first, second, direct = asyncio.run(both())
    for old, new, expected in zip(first, second, direct, strict=True):
        assert np.array_equal(new.logprobs, expected.logprobs)
        assert not np.array_equal(new.logprobs, old.logprobs)
        assert new.teacher_id == expected.teacher_id != old.teacher_id
    assert cached.counters["score/cache_hits"] == 0


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [EVERY_2, AVERAGE], ids=["every", "ema"])
def test_a_step_counts_once_and_none_is_left_out(
    tiny_models: TinyModels, refresh: RefreshedEvery | MovingAverage
) -> None:
    teacher = follow(following(tiny_models, refresh), tiny_models, 1, 2)
    named = teacher.teacher_id
    follow(teacher, tiny_models, 2)
    assert teacher.teacher_id == named
    with pytest.raises(WeightVersionError, match=r"to step 2 .*expected step 3"):
        follow(teacher, tiny_models, 4)
    with pytest.raises(WeightVersionError, match=r"to step 2 .*expected step 3"):
        follow(teacher, tiny_models, 1)


def test_weights_that_are_not_the_version_are_refused(tiny_models: TinyModels) -> None:
    teacher = following(tiny_models, EVERY_1)
    before = {name: tensor.clone() for name, tensor in teacher.inner.weights.items()}
    version, channel = published(student_at(tiny_models, 1), 1)
    held: Any = channel
    held._held[1].tensors["model.norm.weight"][0] += 1
    with pytest.raises(WeightVersionError, match="digests differ"):
        asyncio.run(teacher.follow(version, channel))
    other = student_at(tiny_models, 1)
    del other["model.norm.weight"]
    with pytest.raises(WeightVersionError, match="other parameters"):
        asyncio.run(teacher.follow(*published(other, 1)))
    adapters = LoraWeights(tensors={}, rank=1, alpha=1.0, target_modules=("q_proj",))
    alone = MemoryChannel()
    alone.publish(version, adapters)
    with pytest.raises(WeightVersionError, match="published as adapters"):
        asyncio.run(teacher.follow(version, alone))
    assert same(teacher.inner.weights, before)
    assert teacher.teacher_id == teacher.initial_teacher_id


# --- State --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("refresh", [EVERY_2, AVERAGE], ids=["every", "ema"])
def test_a_restored_teacher_goes_on_bit_for_bit(
    tiny_models: TinyModels,
    tmp_path: Path,
    refresh: RefreshedEvery | MovingAverage,
    dtype: str,
) -> None:
    teacher = follow(following(tiny_models, refresh, dtype), tiny_models, 1, 2, 3)
    asyncio.run(teacher.save_state(tmp_path))
    restored = following(tiny_models, refresh, dtype)
    asyncio.run(restored.load_state(tmp_path, WeightVersion(step=3, digest="")))
    assert restored.teacher_id == teacher.teacher_id != teacher.initial_teacher_id
    for each in (teacher, restored):
        follow(each, tiny_models, 3, 4, 5)
    assert restored.teacher_id == teacher.teacher_id
    assert same(restored.inner.weights, teacher.inner.weights)


def test_a_reset_teacher_is_the_one_of_the_start(tiny_models: TinyModels) -> None:
    teacher = follow(following(tiny_models, AVERAGE), tiny_models, 1, 2)
    asyncio.run(teacher.reset())
    assert teacher.teacher_id == teacher.initial_teacher_id
    again = follow(following(tiny_models, AVERAGE), tiny_models, 1)
    assert follow(teacher, tiny_models, 1).teacher_id == again.teacher_id


def test_a_state_of_another_step_or_teacher_is_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    teacher = follow(following(tiny_models, AVERAGE), tiny_models, 1)
    asyncio.run(teacher.save_state(tmp_path))

    def load(step: int) -> None:
        asyncio.run(teacher.load_state(tmp_path, WeightVersion(step=step, digest="")))

    with pytest.raises(CheckpointError, match="teacher of step 1, its cursor says 2"):
        load(2)
    tensors = load_file(tmp_path / STATE_FILE)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / STATE_FILE, metadata={"student_step": "1"})
    with pytest.raises(CheckpointError, match="other parameters"):
        load(1)
    (tmp_path / STATE_FILE).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(1)
    (tmp_path / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(1)
