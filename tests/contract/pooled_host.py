"""A host that shares its worker with others: `pool.WorkerPool` tells them apart."""

import atexit
import itertools
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from qwen3_distill.hosts.host import Host, MakeHost, WorkerSpec
from tests.contract.builders import run

_NUMBERS = itertools.count()


class SharedHosts:
    """Hosts of pools by name, started when they are first asked for and ended with the session."""

    def __init__(self) -> None:
        self._hosts: dict[str, Host] = {}

    async def get(self, make_host: MakeHost, spec: WorkerSpec) -> Host:
        if spec.name not in self._hosts:
            if not self._hosts:
                atexit.register(self._end)
            host = make_host(spec)
            await host.start()
            self._hosts[spec.name] = host
        return self._hosts[spec.name]

    def _end(self) -> None:
        for host in self._hosts.values():
            host.kill()
            run(host.close())


SHARED = SharedHosts()


class PooledHost:
    """A `Host` whose worker is one of a pool's."""

    def __init__(self, name: str, make_host: MakeHost, pool: WorkerSpec) -> None:
        self._name = name
        self._make_host = make_host
        self._pool = pool
        self._number = next(_NUMBERS)
        self._shared: Host | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def is_running(self) -> bool:
        return self._shared is not None and self._shared.is_running

    async def start(self, environment: Mapping[str, str] | None = None) -> None:
        """``environment`` is the pool's own, set when it was started."""
        self._shared = await SHARED.get(self._make_host, self._pool)

    async def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        assert self._shared is not None
        return await self._shared.call(
            "call", self._number, method, *arguments, timeout_s=timeout_s
        )

    async def call_without_heartbeat(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        assert self._shared is not None
        return await self._shared.call_without_heartbeat(
            "call", self._number, method, *arguments, timeout_s=timeout_s
        )

    def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        raise NotImplementedError("a pool has no streams")

    async def close(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None and shared.is_running:
            await shared.call("drop", self._number)

    def kill(self) -> None:
        raise NotImplementedError("it would kill the others too")

    def output(self) -> str:
        return "" if self._shared is None else self._shared.output()

    def last_output(self) -> str:
        return "" if self._shared is None else self._shared.last_output()
