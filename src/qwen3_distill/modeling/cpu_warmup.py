"""Readies the CPU's vector math before several threads use it."""

import functools

import torch

SERIAL_ELEMENTS = 1024
"""Size of the tensors. PyTorch splits no tensor below 2,048 elements between threads."""

_FUNCTIONS = (
    *(torch.cos, torch.sin, torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt),
    *(torch.rsqrt, torch.tanh, torch.erf, torch.sigmoid, torch.nn.functional.silu),
)


@functools.cache
def settle_vector_math() -> None:
    """Compute every vector function once in one thread; only a process's first call does so.

    The math library chooses the code of a function at its first call. When two threads made that
    call at once, the second one's rows of the rotary embedding differed in the last bits: in about
    1 of 100 starts a run had other numbers than its repetition. With one serial call before, it
    was 0 of 2,000 starts (benchmarks/results/repeatable.json). Takes less than 10 ms; neither the
    number of threads nor the random state changes.
    """
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            values = torch.linspace(0.1, 20.0, SERIAL_ELEMENTS, device="cpu").to(dtype)
            for function in _FUNCTIONS:
                function(values)
            torch.pow(values, 2)
            torch.pow(2.0, values)
            torch.logaddexp(values, values)
            for reduction in (torch.softmax, torch.log_softmax, torch.logsumexp):
                reduction(values[None], dim=-1)
