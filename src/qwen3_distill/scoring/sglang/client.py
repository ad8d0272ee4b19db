"""An HTTP client for one or several SGLang servers; requests are balanced by tokens in flight."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from qwen3_distill.errors import EngineError
from qwen3_distill.scoring.sglang.wire import Fault, FaultKind

_CONNECT_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 3.0
"""Shorter than the server's 5 s, so that no request uses a connection that it is closing."""
_REST_S = 2.0
"""How long other servers are preferred to one that failed."""
BACKOFF_S = 0.5
"""Pause before the first retry; every further one is twice as long."""
BACKOFF_MAX_S = 8.0


class Unanswered(Exception):
    """A request got no answer; it may be sent again."""

    def __init__(self, kind: FaultKind, detail: str) -> None:
        super().__init__(detail)
        self.fault = Fault(kind, detail)


class Refused(Exception):
    """The server refused a request; sending it again changes nothing."""


@dataclass(eq=False)
class ServerConnection:
    """One server and its load: requests and tokens in flight."""

    url: str
    requests: int = 0
    tokens: int = 0
    rests_until: float = 0.0


class SglangClient:
    """Sends requests to the server with the fewest tokens in flight.

    Args:
        max_in_flight: requests in flight per server; further ones wait here.
    """

    def __init__(
        self, urls: Sequence[str], *, api_key: str | None, max_in_flight: int, timeout_s: float
    ) -> None:
        self.connections = [ServerConnection(url.rstrip("/")) for url in urls]
        self._max_in_flight = max_in_flight
        self._changed = asyncio.Condition()
        self._http = httpx.AsyncClient(
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            },
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=False,  # a proxy of the environment is not meant for these
        )

    async def post(
        self,
        body: bytes,
        *,
        tokens: int,
        timeout_s: float | None = None,
        connection: ServerConnection | None = None,
    ) -> bytes:
        """Return a server's reply to a ``/generate`` request.

        Args:
            tokens: of the request; servers are balanced by it.
            timeout_s: seconds to wait for the reply; None: the client's default.
            connection: the server to ask; None: the least busy one.

        Raises:
            Unanswered: no answer; a later attempt may succeed.
            Refused: the server rejects the request itself.
            EngineError: the key is wrong.
        """
        chosen = await self._take(tokens, connection)
        try:
            reply = await self._post(chosen, body, timeout_s)
        except Unanswered:
            chosen.rests_until = asyncio.get_running_loop().time() + _REST_S
            raise
        finally:
            await self._give_back(chosen, tokens)
        return reply

    async def close(self) -> None:
        await self._http.aclose()

    async def _take(self, tokens: int, connection: ServerConnection | None) -> ServerConnection:
        async with self._changed:
            while connection is None:
                connection = self._least_busy()
                if connection is None:
                    await self._changed.wait()
            connection.requests += 1
            connection.tokens += tokens
            return connection

    def _least_busy(self) -> ServerConnection | None:
        now = asyncio.get_running_loop().time()
        free = [each for each in self.connections if each.requests < self._max_in_flight]
        return min(free, key=lambda each: (each.rests_until > now, each.tokens), default=None)

    async def _give_back(self, connection: ServerConnection, tokens: int) -> None:
        async with self._changed:
            connection.requests -= 1
            connection.tokens -= tokens
            self._changed.notify()

    async def _post(
        self, connection: ServerConnection, body: bytes, timeout_s: float | None
    ) -> bytes:
        address = f"{connection.url}/generate"
        timeout = (
            httpx.USE_CLIENT_DEFAULT
            if timeout_s is None
            else httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None)
        )
        try:
            response = await self._http.post(address, content=body, timeout=timeout)
        except httpx.TimeoutException as error:
            raise Unanswered(
                FaultKind.TIMEOUT, f"{connection.url}: no answer in time ({type(error).__name__})"
            ) from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            detail = str(error) or type(error).__name__
            raise Unanswered(FaultKind.CONNECTION, f"{connection.url}: {detail}") from error
        except RuntimeError as error:
            if not self._http.is_closed:
                raise
            raise Unanswered(FaultKind.CONNECTION, f"{connection.url}: closed from here") from error
        if response.status_code == httpx.codes.OK:
            return response.content
        detail = f"{connection.url}: status {response.status_code}: {response.text[:300]}"
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise EngineError(
                f"{detail}; the server wants another key: set scoring.api_key_file to a file "
                "that holds it"
            )
        if response.is_client_error and response.status_code != httpx.codes.TOO_MANY_REQUESTS:
            raise Refused(detail)
        raise Unanswered(FaultKind.STATUS, detail)


def backoff_s(attempt: int) -> float:
    """Pause before a retry; ``attempt`` is the number of attempts so far."""
    return min(BACKOFF_S * 2 ** (attempt - 1), BACKOFF_MAX_S)
