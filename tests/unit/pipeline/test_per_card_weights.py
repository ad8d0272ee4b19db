"""Where every rank has a rollout engine on its card, each pair has a weight channel of its own."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.pipeline.assembly.channel import build_channel
from qwen3_distill.pipeline.assembly.fleet import RunCluster, ignore
from qwen3_distill.ports import WeightChannel
from qwen3_distill.types import Rollout, RolloutRequest, WeightVersion
from qwen3_distill.weights.directory import DirectoryChannel
from qwen3_distill.weights.ipc import IpcChannel
from qwen3_distill.weights.per_card import PerCardChannel
from qwen3_distill.weights.store import StoreChannel
from tests.contract.adapters import build_group
from tests.contract.builders import run
from tests.pipeline.builders import tiny_config
from tests.tiny_models import TinyModels
from tests.unit.training.test_ranks import ragged_batch, settings_of

LORA = {"kind": "lora", "rank": 4}


def configured(
    models: TinyModels, folder: Path, changes: dict[str, Any] | None = None
) -> RunConfig:
    """Three ranks, two of which share their cards with a vLLM that takes whole weights."""
    values: dict[str, Any] = {
        "generation": {"kind": "vllm", "adapters": "merge"},
        "training.own_process": True,
        "training.tuning": LORA,
        "cluster": {
            "learner": {"ranks": 3},
            "rollouts": {"replicas": 2, "where": "with_learner"},
        },
    }
    return tiny_config(models, folder / "run", values | (changes or {}))


@pytest.mark.parametrize("asked", ["auto", "ipc"])
def test_engines_on_the_ranks_cards_take_weights_from_their_own_rank(
    tiny_models: TinyModels, tmp_path: Path, asked: str
) -> None:
    config = configured(tiny_models, tmp_path, {"generation.full_weights": asked})
    channel = build_channel(config, tmp_path / "weights")
    assert isinstance(channel, PerCardChannel)
    assert channel.num_cards == 2
    cards = [channel.of_card(card) for card in range(2)]
    assert all(isinstance(card, IpcChannel) for card in cards)
    assert len({str(vars(card)["_root"]) for card in cards}) == 2


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"generation.adapters": "swap"}, DirectoryChannel),
        ({"generation.full_weights": "directory"}, DirectoryChannel),
        ({"cluster.rollouts": {"replicas": 2}}, DirectoryChannel),
        (
            {"training.tuning": {"kind": "full"}, "pipeline": {"kind": "streaming"}},
            DirectoryChannel,
        ),
        (
            {"training.tuning": {"kind": "full"}, "cluster.learner": {"ranks": 3, "sharded": True}},
            DirectoryChannel,
        ),
        ({"cluster.address": "10.0.0.1:6379"}, StoreChannel),
        ({"cluster.rollouts": {"replicas": 1, "where": "with_learner"}}, IpcChannel),
    ],
)
def test_other_layouts_have_one_channel_for_all(
    tiny_models: TinyModels, tmp_path: Path, changes: dict[str, Any], kind: type
) -> None:
    channel = build_channel(configured(tiny_models, tmp_path, changes), tmp_path / "weights")
    assert type(channel) is kind


def test_every_rank_with_an_engine_publishes_the_same_version(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    group = build_group(settings_of(tiny_models), 3)
    run(group.start())
    run(group.update(ragged_batch()))
    channels = [DirectoryChannel(tmp_path / f"card-{card}") for card in range(3)]
    version = run(group.publish(PerCardChannel(channels[:2])))
    assert version == group.version
    first, second = (channel.fetch(version).tensors for channel in channels[:2])
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    with pytest.raises(WeightVersionError):
        channels[2].fetch(version)  # no engine is there
    run(group.close())


class _Notes:
    """A rollout engine that notes by which channel it was told to load. It samples nothing."""

    def __init__(self) -> None:
        self.loaded_by: list[WeightChannel] = []

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        self.loaded_by.append(channel)

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        raise AssertionError("nothing is sampled here")
        yield


def test_every_engine_loads_by_the_channel_of_its_card(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = configured(tiny_models, tmp_path, {"generation.python": "python3"})
    assert config.cluster is not None
    engines: list[Any] = []

    def build(member: RunConfig, make_host: Any, suffix: str) -> Any:
        engines.append(_Notes())
        return engines[-1]

    fleet = RunCluster(config, config.cluster, ignore).rollout_fleet(build)
    channel = PerCardChannel([DirectoryChannel(tmp_path / f"{card}") for card in range(2)])
    run(fleet.start())
    run(fleet.load(WeightVersion(step=0, digest="d"), channel))
    assert [engine.loaded_by for engine in engines] == [[channel.of_card(0)], [channel.of_card(1)]]
    run(fleet.close())


def test_a_card_that_needs_another_transport_is_heard(tmp_path: Path) -> None:
    class Switched(DirectoryChannel):
        def switched_transport(self, version: WeightVersion) -> bool:
            return True

    version = WeightVersion(step=0, digest="d")
    plain = DirectoryChannel(tmp_path)
    assert not PerCardChannel([plain, plain]).switched_transport(version)
    assert PerCardChannel([plain, Switched(tmp_path)]).switched_transport(version)
