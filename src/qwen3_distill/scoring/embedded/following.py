"""The embedded teacher that follows the student: a copy every some steps, or an average."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3_distill.config import MovingAverage, RefreshedEvery
from qwen3_distill.errors import CheckpointError, WeightVersionError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.ports import FullWeights, WeightChannel
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.wrapper import TeacherWrapper
from qwen3_distill.types import WeightVersion

STATE_FILE = "teacher.safetensors"
"""File of a checkpoint that holds the teacher's weights."""
_STEP = "student_step"


class FollowingEmbeddedTeacher(TeacherWrapper[EmbeddedTeacher]):
    """A `FollowingTeacher` on PyTorch.

    The weights of an `EmbeddedTeacher` are changed in place, between two forward passes, so that
    every score names the weights that it comes from. An average is kept in float32, whatever the
    teacher computes in: in bfloat16 a step of 1 - decay would be rounded away.

    Args:
        teacher: built from the student's directory.
        refresh: when the weights change, and how.
    """

    def __init__(self, teacher: EmbeddedTeacher, refresh: RefreshedEvery | MovingAverage) -> None:
        super().__init__(teacher)
        self.initial_teacher_id = teacher.teacher_id
        self._refresh = refresh
        self._step = 0
        """The student's step that was followed last."""
        self._average = self._new_average()

    def _new_average(self) -> dict[str, Tensor]:
        """The average's tensors: those in use where they are float32; empty without an average."""
        if not isinstance(self._refresh, MovingAverage):
            return {}
        return {name: tensor.float() for name, tensor in self.inner.weights.items()}

    @property
    def output_head(self) -> Tensor:
        """[V, D], changed in place with the other weights."""
        return self.inner.output_head

    async def follow(self, version: WeightVersion, channel: WeightChannel) -> None:
        if version.step == self._step:
            return
        if version.step != self._step + 1:
            raise WeightVersionError(
                f"the teacher followed the student to step {self._step} and got {version}, "
                f"expected step {self._step + 1}: the weights of every step"
            )
        refresh = self._refresh
        if isinstance(refresh, MovingAverage) or version.step % refresh.steps == 0:
            self._take(_published(version, channel, self.inner.weights))
        self._step = version.step

    @torch.no_grad()
    def _take(self, student: Mapping[str, Tensor]) -> None:
        refresh = self._refresh
        for name, tensor in self.inner.weights.items():
            new = student[name].to(tensor.device)
            if isinstance(refresh, MovingAverage):
                average = self._average[name]
                average.lerp_(new.float(), 1 - refresh.decay)
                new = average
            if new.data_ptr() != tensor.data_ptr():
                tensor.copy_(new)
        self.inner.weights_changed()

    async def reset(self) -> None:
        if self._step == 0:
            return
        self._put(self.inner.stored_weights())
        self._average = self._new_average()
        self._step = 0

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self.inner.weights.items():
            tensor.copy_(weights[name])
        self.inner.weights_changed()

    async def save_state(self, directory: Path) -> None:
        held = self._average or self.inner.weights
        tensors = {name: tensor.contiguous() for name, tensor in held.items()}
        save_file(tensors, directory / STATE_FILE, metadata={_STEP: str(self._step)})

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        file, expected = directory / STATE_FILE, self._average or self.inner.weights
        try:
            with safe_open(file, "pt") as opened:
                step = (opened.metadata() or {}).get(_STEP)
                saved = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
        if step != str(version.step):
            raise CheckpointError(
                f"{file}: holds the teacher of step {step}, its cursor says {version.step}"
            )
        if _kinds(saved) != _kinds(expected):
            raise CheckpointError(f"{file}: holds other parameters than this run's teacher has")
        self._put(saved)
        if self._average:
            self._average = self._new_average()
            for name, average in self._average.items():
                average.copy_(saved[name])
        self._step = version.step


def _published(
    version: WeightVersion, channel: WeightChannel, own: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return a version's weights: whole, with the version's digest, and of the teacher's names."""
    payload = channel.fetch(version)
    if not isinstance(payload, FullWeights):
        raise WeightVersionError(f"{version} was published as adapters; publish whole weights")
    if weights_digest(payload.tensors) != version.digest:
        raise WeightVersionError(f"the channel's weights are not {version}: digests differ")
    shapes = {name: tensor.shape for name, tensor in payload.tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in own.items()}:
        raise WeightVersionError(f"{version} has other parameters than the teacher")
    return payload.tensors


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
