"""Lets PyPI's torchvision be imported beside a CPU build of PyTorch.

Python runs this file at every start of the environment's interpreter. SGLang and unsloth import
torchvision, whose wheel on PyPI is built for CUDA: its compiled part cannot be loaded here, and
then registering fakes for two operators that the part would have declared fails. So they are
declared, without an implementation, just before torchvision is imported. Nothing in this project
calls them.
"""

import importlib.abc
import sys
from typing import Any


class _DeclareTorchvisionOperators(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._library: Any = None
        """The declarations last as long as this object."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Declare on the first import of torchvision; the import itself is left to others."""
        if fullname != "torchvision" or self._library is not None:
            return
        import torch  # noqa: PLC0415 - never at the interpreter's start

        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        self._library = torch.library.Library("torchvision", "DEF")
        self._library.define(f"nms{boxes}")
        self._library.define(f"qnms{boxes}")


sys.meta_path.insert(0, _DeclareTorchvisionOperators())
