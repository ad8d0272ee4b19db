"""Starts Ray on this machine for one run and ends it: no process and no file of it stays."""

import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwen3_distill.errors import EngineStartError
from qwen3_distill.hosts.child import ChildProcess, engine_environment, short_temporary_dir

_START_TIMEOUT_S = 120.0
_LOOPBACK = "127.0.0.1"
_MODULE = "qwen3_distill.hosts.ray_head"


class OwnRay:
    """Ray's processes on this machine, under the guard.

    Args:
        interface: address that Ray listens on.
        settings: of ``ray.init``, e.g. ``num_gpus``; None values are left out.
        log: file that takes Ray's output.
    """

    def __init__(self, *, interface: str, settings: dict[str, Any], log: Path) -> None:
        self._interface = interface
        self._settings = {key: value for key, value in settings.items() if value is not None}
        # The paths of Ray's sockets are below it, and with it take nearly all of the 107 bytes.
        short = short_temporary_dir(len("/tmp"))
        self._folder = Path(tempfile.mkdtemp(prefix="q3d-ray-", dir=short))
        self.scratch = Path(tempfile.mkdtemp(prefix="q3d-ray-", dir=_memory_dir()))
        """Folder of the nodes' files, in memory."""
        self._process = ChildProcess("Ray", log, remove=(self._folder, self.scratch))
        self._token = self._folder / "token"

    def variables(self) -> dict[str, str]:
        """Variables that Ray's processes and the ones that connect to them need."""
        found = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # by default 15, which every engine would inherit
        }
        if self._interface == _LOOPBACK:
            # Ray replaces the loopback by an outside address unless it may not form a cluster.
            found["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        return found

    async def start(self) -> str:
        """Start Ray; return its address.

        Raises:
            EngineStartError: it does not start.
        """
        self._token.touch(mode=0o600)
        self._token.write_text(secrets.token_hex(32))
        file = self._folder / "address"
        settings = {
            **self._settings,
            "include_dashboard": False,
            "log_to_driver": False,
            "_node_ip_address": self._interface,
            "_temp_dir": str(self._folder / "ray"),
        }
        command = [sys.executable, "-m", _MODULE, str(file), json.dumps(settings)]
        await self._process.start(command, engine_environment(self.variables()))
        for _ in range(round(_START_TIMEOUT_S / 0.1)):
            if file.exists():
                return file.read_text()
            if not self._process.is_running:
                break
            await asyncio.sleep(0.1)
        raise EngineStartError(f"Ray does not start{self._process.last_output()}")

    async def close(self) -> None:
        """End Ray and remove its files. May be called more than once."""
        await self._process.end()
        for folder in (self._folder, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)


def _memory_dir() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
