"""A weight channel within one process."""

from dataclasses import replace
from pathlib import Path

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.ports import Reach, WeightPayload
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.adapter_files import write_adapter


class MemoryChannel:
    """Keeps a copy of the newest version; no file, no socket."""

    reach: Reach = "process"

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

    def adapter_directory(self, version: WeightVersion, folder: Path) -> Path:
        return write_adapter(version, self.fetch(version), folder)

    def switched_transport(self, version: WeightVersion) -> bool:
        return False
