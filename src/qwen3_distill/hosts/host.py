"""The port of hosts: where an engine runs. What the engine computes is no concern of a host.

A host runs one worker: an object in another process whose methods are called from here.
`process.LocalProcess` runs it on this machine. A host on another machine implements the same port
and is given to an engine as its ``make_host``.
"""

import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """A worker: what is run, and how it is watched."""

    name: str
    """Names the worker in errors."""
    module: str
    """Calls `serve_worker` when it is run with ``-m``."""
    log: Path
    """File that takes the worker's output; appended to."""
    python: str = sys.executable
    """Interpreter of the worker's own environment."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set for the worker, in addition to those of this process."""
    hang_timeout_s: float | None = None
    """A worker whose event loop does not answer for this long is killed, and counts as lost like
    one that died; None: no limit. Longer than the longest method that blocks the loop."""
    start_timeout_s: float = 120.0
    """Until the worker connects, which is after its module's imports."""
    remove: tuple[Path, ...] = ()
    """Folders that are removed should this process die without ending the worker."""


class Host(Protocol):
    """Runs one worker. It may be started again after `close`."""

    @property
    def name(self) -> str:
        """Names the worker in errors."""
        ...

    @property
    def is_running(self) -> bool:
        """Whether the worker is connected and is not known to be lost. Engines that use a worker
        learn of a loss from `call`."""
        ...

    async def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the worker and connect to it.

        Args:
            environment: further variables, for this start.

        Raises:
            EngineStartError: the worker ended before it connected, or did not connect in time; the
                message has its last output.
        """
        ...

    async def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Call a method of the worker's object and return its result.

        Raises:
            EngineLost: the worker died before it answered, or hung, or did not answer within
                ``timeout_s`` and was killed.
            EngineError: the method raised.
        """
        ...

    async def call_without_heartbeat(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a method that may block the worker for up to ``timeout_s``: no hang is noticed.

        For an engine's start, which has a limit of its own.
        """
        ...

    def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Call an asynchronous generator of the worker's object and yield its values.

        When the stream is left early, the generator is cancelled in the worker too.
        """
        ...

    async def close(self) -> None:
        """End the worker and everything it started. May be called more than once."""
        ...

    def kill(self) -> None:
        """Kill the worker and everything it started, without waiting.

        For tests and benchmarks that strike a worker; engines use `close`.
        """
        ...

    def output(self) -> str:
        """The worker's output since its start, or the end of it."""
        ...

    def last_output(self) -> str:
        """The end of the output, in words that follow an error message."""
        ...


MakeHost: TypeAlias = Callable[[WorkerSpec], Host]
"""Makes the host of a worker. An engine takes one as an argument, so that it need not know where
it runs."""
