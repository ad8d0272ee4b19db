"""A private CUDA MPS daemon, so that processes use a GPU concurrently and not in turns.

Kernels of different processes take turns on a GPU unless the processes are clients of an MPS
server; then they run concurrently. A control daemon starts the server for its first client. Which
daemon a process belongs to is decided by ``CUDA_MPS_PIPE_DIRECTORY`` when it first uses CUDA, so
another directory makes another, private one. No compute mode has to be set: exclusive mode only
keeps others from going past the daemon (https://docs.nvidia.com/deploy/mps/).

A client whose daemon cannot serve it fails instead of continuing without one. We therefore probe
the daemon with a throw-away client first, and give its address to the engines only if that worked.
"""

import asyncio
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qwen3_distill.errors import EngineStartError, MpsUnavailable
from qwen3_distill.hosts.child import ChildProcess
from qwen3_distill.utils.concurrency import result_within
from qwen3_distill.utils.variables import set_in_environment

CONTROL = "nvidia-cuda-mps-control"
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
PRIORITY_VARIABLE = "CUDA_MPS_CLIENT_PRIORITY"
BELOW_NORMAL = "1"
"""Value of `PRIORITY_VARIABLE`: this client's kernels start after those of the others (0)."""

_START_TIMEOUT_S = 20.0
_CLIENT_TIMEOUT_S = 60.0
_COMMAND_TIMEOUT_S = 10.0
_CLIENTS_GRACE_S = 5
_QUIT_TIMEOUT_S = 15.0

_CLIENT_SOURCE = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
context = ctypes.c_void_p()
for name, arguments in (
    ("cuInit", (0,)),
    ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), 0)),
):
    code = getattr(cuda, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        sys.exit(f"{name}: CUDA error {code}, {(text.value or b'unknown').decode()}")
"""
CLIENT = (sys.executable, "-c", _CLIENT_SOURCE)
"""Makes a context on the first GPU, without PyTorch and so within a second."""


@asynccontextmanager
async def private_mps(daemon: "MpsDaemon", warn: Callable[[str], None]) -> AsyncIterator[None]:
    """Processes started in this block share the GPU through a daemon that ends with the block.

    They inherit the daemon's variables, which are in this process's environment meanwhile. If the
    daemon does not start, ``warn`` is told why, and the block runs without it.
    """
    try:
        await daemon.start()
    except MpsUnavailable as error:
        warn(f"the run goes on without MPS: {error}")
    try:
        with set_in_environment(daemon.variables):
            yield
    finally:
        await daemon.stop()


class MpsDaemon:
    """A private control daemon and the server that it starts.

    The daemon runs in the foreground under the guard (`hosts.child`), so it and its server end
    with this process however this process ends.

    Args:
        log: takes the daemon's output; its own logs are in the folder next to it.
        client: a command that uses CUDA for a moment.
    """

    def __init__(self, log: Path, *, client: Sequence[str] = CLIENT) -> None:
        self._log = log
        self._client = client
        self._process = ChildProcess("MPS", log)
        self._pipes: Path | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The variables that make a process a client; empty before the start."""
        if self._pipes is None:
            return {}
        logs = self._log.parent / "mps"
        return {PIPE_VARIABLE: str(self._pipes), LOG_VARIABLE: str(logs.resolve())}

    async def start(self) -> None:
        """Start the daemon and see it serve a client.

        Raises:
            MpsUnavailable: it does not start or does not serve; nothing is left running.
        """
        program = shutil.which(CONTROL)
        if program is None:
            raise MpsUnavailable(f"{CONTROL} is not on the PATH (it comes with NVIDIA's driver)")
        try:
            # In a short path: the names of Unix sockets are limited to 107 bytes.
            self._pipes = self._process.scratch / "pipes"
            self._pipes.mkdir()
            Path(self.variables[LOG_VARIABLE]).mkdir(parents=True, exist_ok=True)
            await self._process.start([program, "-f"], self._daemon_environment())
            await self._until_it_answers()
            await self._serve_client()
        except (MpsUnavailable, EngineStartError, OSError) as error:
            await self.stop()
            raise MpsUnavailable(str(error)) from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End server and daemon; clients that still run lose the GPU within seconds.

        May be called more than once.
        """
        if self._process.is_running:
            with suppress(MpsUnavailable, OSError, asyncio.TimeoutError):
                await self._command(f"quit -t {_CLIENTS_GRACE_S}")
                await result_within(_QUIT_TIMEOUT_S, self._process.wait())
        await self._process.end()
        self._pipes = None

    def _daemon_environment(self) -> dict[str, str]:
        """All GPUs are visible to the daemon: a choice would renumber them for the clients."""
        environment = {**os.environ, **self.variables}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        return environment

    async def _until_it_answers(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            if not self._process.is_running:
                raise MpsUnavailable(f"the daemon ended at once{self._process.last_output()}")
            with suppress(MpsUnavailable):
                await self._command("get_server_list")
                return
            if time.monotonic() > deadline:
                raise MpsUnavailable(
                    f"the daemon does not answer after {_START_TIMEOUT_S:.0f} s"
                    f"{self._process.last_output()}"
                )
            await asyncio.sleep(0.1)

    async def _serve_client(self) -> None:
        environment = {**os.environ, **self.variables}
        code, output = await _run(self._client, environment, timeout_s=_CLIENT_TIMEOUT_S)
        if code:
            raise MpsUnavailable(f"a client of the daemon cannot use the GPU: {_last_line(output)}")
        servers = await self._command("get_server_list")
        if not servers:
            raise MpsUnavailable("a client used the GPU without the daemon")

    async def _command(self, command: str) -> str:
        """Return the daemon's answer to a command of its control program."""
        environment = {**os.environ, **self.variables}
        code, output = await _run(
            [CONTROL], environment, stdin=f"{command}\n", timeout_s=_COMMAND_TIMEOUT_S
        )
        if code:
            raise MpsUnavailable(f"`echo {command} | {CONTROL}` failed: {_last_line(output)}")
        return output


async def _run(
    command: Sequence[str], environment: Mapping[str, str], *, timeout_s: float, stdin: str = ""
) -> tuple[int, str]:
    """Exit status and output of a command that is killed when it takes too long.

    Raises:
        MpsUnavailable: it took too long.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(environment),
    )
    try:
        output, _ = await result_within(timeout_s, process.communicate(stdin.encode()))
    except asyncio.TimeoutError:
        raise MpsUnavailable(f"{command[0]} did not end within {timeout_s:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace").strip()


def _last_line(output: str) -> str:
    return output.splitlines()[-1] if output else "it printed nothing"
