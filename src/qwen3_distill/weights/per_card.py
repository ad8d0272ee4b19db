"""Whole weights from every rank of a group to the rollout engine on the rank's own card.

All ranks hold the same weights, so none has to send them to another card: each publishes by a
channel of its card, and the replica there loads by it.
"""

from collections.abc import Sequence
from pathlib import Path

from qwen3_distill.ports import Reach, WeightChannel, WeightPayload
from qwen3_distill.types import WeightVersion


class PerCardChannel:
    """A `WeightChannel` per card, the learner's and the replica's index on it; may be pickled.

    As a whole it is the channel of the first card.

    Args:
        channels: by card; at least one.
    """

    reach: Reach = "machine"

    def __init__(self, channels: Sequence[WeightChannel]) -> None:
        self._channels = tuple(channels)

    @property
    def num_cards(self) -> int:
        """Cards with a replica."""
        return len(self._channels)

    def of_card(self, index: int) -> WeightChannel:
        return self._channels[index]

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        self._channels[0].publish(version, payload)

    def fetch(self, version: WeightVersion) -> WeightPayload:
        return self._channels[0].fetch(version)

    def adapter_directory(self, version: WeightVersion, folder: Path) -> Path:
        return self._channels[0].adapter_directory(version, folder)

    def switched_transport(self, version: WeightVersion) -> bool:
        """Whether the replica of any card could not use the transport."""
        return any(channel.switched_transport(version) for channel in self._channels)
