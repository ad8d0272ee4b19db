"""One SGLang server on loopback: its options, its start, its end and what its log says."""

import asyncio
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml

from qwen3_distill.config import SglangScoring
from qwen3_distill.environments.installed import engine_python
from qwen3_distill.errors import EngineStartError
from qwen3_distill.hosts.child import ChildProcess, engine_environment, how_to_install
from qwen3_distill.utils.concurrency import result_within
from qwen3_distill.utils.secrets import remember_secret

HOST = "127.0.0.1"
CPU_CACHE_TOKENS = 65536
"""Tokens of the key-value cache on a CPU, where no memory is planned: SGLang's default takes most
of the machine's memory."""
CONTEXT_MARGIN = 8
"""Tokens by which SGLang's longest input is shorter than its context length."""
_LOG_SEARCH_BYTES = 1 << 20
_UNKNOWN = re.compile(
    r"(unrecognized arguments: .*|cannot import name .* from 'sglang.*|No module named 'sglang\..*)"
)
"""How SGLang's log ends when it lacks an option, module or name that we use."""

MemoryFraction: TypeAlias = float | Callable[[], float] | None
"""Share of the free memory that a server takes at its start; None: SGLang's default. A function is
called at every start: at a restart the other engines already hold theirs."""
Options: TypeAlias = dict[str, bool | int | float | str]


class SglangServer:
    """A server process.

    Args:
        context_length: tokens of the longest sequence to score.
        max_total_tokens: tokens of the key-value cache; None: SGLang's default.
        log: file that takes the server's output; appended to, readable by this user only.
    """

    def __init__(
        self,
        config: SglangScoring,
        *,
        context_length: int,
        memory_fraction: MemoryFraction,
        max_total_tokens: int | None,
        log: Path,
    ) -> None:
        self._config = config
        self._context_length = context_length
        self._memory_fraction = memory_fraction
        self._planned_fraction: float | None = None
        self._max_total_tokens = max_total_tokens
        self._log = log
        self._log_start = 0
        self._process = ChildProcess("the SGLang server", log)
        self._folder: Path | None = None
        self._python = ""
        self.url = ""
        self.api_key = ""

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    @property
    def pid(self) -> int | None:
        """Leader of the process group that holds the server."""
        return self._process.pid

    @property
    def on_cpu(self) -> bool:
        device = self._config.device
        return device == "cpu" or (device == "auto" and not torch.cuda.is_available())

    async def start(self) -> None:
        """Start the process. It answers once it has loaded the model, or ends.

        Raises:
            EngineStartError: the port is taken, or the interpreter cannot be run.
            ConfigError: no interpreter is named and no environment of SGLang is installed.
        """
        self._python = engine_python("sglang", "scoring", self._config.python)
        await self.close()
        planned = self._memory_fraction
        self._planned_fraction = planned() if callable(planned) else planned
        port = self._config.port or _free_port()
        _check_free(port)
        self.url = f"http://{HOST}:{port}"
        self.api_key = secrets.token_hex(16)
        remember_secret(self.api_key)
        # The key is passed in a file: every user can read a command line. SGLang also writes its
        # settings, the key among them, into its log.
        self._folder = Path(tempfile.mkdtemp(prefix="qwen3-distill-"))  # mode 0700
        file = self._folder / "server.yaml"
        file.write_text(yaml.safe_dump(self._options(port)), encoding="utf-8")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch(mode=0o600)
        self._log_start = self._log.stat().st_size
        command = [self._python, "-m", "sglang.launch_server", "--config", str(file)]
        await self._process.start(command, engine_environment(self._variables()))

    async def wait(self) -> None:
        """Wait until the process has ended."""
        await self._process.wait()

    async def ends_within(self, seconds: float) -> bool:
        """Whether the process has ended, or ends within ``seconds``."""
        try:
            await result_within(seconds, self._process.wait())
        except asyncio.TimeoutError:
            return False
        return True

    def last_output(self) -> str:
        """The end of what it printed since its start, for an error message."""
        return self._process.last_output()

    async def close(self) -> None:
        """End it and everything it started. May be called more than once."""
        await self._process.end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def kill(self) -> None:
        """Send SIGKILL to the whole process group."""
        self._process.kill()

    def start_error(self) -> EngineStartError:
        """Return why a server ended before its first answer, as far as its log tells."""
        text = self._log_text()
        if "No module named 'sglang'" in text:
            return EngineStartError(
                f"SGLang is not installed for {self._python}: {how_to_install('sglang', 'scoring')}"
            )
        tail = self._process.last_output()
        if "out of memory" in text.lower() or "Not enough memory" in text:
            return EngineStartError(self._memory_message(text) + tail)
        if unknown := _UNKNOWN.findall(tail):
            return EngineStartError(self._unknown_message(unknown[-1]))
        return EngineStartError(f"the SGLang server did not start{tail}")

    def _unknown_message(self, what: str) -> str:
        """Name the option, module or name that SGLang lacks, and whose it is."""
        words = what.split()
        theirs = [name for name in self._config.server_arguments if f"--{name}" in words]
        if theirs:
            return (
                f"SGLang has no option {', '.join(theirs)} ({what}): see `python -m "
                "sglang.launch_server --help`, and change scoring.server_arguments"
            )
        return (
            f"the SGLang of {self._python} is a version that this does "
            f"not work with ({what}); use one of docs/engines/install.md"
        )

    def _memory_message(self, text: str) -> str:
        planned = (
            f"memory fraction {_or_default(self._planned_fraction)}, cache of "
            f"{_or_default(self._max_total_tokens)} tokens"
        )
        free = re.findall(r"(Load weight \w+)\.[^\n]*?avail mem=([\d.]+) GB", text)
        found = ", ".join(f"{memory} GB free at {what.lower()}" for what, memory in free)
        knob = (
            "raise scoring.memory_fraction: weights and cache do not fit into it"
            if "increase --mem-fraction-static" in text
            else "lower scoring.max_total_tokens, scoring.chunked_prefill_tokens or "
            "scoring.chunk_tokens, or leave more memory free for it"
        )
        return (
            f"the SGLang server ran out of memory. Planned: {planned}. Found: "
            f"{found or 'no figure in its log'}. To change: {knob}"
        )

    def _log_text(self) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(max(self._log_start, self._log.stat().st_size - _LOG_SEARCH_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _options(self, port: int) -> Options:
        """Return the entries of the configuration file of ``sglang.launch_server``."""
        config = self._config
        options: Options = {
            "model-path": config.model,
            "host": HOST,
            "port": port,
            "api-key": self.api_key,
            "device": "cuda" if not self.on_cpu else "cpu",
            "dtype": config.dtype,
            # SGLang reserves room for generated tokens; scoring generates none.
            "context-length": self._context_length + CONTEXT_MARGIN,
            "chunked-prefill-size": config.chunked_prefill_tokens,
            # Requests and replies hold token ids only.
            "skip-tokenizer-init": True,
            # `readiness` checks it with a real request.
            "skip-server-warmup": True,
            # Else the scheduler keeps a core busy while it waits for requests.
            "sleep-on-idle": True,
            "grammar-backend": "none",
            # Graphs cost memory and start time; only the teacher's own answers are decoded.
            "disable-decode-cuda-graph": not config.decode_graphs,
            "disable-prefill-cuda-graph": True,
            "enable-fp32-lm-head": config.float32_head,
            "log-level-http": "warning",
        }
        optional: dict[str, float | int | str | None] = {
            "quantization": config.quantization,
            "mem-fraction-static": self._planned_fraction,
            "max-total-tokens": self._max_total_tokens,
            "attention-backend": config.attention_backend,
        }
        options |= {name: value for name, value in optional.items() if value is not None}
        if self.on_cpu:
            # SGLang has no kernels of its own for every CPU; PyTorch's work on all.
            options = {
                "attention-backend": "torch_native",
                "sampling-backend": "pytorch",
                "mem-fraction-static": 0.2,
                "max-total-tokens": CPU_CACHE_TOKENS,
            } | options
        return options | config.server_arguments

    def _variables(self) -> dict[str, str]:
        variables = {
            # A health check that generates would wait behind a long prefill and fail.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            "SGLANG_HEALTH_CHECK_TIMEOUT": "120",
            "SGLANG_LOGPROB_CHUNK_SIZE": str(self._config.chunk_tokens),
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.on_cpu:
            variables["SGLANG_USE_CPU_ENGINE"] = "1"
        return variables | self._config.environment


async def unless_it_ends(server: SglangServer, work: Coroutine[Any, Any, None]) -> None:
    """Await ``work`` with a server that must not end meanwhile.

    Raises:
        EngineStartError: the server ended first.
    """
    ended = asyncio.ensure_future(server.wait())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise server.start_error()
        await working
    finally:
        for task in (working, ended):
            task.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise EngineStartError(
                f"port {port} is not available for the SGLang server ({error.strerror}); choose "
                "another scoring.port, or leave it out for a free one"
            ) from error


def _or_default(value: float | None) -> str:
    return "SGLang's default" if value is None else f"{value:g}"
