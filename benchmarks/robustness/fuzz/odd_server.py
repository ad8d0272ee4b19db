"""An HTTP server whose replies are odd: in their JSON, or in how they come over the connection.

Real sockets in threads of this process. The healthy reply is a valid one to the request; an
`Oddity` writes it, or something else, to the connection.
"""

import gzip
import json
import random
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

from benchmarks.robustness.fuzz.mutations import DEPTH, mutated

_BOMB_BYTES = 64 << 20
_SLOW_S = 0.05
_HEAD_END = b"\r\n\r\n"


class Reply:
    """One reply: the connection, the request's headers, and the valid JSON that would be right."""

    def __init__(self, connection: socket.socket, head: str, value: Any, rng: random.Random):
        self.connection, self.head, self.value, self.rng = connection, head, value, rng
        self.text = json.dumps(value).encode()

    @property
    def authorization(self) -> str:
        lines = [line for line in self.head.split("\r\n") if line.lower().startswith("authoriz")]
        return lines[0].partition(": ")[2] if lines else ""

    @property
    def key(self) -> str:
        return self.authorization.removeprefix("Bearer ")

    def send(self, body: bytes, *headers: str, status: str = "200 OK") -> None:
        """Write a whole reply with its length."""
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        self.raw("\r\n".join(lines).encode("latin-1", "replace") + _HEAD_END + body)

    def begin(self, *headers: str) -> None:
        """Write the head of a reply whose body follows."""
        self.raw("\r\n".join(["HTTP/1.1 200 OK", *headers]).encode("latin-1") + _HEAD_END)

    def raw(self, data: bytes) -> None:
        self.connection.sendall(data)


Oddity = Callable[[Reply], None]


def _healthy(reply: Reply) -> None:
    reply.send(reply.text)


def _odd_json(reply: Reply) -> None:
    reply.send(mutated(reply.value, reply.rng, reply.key))


def _other_form(reply: Reply) -> None:
    forms = (b"[]", b"{}", b"null", b'"x"', b"3", b"[[]]", b"[null]", b"", b"\xff\xfe\x00", b"NaN")
    deep = (b"[" * DEPTH + b"]" * DEPTH, b'{"a":' * DEPTH + b"0" + b"}" * DEPTH)
    reply.send(reply.rng.choice((*forms, *deep)))


def _encoded(reply: Reply) -> None:
    """Compressed as it says, in another way, or not at all."""
    name = reply.rng.choice(
        ("gzip", "deflate", "br", "zstd", "gzip, gzip", "x", "GZIP", "identity")
    )
    body = reply.rng.choice((gzip.compress(reply.text), zlib.compress(reply.text), reply.text))
    broken = body[: len(body) // 2] if reply.rng.random() < 0.4 else body
    reply.send(broken, f"Content-Encoding: {name}")


def _bomb(reply: Reply) -> None:
    packed = gzip.compress(b"[" + b" " * _BOMB_BYTES, compresslevel=1)
    reply.send(packed, "Content-Encoding: gzip")


def _charset(reply: Reply) -> None:
    name = reply.rng.choice(("utf-16", "no-such", "\xe9", "utf-7", "idna", "undefined", "rot13"))
    status = reply.rng.choice(("200 OK", "500 X", "400 X"))
    reply.send(
        reply.text if status == "200 OK" else b"\xff\xfe+AGE-",
        f"Content-Type: text/html; charset={name}",
        status=status,
    )


def _slow(reply: Reply) -> None:
    """Write a byte now and then: each comes in time, the reply does not."""
    if reply.rng.random() < 0.5:
        reply.begin(f"Content-Length: {len(reply.text)}")
    for byte in b" " * 400 + reply.text:
        reply.raw(bytes([byte]))
        time.sleep(_SLOW_S)


def _slow_head(reply: Reply) -> None:
    reply.raw(b"HTTP/1.1 200 OK\r\n")
    for number in range(400):
        reply.raw(f"X-{number}: y\r\n".encode())
        time.sleep(_SLOW_S)


def _endless(reply: Reply) -> None:
    """Write without an end, with and without a length."""
    chunked = reply.rng.random() < 0.5
    reply.begin("Transfer-Encoding: chunked" if chunked else f"Content-Length: {1 << 50}")
    part = b" " * 65536
    while True:
        reply.raw(b"10000\r\n" + part + b"\r\n" if chunked else part)


def _endless_informational(reply: Reply) -> None:
    while True:
        reply.raw(b"HTTP/1.1 100 Continue\r\n\r\n")


def _length(reply: Reply) -> None:
    lengths = ("-1", "x", "1e9", str(len(reply.text) + 9), "0", str(10**30), "5, 6", "")
    reply.begin(f"Content-Length: {reply.rng.choice(lengths)}")
    reply.raw(reply.text)
    reply.connection.shutdown(socket.SHUT_WR)


def _chunks(reply: Reply) -> None:
    sizes = (b"-5", b"zz", b"ffffffffffffffffffff", b"5;" + b"x" * 5000, b"")
    reply.begin("Transfer-Encoding: chunked")
    reply.raw(reply.rng.choice(sizes) + b"\r\n" + reply.text + b"\r\n")
    reply.connection.shutdown(socket.SHUT_WR)


def _cut(reply: Reply) -> None:
    whole = f"HTTP/1.1 200 OK\r\nContent-Length: {len(reply.text)}\r\n\r\n".encode() + reply.text
    reply.raw(whole[: reply.rng.randrange(len(whole))])
    reply.connection.shutdown(socket.SHUT_RDWR)


def _no_http(reply: Reply) -> None:
    junk = (b"\x00" * 300, b"SSH-2.0-x\r\n", b"HTTP/9.9 200 OK\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n")
    more = (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 200\r\n: x\r\n\r\n", b"\x1b[2J\r\n\r\n")
    reply.raw(reply.rng.choice((*junk, *more, reply.text)))
    reply.connection.shutdown(socket.SHUT_RDWR)


def _headers(reply: Reply) -> None:
    many = [f"X-{number}: y" for number in range(3000)]
    odd = (["X: " + "y" * 300_000], many, ["X: \x01\x7f"], ["X\x00: y"], [f"X: {reply.key}"])
    reply.send(reply.text, *reply.rng.choice(odd))


def _status(reply: Reply) -> None:
    """Any status, with a body that sends the request's headers back."""
    status = reply.rng.choice((100, 101, 204, 205, 206, 301, 307, 304, 400, 401, 403, 404, 408))
    status = reply.rng.choice((status, 413, 418, 429, 500, 502, 503, 599, 600, 999, 0))
    echoes = (reply.head, reply.key[:15], f"\x1b]0;{reply.authorization}\x07", "\u202e" * 90)
    filler = "x" * reply.rng.choice((0, 280, 295, 20_000, 200_000))
    body = (filler + reply.rng.choice(echoes)).encode()
    location = reply.rng.choice(("/", "http://[", "http://xn--a/", "file:///etc/passwd", "\xe9"))
    reply.send(body, f"Location: {location}", status=f"{status} {reply.key}")


def _aborted(reply: Reply) -> None:
    for entry in reply.value:
        entry["meta_info"]["finish_reason"] = {
            "type": "abort",
            "message": f"\x1b[2J{reply.authorization} {reply.rng.choice(('', 'y' * 90_000))}",
        }
    reply.send(json.dumps(reply.value).encode())


def _more(reply: Reply) -> None:
    """A second reply that nobody asked for."""
    reply.send(reply.text)
    reply.send(b'[{"meta_info": {}}]')


def _silent(reply: Reply) -> None:
    time.sleep(20)


ODDITIES: tuple[Oddity, ...] = (
    *(_healthy, _odd_json, _odd_json, _odd_json, _other_form, _encoded, _encoded, _bomb, _charset),
    *(_slow, _slow_head, _endless, _endless_informational, _length, _chunks, _cut, _no_http),
    *(_headers, _headers, _status, _status, _status, _aborted, _more, _silent),
)


class OddServer:
    """Serves on a port of loopback until it is closed.

    Args:
        answer: returns the valid reply to a request's JSON.
    """

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.answer = answer
        self.oddity: Oddity = _healthy
        self.rng = random.Random(0)
        self.last_name = ""
        owner = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                owner._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Nothing: the client closed a connection that was still written to."""

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, connection: socket.socket) -> None:
        while True:
            data = b""
            while _HEAD_END not in data:
                if not (part := connection.recv(65536)):
                    return
                data += part
            head, _, body = data.partition(_HEAD_END)
            text = head.decode("latin-1")
            lines = [line.lower() for line in text.split("\r\n")]
            length = next(int(x.split(":")[1]) for x in lines if x.startswith("content-length"))
            while len(body) < length:
                body += connection.recv(65536)
            self.oddity(Reply(connection, text, self.answer(json.loads(body)), self.rng))
