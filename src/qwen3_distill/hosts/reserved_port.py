"""Reserves free TCP ports for servers that other processes open."""

import socket


class ReservedPort:
    """Keeps a free port from other programs until a server has bound it, and as long as it runs.

    A port that was only looked up may be given to another program before the server binds it, a
    minute later perhaps. Here a socket stays bound to it and never listens: the kernel gives the
    port to nobody else, and a server that sets SO_REUSEADDR can bind it all the same. SGLang's,
    vLLM's and PyTorch's servers do.

    Args:
        host: an address of this machine.

    Raises:
        OSError: the machine has no such address, or no free port.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.socket()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, 0))
        except OSError:
            self._socket.close()
            raise
        self.host = host
        self.port = int(self._socket.getsockname()[1])

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"

    def release(self) -> None:
        """Give the port back. May be called more than once."""
        self._socket.close()
