"""A weight channel through files, and weight versions that come from a model directory."""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.errors import EngineError, WeightVersionError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.ports import FullWeights, LoraWeights, Reach, WeightChannel, WeightPayload
from qwen3_distill.types import WeightVersion
from qwen3_distill.utils.files import sync
from qwen3_distill.weights.adapter_files import (
    has_adapter,
    keep_newest,
    load_adapter,
    save_adapter,
    version_name,
)

_FILE_BYTES = 1 << 30
_MOST_FILES = 8
"""Files of a version at most, and threads that write them: most of the work is the system's own,
which makes room for new pages."""


class DirectoryChannel:
    """Versions as directories under ``root``: adapters in peft's layout, whole weights in files
    that are written concurrently.

    A version is written under another name, synced and renamed: it exists whole or not at all. The
    newest two are kept, so that an engine may still read the one it serves. On a memory file system
    (``/dev/shm``) nothing touches a disk. May be pickled: its state is its path.
    """

    reach: Reach = "machine"

    def __init__(self, root: Path) -> None:
        self._root = root

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        try:
            self._write(version, payload)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"{version} cannot be written to {self._root}: {error}; make room there (the "
                "/dev/shm of a container is as large as its --shm-size)"
            ) from error

    def fetch(self, version: WeightVersion) -> WeightPayload:
        directory = self._locate(version)
        try:
            if has_adapter(directory):
                return load_adapter(directory)
            tensors: dict[str, Tensor] = {}
            for file in sorted(directory.glob("*.safetensors")):
                tensors |= load_file(file)
            if not tensors:
                raise ValueError(f"there are no weights in {directory}")
            return FullWeights(tensors=tensors)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise WeightVersionError(
                f"the channel {self._root} does not hold {version}; publish it first ({error})"
            ) from error

    def adapter_directory(self, version: WeightVersion, folder: Path) -> Path:
        """The channel's own directory of ``version``; nothing is copied."""
        directory = self._locate(version)
        if not has_adapter(directory):
            raise WeightVersionError(f"the channel {self._root} has no adapters of {version}")
        return directory

    def switched_transport(self, version: WeightVersion) -> bool:
        return False

    def _locate(self, version: WeightVersion) -> Path:
        """The directory of a version, whether it exists or not."""
        return self._root / version_name(version)

    def _write(self, version: WeightVersion, payload: WeightPayload) -> None:
        final = self._locate(version)
        temporary = self._root / f".unfinished-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if isinstance(payload, LoraWeights):
            save_adapter(payload, temporary)
        else:
            _save_full(payload.tensors, temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(self._root)
        keep_newest(self._root, 2)


def _save_full(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors into files of about equal size, each by a thread of its own."""
    wanted = -(-sum(tensor.nbytes for tensor in tensors.values()) // _FILE_BYTES)
    parts: list[dict[str, Tensor]] = [{} for _ in range(max(1, min(wanted, _MOST_FILES)))]
    sizes = [0] * len(parts)
    for name in sorted(tensors, key=lambda name: -tensors[name].nbytes):
        smallest = sizes.index(min(sizes))
        parts[smallest][name] = tensors[name]
        sizes[smallest] += tensors[name].nbytes

    def save(number: int) -> None:
        on_host = {n: tensor.detach().contiguous().cpu() for n, tensor in parts[number].items()}
        save_file(on_host, directory / f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors")

    with ThreadPoolExecutor(len(parts)) as threads:
        for done in [threads.submit(save, number) for number in range(len(parts))]:
            done.result()


def publish_directory(
    model_dir: str | Path, channel: WeightChannel, *, dtype: torch.dtype
) -> WeightVersion:
    """Publish the weights of a Hugging Face directory as step 0."""
    model = load_model(model_dir, device=torch.device("cpu"), dtype=dtype)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    version = WeightVersion(step=0, digest=weights_digest(weights))
    channel.publish(version, FullWeights(tensors=weights))
    return version


def published_digest(model_dir: str | Path, *, dtype: torch.dtype) -> str:
    """Return the digest under which `publish_directory` would publish a directory's weights."""
    model = load_model(model_dir, device=torch.device("cpu"), dtype=dtype)
    return weights_digest(dict(model.named_parameters()))
