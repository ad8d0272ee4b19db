"""Reserves free TCP ports for servers that other processes open."""

import socket

from qwen3_distill.errors import EngineStartError


class ReservedPort:
    """Keeps a free port from programs that ask for any free one, until it is closed.

    A port that was only looked up may be given to another program before the server binds it, a
    minute later perhaps. Here a socket stays bound to it and never listens: the kernel gives the
    port to nobody else, and a server that sets SO_REUSEADDR can bind it all the same. SGLang's,
    vLLM's and PyTorch's servers do.

    Args:
        host: an address of this machine.

    Raises:
        EngineStartError: the machine has no such address, or no free port.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.socket()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, 0))
        except OSError as error:
            self._socket.close()
            raise EngineStartError(
                f"no port can be had at {host}, which should be an address of this machine: "
                f"{error.strerror}"
            ) from None
        self.host = host
        self.port = int(self._socket.getsockname()[1])

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"

    def close(self) -> None:
        """Give the port back. May be called more than once."""
        self._socket.close()
