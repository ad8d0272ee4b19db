"""A proxy in front of a scoring server that returns faulty replies on request."""

import asyncio
import contextlib
import json
import math
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from tests.sglang_stand_in import candidates_as_arrays, candidates_as_lists

HANG_S = 3600.0


class Fault(str, Enum):
    """The fault that is put into one reply."""

    NONE_LOGPROB = "none_logprob"
    NAN = "nan"
    MINUS_INFINITY = "minus_infinity"
    POSITIVE = "positive"
    SHORT = "short"
    SHIFTED = "shifted"
    """Every token and its logprob are one position later."""
    SHIFTED_VALUES = "shifted_values"
    """Every logprob is one position later, the tokens are not: no single reply shows it."""
    SCALED = "scaled"
    """Every logprob is half as large, about what a higher temperature makes of it."""
    WRONG_COUNT = "wrong_count"
    CANDIDATE_TWICE = "candidate_twice"
    SHIFTED_CANDIDATES = "shifted_candidates"
    FEW_CANDIDATES = "few_candidates"
    GARBAGE = "garbage"
    OTHER_FORM = "other_form"
    ABORTED = "aborted"
    STATUS_503 = "status_503"
    STATUS_400 = "status_400"
    HANG = "hang"
    CUT = "cut"


STATUS = {Fault.STATUS_503: 503, Fault.STATUS_400: 400}


class FaultProxy:
    """Forwards requests, and puts faults into the replies.

    Attributes:
        next_faults: one for each coming request; None: the reply is not changed.
        always: chooses the fault by the request once `next_faults` is empty.
        requests: bodies of all requests, decoded.
        num_connections: connections that clients opened.
        most_in_flight: largest number of concurrent requests.
    """

    def __init__(self, upstream_url: str) -> None:
        parts = urlsplit(upstream_url)
        self._upstream = (parts.hostname or "", parts.port or 0)
        self.next_faults: deque[Fault | None] = deque()
        self.always: Callable[[dict[str, Any]], Fault | None] = lambda request: None
        self.requests: list[dict[str, Any]] = []
        self.num_connections = 0
        self.most_in_flight = 0
        self.delay_s = 0.0
        self._in_flight = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def start(self) -> "FaultProxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    head, body = await _read_message(reader)
                    self._in_flight += 1
                    self.most_in_flight = max(self.most_in_flight, self._in_flight)
                    try:
                        await self._answer(head, body, writer)
                    finally:
                        self._in_flight -= 1
        except asyncio.CancelledError:
            pass  # closed; the streams' own callback would log it
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        request = json.loads(body)
        self.requests.append(request)
        fault = self.next_faults.popleft() if self.next_faults else self.always(request)
        await asyncio.sleep(self.delay_s)
        if fault is Fault.HANG:
            await asyncio.sleep(HANG_S)
        if fault is Fault.CUT:
            raise ConnectionAbortedError
        if fault is not None and fault in STATUS:
            status, reply = STATUS[fault], b'{"error": "made up"}'
        else:
            status, reply = await self._ask_upstream(head, body)
        if fault is not None and status == 200:
            reply = spoiled(fault, reply)
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Length: {len(reply)}\r\n\r\n".encode() + reply
        )
        await writer.drain()

    async def _ask_upstream(self, head: bytes, body: bytes) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(head + b"\r\n\r\n" + body)
            await writer.drain()
            answer_head, answer = await _read_message(reader)
            return int(answer_head.split()[1]), answer
        finally:
            writer.close()


async def _read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read a message with a Content-Length; return its head (no empty line) and its body."""
    head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return head, await reader.readexactly(int(value))
    raise ValueError(f"no Content-Length in {head!r}")


def spoiled(fault: Fault, reply: bytes) -> bytes:
    """Return SGLang's or vLLM's reply with a fault in its last sequence."""
    entries = json.loads(reply)
    if fault is Fault.GARBAGE:
        return reply[: len(reply) // 2]
    if isinstance(entries, dict):
        _spoil_choices(fault, entries["choices"])
        return json.dumps(entries).encode()
    with_arrays = [one for one in entries if "input_top_logprobs_shape" in one["meta_info"]]
    for one in with_arrays:
        one["meta_info"]["input_top_logprobs"] = candidates_as_lists(one["meta_info"])
    meta = entries[-1]["meta_info"]
    rows = meta.get("input_token_logprobs")
    top = meta.get("input_top_logprobs")
    match fault:
        case Fault.NONE_LOGPROB:
            rows[-1][0] = None
        case Fault.NAN:
            rows[-1][0] = math.nan
        case Fault.MINUS_INFINITY:
            rows[-1][0] = -math.inf
        case Fault.POSITIVE:
            rows[-1][0] = 0.5
        case Fault.SHORT:
            rows.pop()
        case Fault.SHIFTED:
            meta["input_token_logprobs"] = [rows[0], *rows[-1:], *rows[1:-1]]
        case Fault.SHIFTED_VALUES:
            values = [row[0] for row in rows]
            for row, value in zip(rows, [None, *values[-1:], *values[1:-1]], strict=True):
                row[0] = value
        case Fault.SCALED:
            for one in entries:
                given = one["meta_info"]
                for row in (given["input_token_logprobs"], *given.get("input_top_logprobs", ())):
                    for item in row or ():
                        item[0] = None if item[0] is None else item[0] / 2
        case Fault.WRONG_COUNT:
            entries.append(entries[-1])
        case Fault.CANDIDATE_TWICE:
            top[-1][1] = top[-1][0]
        case Fault.SHIFTED_CANDIDATES:
            meta["input_top_logprobs"] = [top[0], *top[-1:], *top[1:-1]]
        case Fault.FEW_CANDIDATES:
            top[-1].pop()
        case Fault.OTHER_FORM:
            del meta["input_token_logprobs"]
        case Fault.ABORTED:
            meta["finish_reason"] = {"type": "abort", "message": "made up"}
        case _:
            raise ValueError(f"{fault} is not about a reply")
    for one in with_arrays:
        _put_candidates(one["meta_info"])
    return json.dumps(entries).encode()


def _put_candidates(meta: dict[str, Any]) -> None:
    """Put the candidates back into arrays; like SGLang leave rows of several lengths as lists."""
    rows = meta["input_top_logprobs"]
    for name in [name for name in meta if name.startswith("input_top_logprobs_")]:
        del meta[name]
    if len({len(row) for row in rows[1:]}) == 1:
        meta |= candidates_as_arrays(meta.pop("input_top_logprobs"))


def _spoil_choices(fault: Fault, choices: list[dict[str, Any]]) -> None:
    """Put a fault into the last of vLLM's answers."""
    last = choices[-1]
    places: list[Any] = last["prompt_logprobs"] or []
    sent = [next(iter(place)) if place else None for place in places]
    members: list[Any] = [place and place[token] for place, token in zip(places, sent, strict=True)]
    match fault:
        case Fault.NONE_LOGPROB:
            members[-1]["logprob"] = None
        case Fault.NAN:
            members[-1]["logprob"] = math.nan
        case Fault.MINUS_INFINITY:
            members[-1]["logprob"] = -9999.0  # vLLM's word for it
        case Fault.POSITIVE:
            members[-1]["logprob"] = 0.5
        case Fault.SHORT:
            places.pop()
        case Fault.SHIFTED:
            last["prompt_logprobs"] = [places[0], *places[-1:], *places[1:-1]]
        case Fault.SHIFTED_VALUES:
            values = [member["logprob"] for member in members[1:]]
            for member, value in zip(members[1:], [*values[-1:], *values[:-1]], strict=True):
                member["logprob"] = value
        case Fault.SCALED:
            for choice in choices:
                for place in choice["prompt_logprobs"][1:]:
                    for member in place.values():
                        member["logprob"] /= 2
        case Fault.WRONG_COUNT:
            choices.append(last)
        case Fault.CANDIDATE_TWICE:
            list(places[-1].values())[-1]["rank"] = 1
        case Fault.SHIFTED_CANDIDATES:
            others = [places[-1], *places[1:-1]]
            last["prompt_logprobs"] = [
                None,
                *(
                    {token: member, **{k: v for k, v in other.items() if k != token}}
                    for token, member, other in zip(sent[1:], members[1:], others, strict=True)
                ),
            ]
        case Fault.FEW_CANDIDATES:
            places[-1].popitem()
        case Fault.OTHER_FORM:
            del last["prompt_logprobs"]
        case Fault.ABORTED:
            last["finish_reason"] = "abort"
        case _:
            raise ValueError(f"{fault} is not about a reply")
