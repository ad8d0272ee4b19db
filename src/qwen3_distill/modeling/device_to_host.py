"""Copies tensors from a device to host memory, several at a time."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

_AT_A_TIME = 4
"""Copies under way: of most of the time the host makes room for new pages, a thread at a time."""


def to_host(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return host tensors by name; those that are on the host already are returned as they are.

    The iterable may make each tensor when it is asked for it. Few of them exist at a time then.
    """
    copies: dict[str, Future[Tensor]] = {}
    under_way: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        for name, tensor in named:
            if len(under_way) == _AT_A_TIME:
                under_way.popleft().result()
            copies[name] = threads.submit(tensor.detach().cpu)
            under_way.append(copies[name])
    return {name: copy.result() for name, copy in copies.items()}
