"""A stand-in for SGLang's compiled kernels, for tests on a CPU.

SGLang imports `sgl_kernel` wherever it runs, and there is no build of it for CPUs on PyPI. On a
CPU without AMX its own code computes with PyTorch and calls one function of the package, which is
written out below. Everything else exists so that SGLang can be imported, and raises when it is
called: nothing is ever computed wrongly in silence.

Not for CPUs with AMX, where SGLang would call more of it, and never beside the real package.
"""

import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.4.10"

# What SGLang imports from. `scalar_type` is not here: its absence is caught, and a substitute used.
_SUBMODULES = (
    "allreduce",
    "attention",
    "cutlass_moe",
    "elementwise",
    "flash_attn",
    "flash_mla",
    "gemm",
    "kvcacheio",
    "mamba",
    "memory",
    "moe",
    "quantization",
    "sampling",
    "sparse_flash_attn",
    "spatial",
    "speculative",
    "top_k",
    "utils",
)


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Note where each request's new tokens lie in the cache: rows of ``req_to_token``, in place."""
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(f"{name} needs SGLang's compiled kernels; this is a stand-in")

    return refuse


class _Submodule(types.ModuleType):
    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        return _attribute(self.__name__, name)


def _attribute(module: str, name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _refusal(f"{module}.{name}")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    return _attribute(__name__, name)


for _name in _SUBMODULES:
    sys.modules[f"{__name__}.{_name}"] = _Submodule(f"{__name__}.{_name}")
