"""From a config to the channel of its weights."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedTraining,
    RunConfig,
)
from qwen3_distill.ports import (
    WeightChannel,
)
from qwen3_distill.weights.directory import DirectoryChannel
from qwen3_distill.weights.ipc import IpcChannel
from qwen3_distill.weights.memory import MemoryChannel

_WEIGHTS = "qwen3-distill-weights-"


def samples_elsewhere(config: RunConfig) -> bool:
    """Whether the rollout engine is in a process of its own."""
    generation = config.generation
    return not isinstance(generation, EmbeddedGeneration) or generation.own_process


def learns_elsewhere(config: RunConfig) -> bool:
    """Whether the learner is in a process of its own."""
    training = config.training
    return not isinstance(training, EmbeddedTraining) or training.own_process


def channel_folder(config: RunConfig) -> Path | None:
    """A new folder in memory for weights that go from process to process; None if none do."""
    return (
        Path(tempfile.mkdtemp(prefix=_WEIGHTS, dir=_memory()))
        if samples_elsewhere(config)
        else None
    )


def run_channel_folder(config: RunConfig) -> Path | None:
    """`channel_folder` of a run, which holds its run folder: what it left when it was killed goes.

    Two versions of a model may lie there, in memory.
    """
    if not samples_elsewhere(config):
        return None
    name = hashlib.sha256(str(config.output_path.resolve()).encode()).hexdigest()[:16]
    folder = _memory() / f"{_WEIGHTS}{name}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # another user's
        return channel_folder(config)
    return folder


def _memory() -> Path:
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def build_channel(config: RunConfig, folder: Path | None) -> WeightChannel:
    """How weights travel between this run's learner and its engine."""
    generation = config.generation
    if folder is None:
        return MemoryChannel()
    if generation.kind == "embedded":
        return DirectoryChannel(folder)
    # The handles of IPC are of the very weights that are trained. While a step is taken, an engine
    # that is started again could not get the version that it served.
    trained_beside = config.pipeline.kind == "streaming" and config.training.tuning.kind == "full"
    if generation.full_weights == "directory" or trained_beside:
        return DirectoryChannel(folder)
    return IpcChannel(folder)
