"""A weight channel within one process."""

from dataclasses import replace

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.ports import WeightPayload
from qwen3_distill.types import WeightVersion


class MemoryChannel:
    """Keeps a copy of the newest version; no file, no socket."""

    crosses_processes = False

    def __init__(self) -> None:
        self._held: tuple[WeightVersion, WeightPayload] | None = None

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        # A copy: the optimizer will write into the learner's own tensors.
        copy = {name: tensor.detach().clone() for name, tensor in payload.tensors.items()}
        self._held = (version, replace(payload, tensors=copy))

    def fetch(self, version: WeightVersion) -> WeightPayload:
        if self._held is None or self._held[0] != version:
            held = "nothing" if self._held is None else str(self._held[0])
            raise WeightVersionError(f"the channel holds {held}, not {version}; publish it first")
        return self._held[1]
