"""A weight channel within one process."""

from collections.abc import Mapping

from torch import Tensor

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.types import WeightVersion


class MemoryChannel:
    """Keeps a copy of the newest version; no file, no socket."""

    def __init__(self) -> None:
        self._held: tuple[WeightVersion, Mapping[str, Tensor]] | None = None

    def publish(self, version: WeightVersion, weights: Mapping[str, Tensor]) -> None:
        # A copy: the optimizer will write into the learner's own tensors.
        copy = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self._held = (version, copy)

    def fetch(self, version: WeightVersion) -> Mapping[str, Tensor]:
        if self._held is None or self._held[0] != version:
            held = "nothing" if self._held is None else str(self._held[0])
            raise WeightVersionError(f"the channel holds {held}, not {version}; publish it first")
        return self._held[1]
