"""An HTTP client for one or several scoring servers; requests are balanced by tokens in flight.

A reply is not trusted: it has one deadline from the connection to its last byte, a largest size
that follows from the request, and no compression. Whatever goes wrong with it is `Unanswered`.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import httpx

from qwen3_distill.errors import EngineError
from qwen3_distill.scoring.served.faults import FaultKind, Refused, Unanswered
from qwen3_distill.utils.concurrency import result_within
from qwen3_distill.utils.secrets import remember_secret, text_of_others, without_user

_CONNECT_TIMEOUT_S = 10.0
_REST_S = 2.0
"""How long other servers are preferred to one that failed."""
BACKOFF_S = 0.5
"""Pause before the first retry; every further one is twice as long."""
BACKOFF_MAX_S = 8.0
_ERROR_BYTES = 16 << 10
"""Read of a reply that is an error: its beginning says what is wrong."""
_ERROR_CHARACTERS = 300


@dataclass(eq=False)
class ServerConnection:
    """One server and its load: requests and tokens in flight."""

    address: str
    """May hold a user's name and password; never shown."""
    requests: int = 0
    tokens: int = 0
    rests_until: float = 0.0

    @property
    def url(self) -> str:
        """The address as errors show it."""
        return without_user(self.address)


class ServerClient:
    """Sends requests to the server with the fewest tokens in flight.

    Args:
        path: where requests are posted, e.g. ``/generate``.
        max_in_flight: requests in flight per server; further ones wait here.
        timeout_s: from the connection to the last byte of a reply.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        path: str,
        api_key: str | None,
        max_in_flight: int,
        timeout_s: float,
    ) -> None:
        self._path = path
        self.connections = [ServerConnection(url.rstrip("/")) for url in urls]
        self._max_in_flight = max_in_flight
        self._timeout_s = timeout_s
        self._changed = asyncio.Condition()
        _remember_secrets(urls, api_key)
        self._http = httpx.AsyncClient(
            headers={
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # a small compressed reply can be large
                **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            },
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),  # `_exchange` has a deadline
            # A connection a request: what a server sends without being asked, or too late, cannot
            # be taken for the reply to the next one.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # a proxy of the environment is not meant for these
        )

    async def post(
        self,
        body: bytes,
        *,
        tokens: int,
        max_bytes: int,
        timeout_s: float | None = None,
        connection: ServerConnection | None = None,
    ) -> bytes:
        """Return a server's reply to a request.

        Args:
            tokens: of the request; servers are balanced by it.
            max_bytes: of the reply; reading ends at a larger one.
            timeout_s: seconds to wait for the whole reply; None: the client's default.
            connection: the server to ask; None: the least busy one.

        Raises:
            Unanswered: no answer; a later attempt may succeed.
            Refused: the server rejects the request itself.
            EngineError: the key is wrong.
        """
        chosen = await self._take(tokens, connection)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            status, reply = await self._exchange(chosen, body, max_bytes, limit_s)
        except Unanswered:
            chosen.rests_until = asyncio.get_running_loop().time() + _REST_S
            raise
        finally:
            await self._give_back(chosen, tokens)
        return reply if status == httpx.codes.OK else _raise_for(status, chosen, reply)

    async def tell(self, path: str) -> None:
        """Post nothing to another path of every server; whether it knows the path is its matter."""
        for connection in self.connections:
            with suppress(
                Unanswered, httpx.HTTPError, httpx.InvalidURL, asyncio.TimeoutError, OSError
            ):
                await result_within(
                    _CONNECT_TIMEOUT_S, self._send(connection.address + path, b"", _ERROR_BYTES)
                )

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

    async def _exchange(
        self, connection: ServerConnection, body: bytes, max_bytes: int, limit_s: float
    ) -> tuple[int, bytes]:
        """Return a reply's status and content; every failure of a reply becomes `Unanswered`."""
        what = f"{connection.url}: "
        try:
            status, reply = await result_within(
                limit_s, self._send(connection.address + self._path, body, max_bytes)
            )
        except (asyncio.TimeoutError, httpx.TimeoutException) as error:
            raise Unanswered(
                FaultKind.TIMEOUT, f"{what}no whole answer within {limit_s:g} s"
            ) from error
        except Unanswered as error:
            raise Unanswered(error.fault.kind, what + error.fault.detail) from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            detail = str(error) or type(error).__name__
            raise Unanswered(FaultKind.CONNECTION, what + detail) from error
        except Exception as error:  # what libraries raise at a reply is the reply's fault
            closed = "closed from here" if self._http.is_closed else f"{type(error).__name__}"
            raise Unanswered(FaultKind.CONNECTION, what + closed) from error
        if status == httpx.codes.OK or _is_final(status):
            return status, reply
        raise Unanswered(FaultKind.STATUS, f"{what}status {status}: {_text(reply)}")

    async def _send(self, address: str, body: bytes, max_bytes: int) -> tuple[int, bytes]:
        """Read a reply, or the beginning of one that is an error."""
        async with self._http.stream("POST", address, content=body) as response:
            status = response.status_code
            ok = status == httpx.codes.OK
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                if ok:
                    raise Unanswered(FaultKind.GARBAGE, "the reply is compressed, unasked")
                return status, b""
            parts: list[bytes] = []
            left = max_bytes if ok else _ERROR_BYTES
            async for part in response.aiter_raw():
                left -= len(part)
                parts.append(part)
                if left < 0 and ok:
                    raise Unanswered(
                        FaultKind.GARBAGE,
                        f"the reply has more than {max_bytes:,} bytes, the most that an answer to "
                        "the request can have",
                    )
                if left < 0:
                    break
            return status, b"".join(parts)


def _remember_secrets(urls: Sequence[str], api_key: str | None) -> None:
    """Have no text show the key, or the users and passwords of addresses."""
    if api_key:
        remember_secret(api_key)
    for url in urls:
        user, at, _ = urlsplit(url).netloc.rpartition("@")
        if at:
            remember_secret(unquote(user))
            remember_secret(user.partition(":")[2])


def _is_final(status: int) -> bool:
    """Whether sending the request again would change nothing."""
    return 400 <= status < 500 and status != httpx.codes.TOO_MANY_REQUESTS


def _raise_for(status: int, connection: ServerConnection, reply: bytes) -> bytes:
    detail = text_of_others(f"{connection.url}: status {status}: {_text(reply)}")
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise EngineError(
            f"{detail}; the server wants another key: set scoring.api_key_file to a file "
            "that holds it"
        )
    raise Refused(detail)


def _text(reply: bytes) -> str:
    return text_of_others(reply.decode("utf-8", errors="replace"))[:_ERROR_CHARACTERS]


def backoff_s(attempt: int) -> float:
    """Pause before a retry; ``attempt`` is the number of attempts so far."""
    return min(BACKOFF_S * 2 ** (attempt - 1), BACKOFF_MAX_S)
