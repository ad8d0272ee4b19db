"""How an engine is opened in a worker that runs: all that differs between engines of one job."""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_distill.errors import EngineStartError
from qwen3_distill.hosts.host import Host


class Opening:
    """Calls the worker's ``open``. An engine with more to say about its start refines this class.

    Args:
        arguments: of ``open``.
        timeout_s: how long ``open`` may take.
    """

    def __init__(self, *arguments: Any, timeout_s: float) -> None:
        self._arguments: Sequence[Any] = arguments
        self._timeout_s = timeout_s

    def environment(self) -> Mapping[str, str]:
        """Variables of the worker, asked for before each of its starts."""
        return {}

    async def open(self, host: Host) -> Any:
        """Open the engine in the worker, which runs, and return what ``open`` returns.

        Raises:
            EngineStartError: the engine does not start.
        """
        return await host.call_without_heartbeat(
            "open", *self._arguments, timeout_s=self._timeout_s
        )

    def explained(self, error: EngineStartError, host: Host) -> EngineStartError:
        """Return the error of a failed start with its cause, where more is known."""
        return error
