"""The frames that cross the connection between a controller and a worker.

A frame has a kind. `Call`, `Cancel` and `Ping` go to the worker; `Value`, `End` and `Error` come
back. Every frame names the call that it belongs to, so calls may overlap.

On the wire a frame is a pickle with its length in front. Both sides are this package, so records
(numpy only) cross unchanged; no engine's types ever do. Never read frames from anybody but a worker
that this user started.
"""

import asyncio
import pickle
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

from qwen3_distill.errors import DistillError

_LENGTH = struct.Struct("<Q")
_MAX_BYTES = 1 << 40
"""A larger length is no length: no frame has as many bytes."""


@dataclass(frozen=True, slots=True)
class Call:
    """Calls a method; a generator's values come back one by one, then `End`."""

    call: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """Holds a call's arguments as a pickle, in place of them, where they are only passed on.

    Reading them may need what the worker alone has imported, such as PyTorch.
    """

    payload: bytes


def unpacked(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a call, read if they are packed."""
    match arguments:
        case (Packed(payload),):
            return pickle.loads(payload)
    return arguments


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ends a call; nothing more of it comes back."""

    call: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a `Value` from the worker's event loop itself."""

    call: int


@dataclass(frozen=True, slots=True)
class Value:
    """A method's result, or the next value of a generator."""

    call: int
    value: Any


@dataclass(frozen=True, slots=True)
class End:
    """A generator's end."""

    call: int


@dataclass(frozen=True, slots=True)
class Error:
    """A call failed: with an error of this package, or another one as text."""

    call: int
    error: DistillError | str


ToWorker: TypeAlias = Call | Cancel | Ping
ToController: TypeAlias = Value | End | Error
_FRAMES = (Call, Cancel, Ping, Value, End, Error)


async def write_frame(writer: asyncio.StreamWriter, frame: ToWorker | ToController) -> None:
    """Write one frame; wait until the other side keeps up."""
    payload = pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL)
    writer.write(_LENGTH.pack(len(payload)))
    writer.write(payload)
    await writer.drain()


class FrameError(Exception):
    """Bytes came that are no frame; nothing after them can be read."""


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """Read one frame.

    Raises:
        asyncio.IncompleteReadError: the connection ended.
        FrameError: what came is no frame.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > _MAX_BYTES:
        raise FrameError(f"a frame of {length:,} bytes")
    payload = await reader.readexactly(length)
    try:
        frame = pickle.loads(payload)
    except Exception as error:  # unpickling raises whatever the bytes lead to
        raise FrameError(f"{type(error).__name__}: {error}") from error
    if not isinstance(frame, _FRAMES):
        raise FrameError(f"a {type(frame).__name__} instead of a frame")
    return frame
