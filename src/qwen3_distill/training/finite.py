"""Checks that weights are finite before they are published or saved; says what NaN may be of."""

import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qwen3_distill.errors import NonFiniteError

_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


def remedy(usual: str) -> str:
    """Return what to change where a loss or a gradient is not a number.

    A learner that MPS gave 75% of an H200's multiprocessors had such losses and gradients from the
    first step on (h200_mps_share, h200_mps_share_as_loaded), whatever the optimizer's settings.
    """
    share = os.environ.get(_SHARE)
    if share in (None, "", "100"):  # all of them
        return usual
    return (
        f"{_SHARE}={share} is set for the learner, and with 75 on an H200 nothing was a number: "
        f"remove it from training.environment or the shell's variables. If this stays: {usual}"
    )


class FiniteCheck:
    """Looks at tensors as they pass and remembers, on their device, which are not finite.

    One kernel per tensor, without a temporary of its size and without waiting for the device: a
    tensor's largest magnitude is NaN or infinite exactly if one of its elements is.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._largest: list[Tensor] = []

    def passing(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same names and tensors; each is looked at on its way."""
        for name, tensor in named:
            if tensor.is_floating_point() and tensor.numel():
                self._names.append(name)
                values = tensor.detach()
                if values.element_size() == 1:  # FP8 has no norm of its own
                    values = values.float()
                self._largest.append(torch.linalg.vector_norm(values, ord=torch.inf))
            yield name, tensor

    def not_finite(self) -> list[str]:
        """Read the flags from the device; return the names of the tensors that are not finite."""
        if not self._largest:
            return []
        first = self._largest[0].device
        flags = torch.stack([value.to(first, torch.float32) for value in self._largest])
        finite = flags.isfinite().tolist()
        return [name for name, is_finite in zip(self._names, finite, strict=True) if not is_finite]

    def require(self) -> None:
        """Read the flags.

        Raises:
            NonFiniteError: names tensors that are not finite.
        """
        names = self.not_finite()
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise NonFiniteError(f"weights are not finite ({', '.join(names[:3])}{more})")
