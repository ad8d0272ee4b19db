"""Whole weights from one process to another on the same GPU, without a copy through the host.

What is published is a file of CUDA IPC handles; the tensors stay the learner's. They are the very
weights that it trains, so an engine must have loaded a version before the next step is taken: the
pipeline awaits each load.
"""

import io
import pickle
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.multiprocessing  # registers how tensors are sent
from torch import Tensor

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.ports import FullWeights, WeightPayload
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.directory import DirectoryChannel

_HANDLES = "handles.pickle"
_held: dict[Path, Mapping[str, Tensor]] = {}
"""What other processes may be reading, by channel. The newest version only."""


class IpcChannel:
    """CUDA IPC where it works, files where it does not; may be pickled.

    Whether it works is found out by using it: a receiver that cannot open the handles notes that
    beside them, and from then on the channel sends files. The first push, which comes before the
    first rollout and is compared bit for bit, is thereby the probe (see `failed`).

    Args:
        root: directory for handles, notes and files.
    """

    crosses_processes = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = DirectoryChannel(root)

    @property
    def failed(self) -> bool:
        """Whether a receiver could not open the handles."""
        return self._note.exists()

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        on_gpu = all(tensor.is_cuda for tensor in payload.tensors.values())
        if self.failed or not on_gpu or not isinstance(payload, FullWeights):
            self._handles.unlink(missing_ok=True)
            self._files.publish(version, payload)
            return
        tensors = {name: tensor.detach() for name, tensor in payload.tensors.items()}
        torch.cuda.synchronize()  # handles say nothing of work that is still queued
        buffer = io.BytesIO()
        try:
            ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump((version, tensors))
        except RuntimeError as error:  # e.g. expandable segments in an unprivileged container
            self._give_up(str(error))
            self._files.publish(version, payload)
            return
        self._root.mkdir(parents=True, exist_ok=True)
        unfinished = self._handles.with_suffix(".unfinished")
        unfinished.write_bytes(buffer.getvalue())
        unfinished.replace(self._handles)
        _held[self._root] = tensors

    def fetch(self, version: WeightVersion) -> WeightPayload:
        if not self._handles.exists():
            return self._files.fetch(version)
        try:
            held, tensors = pickle.loads(self._handles.read_bytes())
        except RuntimeError as error:
            self._give_up(str(error))
            raise WeightVersionError(f"{version}: CUDA IPC does not work here: {error}") from error
        if held != version:
            raise WeightVersionError(f"the channel holds {held}, not {version}; publish it first")
        return FullWeights(tensors=tensors)

    def locate(self, version: WeightVersion) -> Path:
        """The directory of a version that was sent as files, as adapters always are."""
        return self._files.locate(version)

    @property
    def _handles(self) -> Path:
        return self._root / _HANDLES

    @property
    def _note(self) -> Path:
        return self._root / "ipc-failed"

    def _give_up(self, reason: str) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self._note.write_text(reason + "\n")
