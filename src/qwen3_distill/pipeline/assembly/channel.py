"""Builds the channel that carries weights from the learner to the rollout engine."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedTraining,
    GenerationConfig,
    RunConfig,
    TrainingConfig,
)
from qwen3_distill.config.cluster import WITH_LEARNER
from qwen3_distill.errors import ConfigError
from qwen3_distill.ports import WeightChannel
from qwen3_distill.weights.directory import DirectoryChannel
from qwen3_distill.weights.ipc import IpcChannel
from qwen3_distill.weights.memory import MemoryChannel
from qwen3_distill.weights.per_card import PerCardChannel
from qwen3_distill.weights.store import SharedFolderChannel, StoreChannel

_PREFIX = "qwen3-distill-weights-"


def samples_elsewhere(generation: GenerationConfig) -> bool:
    """Whether the rollout engine has a process of its own."""
    return not isinstance(generation, EmbeddedGeneration) or generation.own_process


def learns_elsewhere(training: TrainingConfig) -> bool:
    """Whether the learner has a process of its own."""
    return not isinstance(training, EmbeddedTraining) or training.own_process


def loads_beside_steps(config: RunConfig) -> bool:
    """Whether the engine can load a version while the learner takes a step.

    Each has a process of its own. The channel that a streaming run gets leaves what was published
    as it is meanwhile (`build_channel`).
    """
    return samples_elsewhere(config.generation) and learns_elsewhere(config.training)


def channel_folder(generation: GenerationConfig) -> Path | None:
    """Make a new folder in memory for a channel between processes; None within a process."""
    if not samples_elsewhere(generation):
        return None
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=shared_memory_dir()))


def run_channel_folder(config: RunConfig) -> Path | None:
    """Make the `channel_folder` of a run whose run folder this process holds.

    Its name follows from the run folder's. So it replaces what a killed process of the same run
    left: up to two versions of a model, in memory.
    """
    if not samples_elsewhere(config.generation):
        return None
    name = hashlib.sha256(str(config.output_path.resolve()).encode()).hexdigest()[:16]
    shared = None if config.cluster is None else config.cluster.weights_folder
    folder = (Path(shared) if shared else shared_memory_dir()) / f"{_PREFIX}{name}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except FileNotFoundError:
        raise ConfigError(
            f"cluster.weights_folder={shared} does not exist; give a folder that all nodes mount "
            "under the same path"
        ) from None
    except FileExistsError:  # another user's
        return channel_folder(config.generation)
    return folder


def shared_memory_dir() -> Path:
    """The directory whose files are held in memory; that of temporary files where there is none."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def build_channel(config: RunConfig, folder: Path | None) -> WeightChannel:
    """Build the channel between this run's learner and its engine.

    Args:
        folder: where the channel keeps its files; None: both are in this process.
    """
    generation, cluster = config.generation, config.cluster
    if folder is None:
        return MemoryChannel()
    if cluster is not None and cluster.weights_folder is not None:
        return SharedFolderChannel(folder)
    fleet = None if cluster is None else cluster.rollouts
    is_here = cluster is None or cluster.address is None  # the run's own Ray has this machine only
    if not is_here and fleet and (fleet.where != WITH_LEARNER or fleet.replicas > 1):
        return StoreChannel(folder)
    if isinstance(generation, EmbeddedGeneration) or (fleet and fleet.where != WITH_LEARNER):
        return DirectoryChannel(folder)
    # IPC hands out the very weights that are trained. An engine that is restarted while a step is
    # taken could not load the version that it served.
    trains_meanwhile = config.pipeline.kind == "streaming" and config.training.tuning.kind == "full"
    is_divided = bool(cluster and cluster.learner and cluster.learner.sharded)
    if generation.full_weights == "directory" or trains_meanwhile or is_divided:
        return DirectoryChannel(folder)
    strict = generation.full_weights == "ipc"
    if fleet is None or fleet.replicas == 1:
        return IpcChannel(folder, strict=strict)
    if generation.adapters == "swap" and config.training.tuning.kind == "lora":
        return DirectoryChannel(folder)  # one copy of small files serves all
    cards = range(fleet.replicas)
    return PerCardChannel([IpcChannel(folder / f"card-{i}", strict=strict) for i in cards])
