"""Ranks that divide weights, gradients and moments take the steps of one learner that holds all."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qwen3_distill.config import EmbeddedTraining, FullTuning
from qwen3_distill.errors import CheckpointError, EngineError, LearnerLost, NonFiniteError
from qwen3_distill.hosts.host import Host, MakeHost, WorkerSpec
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training.embedded import student as student_module
from qwen3_distill.training.embedded.hosted import hosted_embedded_learner
from qwen3_distill.training.embedded.student import EmbeddedLearner, build_embedded_learner
from qwen3_distill.training.group import GroupLearner
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.weights.directory import DirectoryChannel
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.adapters import build_group
from tests.contract.builders import run
from tests.contract.pooled_host import PooledHost
from tests.contract.sharded_pool_worker import dtype_of
from tests.tiny_models import TinyModels
from tests.unit.training.test_ranks import LENGTHS, SMOOTH, ragged_batch, scored
from tests.unit.training.test_ranks import settings_of as settings_of_ranks

Settings = LearnerSettings[EmbeddedTraining]
EXACT = 1e-6
"""Relative tolerance of loss and norm, which are read in float32."""


def settings_of(models: TinyModels, **training: Any) -> Settings:
    """Full tuning in float64, so that only a wrong formula makes a difference."""
    settings = settings_of_ranks(models, tuning=FullTuning(kind="full"))
    changed = settings.training.model_copy(update={"dtype": "float64"} | training)
    return replace(settings, training=changed)


@pytest.fixture(autouse=True)
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student_module, "resolve_dtype", dtype_of)


def alone(settings: Settings) -> EmbeddedLearner:
    training = settings.training.model_copy(update={"own_process": False})
    return build_embedded_learner(replace(settings, training=training))


@contextmanager
def sharded(settings: Settings, count: int, log: Path) -> Iterator[GroupLearner]:
    """A started group; one at a time."""

    def pooled(rank: int) -> MakeHost:
        def make(spec: WorkerSpec) -> Host:
            module = "tests.contract.sharded_pool_worker"
            pool = replace(spec, name=f"sharded rank {rank} pool", module=module)
            return PooledHost(spec.name, LocalProcess, pool)

        return make

    ranks = [
        hosted_embedded_learner(settings, log=log / f"sharded-{rank}.log", make_host=pooled(rank))
        for rank in range(count)
    ]
    group = GroupLearner(ranks, timeout_s=60.0, sharded=True)
    run(group.start())
    try:
        yield group
    finally:
        run(group.close())


def published(learner: GroupLearner | EmbeddedLearner, folder: Path) -> dict[str, Tensor]:
    channel = DirectoryChannel(folder)
    version = run(learner.publish(channel))
    tensors = dict(channel.fetch(version).tensors)
    assert weights_digest(tensors) == version.digest
    return tensors


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=tolerance, atol=tolerance)


# --- Steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "training"),
    [
        (2, {}),
        (2, {"gradient_checkpointing": True}),
        # A norm that is never reached: the step has another length, which SMOOTH's eps lets show.
        (2, {"optimizer": SMOOTH.model_copy(update={"max_grad_norm": 1e6})}),
        (3, {}),  # 32 and 64 rows do not divide by three
    ],
    ids=["clipped", "recomputed", "unclipped", "uneven_rows"],
)
def test_ranks_take_the_step_that_one_learner_takes(
    tiny_models: TinyModels, tmp_path: Path, count: int, training: dict[str, Any]
) -> None:
    settings = settings_of(tiny_models, **training)
    one = alone(settings)
    with sharded(settings, count, tmp_path) as group:
        assert group.version == one.version
        for rollouts in (7, 2, 1, 7):  # uneven numbers of micro-batches, and ranks with none
            batch = ragged_batch(rollouts)
            expected, found = run(one.update(batch)), run(group.update(batch))
            assert found.num_loss_tokens == expected.num_loss_tokens
            assert found.loss == pytest.approx(expected.loss, rel=EXACT)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=EXACT)
        assert (expected.grad_norm > settings.training.optimizer.max_grad_norm) == (
            "optimizer" not in training
        )
        assert_same(published(one, tmp_path / "1"), published(group, tmp_path / "2"), 1e-9)


def test_ranks_replay_by_priority_what_one_learner_replays(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    settings = settings_of(tiny_models)
    one = alone(settings)
    with sharded(settings, 2, tmp_path) as group:
        for learner in (one, group):
            run(learner.admit([scored(i, *LENGTHS[i]) for i in range(7)]))
        for _ in range(3):
            expected, found = run(one.update_replayed(4)), run(group.update_replayed(4))
            assert found.num_loss_tokens == expected.num_loss_tokens
            assert found.loss == pytest.approx(expected.loss, rel=EXACT)
        assert_same(published(one, tmp_path / "1"), published(group, tmp_path / "2"), 1e-9)


def test_bfloat16_autocast_computes_what_ranks_with_whole_weights_compute(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Layers are gathered in bfloat16; the residual stream and the norms stay in float32."""
    settings = settings_of(tiny_models, dtype="float32", autocast="bfloat16")
    whole = build_group(settings, 2)
    run(whole.start())
    with sharded(settings, 2, tmp_path) as group:
        batch = ragged_batch()
        expected, found = run(whole.update(batch)), run(group.update(batch))
        assert found.loss == expected.loss
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=EXACT)
        assert_same(published(whole, tmp_path / "1"), published(group, tmp_path / "2"), 1e-6)
    run(whole.close())


@pytest.mark.parametrize("reward", [3e38, 1e22], ids=["infinite_loss", "infinite_norm_only"])
def test_a_step_that_is_not_finite_is_refused_by_all_ranks_and_the_next_one_taken(
    tiny_models: TinyModels, tmp_path: Path, reward: float
) -> None:
    settings = settings_of(tiny_models, dtype="float32")
    one, batch = alone(settings), ragged_batch()
    poisoned = replace(batch, task_advantages=np.full(len(batch.scored), reward, dtype=np.float32))
    with sharded(settings, 2, tmp_path) as group:
        before = group.version
        with pytest.raises(NonFiniteError, match="the optimizer was not stepped"):
            run(group.update(poisoned))
        assert group.version == before
        expected, found = run(one.update(batch)), run(group.update(batch))
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_weights_that_a_step_spoils_are_never_used(tiny_models: TinyModels, tmp_path: Path) -> None:
    optimizer = SMOOTH.model_copy(update={"weight_decay": 1e308})
    state = tmp_path / "state"
    state.mkdir()
    with sharded(settings_of(tiny_models, optimizer=optimizer), 2, tmp_path) as group:
        for use in (
            lambda: group.update(ragged_batch()),
            lambda: group.publish(DirectoryChannel(tmp_path / "published")),
            lambda: group.save_state(state),
            lambda: group.save_student(tmp_path / "student"),
        ):
            with pytest.raises(NonFiniteError, match="step 0: weights are not finite"):
                run(use())
    assert not any(state.iterdir())


# --- Weights that leave the learner ---------------------------------------------------------------


def test_what_is_published_and_saved_is_whole(tiny_models: TinyModels, tmp_path: Path) -> None:
    settings = settings_of(tiny_models, dtype="float32")
    with sharded(settings, 2, tmp_path) as group:
        run(group.update(ragged_batch()))
        weights = published(group, tmp_path / "published")
        memory = MemoryChannel()  # the controller's own: weights pass through it
        assert weights_digest(memory_weights(group, memory)) == group.version.digest
        run(group.save_student(tmp_path / "student"))
        loaded = load_model(tmp_path / "student", device=torch.device("cpu"), dtype=torch.float32)
        assert_same(weights, dict(loaded.named_parameters()), 0.0)


def memory_weights(group: GroupLearner, channel: MemoryChannel) -> dict[str, Tensor]:
    return dict(channel.fetch(run(group.publish(channel))).tensors)


def test_a_channel_that_cannot_be_written_is_an_error_and_the_group_goes_on(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with sharded(settings_of(tiny_models), 2, tmp_path) as group:
        with pytest.raises(EngineError, match="cannot be written"):
            run(group.publish(DirectoryChannel(tmp_path / "file")))
        run(group.update(ragged_batch()))
        published(group, tmp_path / "published")


# --- Checkpoints ----------------------------------------------------------------------------------


def trained_state(settings: Settings, count: int, tmp_path: Path) -> Any:
    """Save a sharded group between two steps; return its versions at and after the save."""
    folder = tmp_path / f"state-{count}"
    folder.mkdir()
    with sharded(settings, count, tmp_path) as group:
        run(group.admit([scored(i, *LENGTHS[i]) for i in range(7)]))
        run(group.update_replayed(4))
        run(group.save_state(folder))
        saved = group.version
        return folder, saved, run(group.update_replayed(4))


def test_a_state_is_continued_bit_for_bit_by_as_many_ranks(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    settings = settings_of(tiny_models)
    folder, saved, following = trained_state(settings, 2, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "optimizer-00001-of-00002.pt",
        "optimizer-00002-of-00002.pt",
        "replay.safetensors",
        "weights-00001-of-00002.safetensors",
        "weights-00002-of-00002.safetensors",
    ]
    with sharded(settings, 2, tmp_path) as group:
        run(group.load_state(folder, saved))
        assert group.version == saved
        assert run(group.update_replayed(4)).version == following.version


def test_each_rank_saves_its_rows_and_the_first_what_all_hold(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder, _, _ = trained_state(settings_of(tiny_models), 2, tmp_path)
    first, second = (shapes_in(folder / f"weights-0000{i}-of-00002.safetensors") for i in (1, 2))
    moments = torch.load(folder / "optimizer-00002-of-00002.pt", weights_only=True)["state"]
    assert "model.embed_tokens.weight" in first
    assert all("proj.weight" in name for name in second)
    assert second["model.layers.0.mlp.up_proj.weight"] == [32, 32]  # of 64 rows
    assert len(moments) == len(second) == 14


def shapes_in(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_ranks_continues_a_state(
    tiny_models: TinyModels, tmp_path: Path, count: int
) -> None:
    settings = settings_of(tiny_models)
    folder, saved, following = trained_state(settings, 2, tmp_path)
    if count == 1:
        one = alone(settings)
        run(one.load_state(folder, saved))
        found = run(one.update_replayed(4))
    else:
        with sharded(settings, count, tmp_path) as group:
            run(group.load_state(folder, saved))
            found = run(group.update_replayed(4))
    assert found.loss == pytest.approx(following.loss, rel=EXACT)
    assert found.grad_norm == pytest.approx(following.grad_norm, rel=EXACT)


def test_ranks_continue_the_state_of_one_learner(tiny_models: TinyModels, tmp_path: Path) -> None:
    settings = settings_of(tiny_models)
    one = alone(settings)
    run(one.update(ragged_batch()))
    run(one.save_state(tmp_path))
    with sharded(settings, 2, tmp_path) as group:
        run(group.load_state(tmp_path, one.version))
        assert group.version == one.version
        run(one.update(ragged_batch(3)))
        run(group.update(ragged_batch(3)))
        assert_same(published(one, tmp_path / "1"), published(group, tmp_path / "2"), 1e-9)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights-00002-of-00002.safetensors", "cannot be read"),
        ("optimizer-00002-of-00002.pt", "cannot be read"),
        ("weights-00001-of-00002.safetensors", "cannot be read"),
    ],
)
def test_a_state_without_a_ranks_file_is_refused(
    tiny_models: TinyModels, tmp_path: Path, name: str, words: str
) -> None:
    settings = settings_of(tiny_models)
    folder, saved, _ = trained_state(settings, 2, tmp_path)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=words):
        run(alone(settings).load_state(folder, saved))


def test_a_state_of_two_groups_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    settings = settings_of(tiny_models)
    folder, saved, _ = trained_state(settings, 2, tmp_path)
    (folder / "weights-00001-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"groups of \[2, 3\] ranks"):
        run(alone(settings).load_state(folder, saved))


# --- Faults ---------------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_group_and_the_state_goes_on(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    settings = settings_of(tiny_models, dtype="float32")
    ranks = [hosted_embedded_learner(settings, log=tmp_path / f"{i}.log") for i in range(2)]
    group = GroupLearner(ranks, timeout_s=60.0, sharded=True)
    run(group.start())
    run(group.update(ragged_batch()))
    run(group.save_state(tmp_path))
    saved = group.version
    following = run(group.update(ragged_batch())).version
    ranks[1].host.kill()
    with pytest.raises(LearnerLost, match="rank 1 of 2 failed, and the group was ended with it"):
        run(group.publish(DirectoryChannel(tmp_path / "published")))
    assert not any(rank.host.is_running for rank in ranks)
    run(group.start())
    run(group.load_state(tmp_path, saved))
    assert run(group.update(ragged_batch())).version == following
    run(group.close())
