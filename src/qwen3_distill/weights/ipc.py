"""Whole weights from one process to another on the same GPU, without a copy through the host.

What is published is a file of CUDA IPC handles; the tensors stay the learner's. In full tuning they
are the very weights that it trains, so an engine must have loaded a version before the next step is
taken: the sequential pipeline awaits each load, and the streaming one, which does not, uses files
(`assembly.channel`). Merged weights are made anew for each version.
"""

import inspect
import io
import pickle
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing  # registers how tensors are sent
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.ports import FullWeights, Reach, WeightPayload
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.adapter_files import version_name
from qwen3_distill.weights.directory import DirectoryChannel

_HANDLES = "handles.pickle"
_PARAMETERS = inspect.signature(rebuild_cuda_tensor)
_NO_COUNTER = b"/qwen3-distill-counts-no-readers"


class _Lending(ForkingPickler):
    """Pickles CUDA tensors as handles that any number of processes may open, or none.

    PyTorch counts one reader of a handle from the start and keeps the memory until that one is
    done: for ever if there is none, and for ever if there are two, as its counter then passes zero.
    Here it counts none. The memory is the publisher's to keep for as long as it is read.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        rebuild, values = reduce_tensor(obj)
        found = _PARAMETERS.bind(*values)
        counter = (found.arguments["ref_counter_handle"], found.arguments["ref_counter_offset"])
        torch.UntypedStorage._release_ipc_counter_cuda(*counter)
        # A reader who is done finds no such file, and counts nothing.
        found.arguments["ref_counter_handle"] = _NO_COUNTER
        return rebuild, found.args


class IpcChannel:
    """CUDA IPC where it works, files elsewhere; may be pickled.

    The channel finds out by using it: a receiver that cannot open the handles writes a note next to
    them, and from then on the channel sends files (`switched_transport`). The first push, which
    comes before the first rollout and is compared bit for bit, is thereby the probe.

    The object that published last holds the tensors that other processes may be reading: keep it
    until the next version is published. Its pickle does not contain them. A version's memory is
    free again as soon as the next one is published, also if nobody has fetched it, as a replica
    that starts again does not. Who still reads it then must find out: vLLM's worker computes the
    digest when it has read all.

    Args:
        root: directory for handles, notes and files.
        strict: never tell the publisher that files would do: a version whose handles cannot be
            opened is an error.
    """

    reach: Reach = "machine"

    def __init__(self, root: Path, *, strict: bool = False) -> None:
        self._root = root
        self._strict = strict
        self._files = DirectoryChannel(root)
        self._lent: Mapping[str, Tensor] = {}
        """The newest version's tensors, which other processes may be reading."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lent": {}}

    @property
    def failed(self) -> bool:
        """Whether handles could not be made, or not be opened by a receiver."""
        return self._note.exists()

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        on_gpu = all(tensor.is_cuda for tensor in payload.tensors.values())
        if self.failed or not on_gpu or not isinstance(payload, FullWeights):
            self._publish_files(version, payload)
            return
        tensors = {name: tensor.detach() for name, tensor in payload.tensors.items()}
        torch.cuda.synchronize()  # handles do not wait for work that is still queued
        buffer = io.BytesIO()
        try:
            _Lending(buffer).dump((version, tensors))
        except RuntimeError as error:  # e.g. expandable segments in an unprivileged container
            self._give_up(version, str(error))
            self._publish_files(version, payload)
            return
        self._root.mkdir(parents=True, exist_ok=True)
        unfinished = self._handles.with_suffix(".unfinished")
        unfinished.write_bytes(buffer.getvalue())
        unfinished.replace(self._handles)
        self._lent = tensors

    def fetch(self, version: WeightVersion) -> WeightPayload:
        handles = self._read_handles()
        if handles is None:
            return self._files.fetch(version)
        try:
            held, tensors = pickle.loads(handles)
        except RuntimeError as error:
            if self._read_handles() != handles:
                raise WeightVersionError(
                    f"{version} was replaced while it was fetched; load the newest version"
                ) from error
            self._give_up(version, str(error))
            raise WeightVersionError(f"{version}: CUDA IPC does not work here: {error}") from error
        if held != version:
            raise WeightVersionError(f"the channel holds {held}, not {version}; publish it first")
        return FullWeights(tensors=tensors)

    def adapter_directory(self, version: WeightVersion, folder: Path) -> Path:
        """Adapters are always sent as files."""
        return self._files.adapter_directory(version, folder)

    def switched_transport(self, version: WeightVersion) -> bool:
        if self._strict or not (self.failed and self._handles.exists()):
            return False
        return self._note.read_text().partition("\n")[0] == version_name(version)

    def _publish_files(self, version: WeightVersion, payload: WeightPayload) -> None:
        self._handles.unlink(missing_ok=True)
        self._lent = {}
        self._files.publish(version, payload)

    def _read_handles(self) -> bytes | None:
        """Return the newest version's handles; None: it was published as files."""
        try:
            return self._handles.read_bytes()
        except FileNotFoundError:
            return None

    @property
    def _handles(self) -> Path:
        return self._root / _HANDLES

    @property
    def _note(self) -> Path:
        return self._root / "ipc-failed"

    def _give_up(self, version: WeightVersion, reason: str) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self._note.write_text(f"{version_name(version)}\n{reason}\n")
