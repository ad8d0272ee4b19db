"""A host in a Ray cluster: an actor on a node runs the worker there as a process of that node.

The engine keeps its own environment and knows nothing of Ray. Every answer is fetched by a call
with a deadline, since an actor whose node died may answer for a while longer, or never.
"""

import asyncio
import contextlib
import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qwen3_distill.errors import DistillError, EngineError, EngineLost, EngineStartError
from qwen3_distill.hosts.child import private
from qwen3_distill.hosts.cluster import Place, answer_of
from qwen3_distill.hosts.frames import End, Error, Packed, Value
from qwen3_distill.hosts.host import WorkerSpec
from qwen3_distill.hosts.mps import LOG_VARIABLE, PIPE_VARIABLE
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.utils.concurrency import result_within
from qwen3_distill.utils.printable import printable
from qwen3_distill.utils.secrets import is_secret_name, remember_secret, without_secrets

_Kind: TypeAlias = Literal["start", "call", "quiet", "stream"]
_POLL_S = 5.0
"""How long the actor waits for an answer before it says that there is none yet."""
_LOG_BYTES = 1 << 18
"""The most of a worker's output that one answer carries."""
_TAIL_BYTES = 4000
_OWN_VARIABLES = ("OMP_NUM_THREADS",)
"""Variables that Ray sets in its actors, and that engines read: they get the run's values."""
_MACHINE_VARIABLES = (PIPE_VARIABLE, LOG_VARIABLE)
"""Variables of an MPS daemon, which serves engines of the run's own machine only."""


class RayHost:
    """A `Host` whose worker runs in a place of a cluster.

    The worker's output is copied into the spec's log file here.

    Args:
        spec: the worker.
        place: where it runs.
    """

    def __init__(self, spec: WorkerSpec, place: Place) -> None:
        self._spec = spec
        for name, value in spec.environment.items():
            if is_secret_name(name):
                remember_secret(value)  # the worker's output is shown here, too
        self.place = place
        self._actor: Any = None
        self._death: EngineLost | None = None
        self._next_call = 0
        self._log_start = 0
        self.bytes_sent = self.bytes_received = 0
        """Sizes of the calls and of their answers since this host was made, without files."""

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def is_running(self) -> bool:
        return self._actor is not None and self._death is None

    @property
    def actor(self) -> Any:
        """The Ray actor; for tests that strike it."""
        return self._actor

    async def start(self, environment: Mapping[str, str] | None = None) -> None:
        await self.close()
        facts = await self.place.ready()
        names = _OWN_VARIABLES
        if self.place.spec.on_this_machine:
            names += _MACHINE_VARIABLES
        variables = {name: os.environ.get(name) for name in names}
        devices = {} if facts.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(facts.devices)}
        self._spec.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self._spec.log.stat().st_size if self._spec.log.exists() else 0
        import ray

        root = self.place.cluster.scratch_root
        self._death = None
        self._actor = (
            ray.remote(_HostActor)
            .options(
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=self.place.strategy(),
            )
            .remote(self._spec, variables, None if root is None else str(root))
        )
        try:
            # The actor's process starts, which takes longer than a call.
            limit_s = self.place.cluster.config.place_timeout_s
            node_id = await answer_of(self._actor.node_id.remote(), limit_s, self._who())
            if node_id != facts.node_id:  # the cards are numbered by the keeper's node
                raise EngineLost("its node died meanwhile, and its place moved to another one")
            await self._first("start", "start", {**(environment or {}), **devices})
        except EngineLost as error:
            raise EngineStartError(f"{self._who()} does not start: {error}") from None

    async def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        return await self._first("call", method, *arguments, timeout_s=timeout_s)

    async def call_without_heartbeat(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        return await self._first("quiet", method, *arguments, timeout_s=timeout_s)

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        answers = self._answers("stream", method, arguments, None)
        async with contextlib.aclosing(answers):
            async for answer in answers:
                if isinstance(answer, End):
                    return
                yield self._value(answer)

    async def receive(self, files: Mapping[str, Any], digests: Mapping[str, str]) -> Path:
        """Write files of Ray's object store into a folder of the node, and compare their digests.

        The files of the last two calls stay.

        Args:
            files: references to the contents, by name.
            digests: of the contents, by name.

        Returns:
            The folder on the node.

        Raises:
            EngineLost: a file cannot be fetched any more, or is not the one that was sent.
        """
        actor, call = self._running(), self._number()
        waiting = actor.begin_receive.remote(call, dict(digests), dict(files))
        async with contextlib.aclosing(self._follow(actor, call, "call", waiting)) as answers:
            async for answer in answers:
                return Path(self._value(answer))
        raise EngineError(f"{self.name} gave no answer about {', '.join(files)}")

    async def close(self) -> None:
        actor, self._actor = self._actor, None
        if actor is None:
            return
        if self._death is None:
            with contextlib.suppress(EngineLost):
                reply = actor.close.remote()
                self._copy_log(await answer_of(reply, 45.0, self.name))
        self.place.cluster.kill(actor)

    def kill(self) -> None:
        if self._actor is not None:
            self._actor.kill.remote()

    def output(self) -> str:
        try:
            with self._spec.log.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode(errors="replace").strip()
        except OSError:
            return ""

    def last_output(self) -> str:
        tail = self.output()[-_TAIL_BYTES:]
        if not tail:
            return f"; {self._spec.log} is empty"
        return f"; the end of {self._spec.log}:\n{printable(without_secrets(tail))}"

    def _running(self) -> Any:
        if self._death is not None:
            raise self._death
        if self._actor is None:
            raise EngineLost(f"{self.name} is not running: start it first")
        return self._actor

    async def _first(
        self, kind: _Kind, method: str, *arguments: Any, timeout_s: float | None = None
    ) -> Any:
        answers = self._answers(kind, method, arguments, timeout_s)
        async with contextlib.aclosing(answers):
            async for answer in answers:
                return self._value(answer)
        raise EngineError(f"{self.name}: {method} gave no answer")

    async def _answers(
        self, kind: _Kind, method: str, arguments: tuple[Any, ...], timeout_s: float | None
    ) -> AsyncGenerator[Value | End | Error, None]:
        """Make a call and yield what comes back; an end of the stream comes last."""
        actor, call = self._running(), self._number()
        payload = pickle.dumps(arguments, protocol=pickle.HIGHEST_PROTOCOL)
        self.bytes_sent += len(payload)
        waiting = actor.begin.remote(call, kind, method, payload, timeout_s)
        async with contextlib.aclosing(self._follow(actor, call, kind, waiting)) as answers:
            async for answer in answers:
                yield answer

    def _number(self) -> int:
        self._next_call += 1
        return self._next_call - 1

    async def _follow(
        self, actor: Any, call: int, kind: _Kind, waiting: Any
    ) -> AsyncGenerator[Value | End | Error, None]:
        """Yield the answers of a call that was begun; ``waiting`` is the reply with the first."""
        is_over = False
        try:
            while True:
                for answer in await self._next(actor, waiting):
                    is_over = is_over or kind != "stream" or not isinstance(answer, Value)
                    yield answer
                if is_over:
                    return
                waiting = actor.poll.remote(call)
        finally:
            if not is_over and self._death is None and actor is self._actor:
                actor.end.remote(call)

    async def _next(self, actor: Any, waiting: Any) -> list[Value | End | Error]:
        limit_s = self.place.cluster.config.call_timeout_s + _POLL_S
        try:
            reply = await answer_of(waiting, limit_s, self._who())
        except EngineLost as error:
            if actor is self._actor:
                self._lose(error)
            raise
        self.bytes_received += len(reply)
        answers, log = pickle.loads(reply)
        self._copy_log(log)
        return answers

    def _who(self) -> str:
        facts = self.place.facts
        return f"{self.name} on node {facts.address}" if facts else self.name

    def _lose(self, error: EngineLost) -> None:
        """End what is left of an actor that does not answer: it could come back later."""
        self._death = error
        if self._actor is not None:
            self.place.cluster.kill(self._actor)

    def _copy_log(self, text: bytes) -> None:
        if text:
            with open(self._spec.log, "ab", opener=private) as log:
                log.write(text)

    def _value(self, answer: Value | End | Error) -> Any:
        match answer:
            case Value(_, value):
                return value
            case Error(_, EngineLost() as error):
                self._lose(error)
                raise error
            case Error(_, DistillError() as error):
                raise error
            case Error(_, text):
                raise EngineError(f"{self.name}: {text}")
            case End():
                raise EngineError(f"{self.name}: a generator was called as a method")


class _Pending:
    """A call's answers that were not fetched yet."""

    def __init__(self, kind: _Kind) -> None:
        self._kind = kind
        self.answers: list[Value | End | Error] = []
        self.arrived = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def put(self, answer: Value | End | Error) -> None:
        self.answers.append(answer)
        self.arrived.set()

    def is_last(self, answer: Value | End | Error) -> bool:
        return self._kind != "stream" or not isinstance(answer, Value)


class _HostActor:
    """Runs on a node: owns the worker's process there.

    Args:
        spec: the worker; its log file is replaced by one of this node.
        variables: of the run's process; None: not set there.
        scratch_root: folder for this actor's files; None: in memory.
    """

    def __init__(
        self, spec: WorkerSpec, variables: Mapping[str, str | None], scratch_root: str | None
    ) -> None:
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._scratch = Path(
            tempfile.mkdtemp(prefix="qwen3-distill-host-", dir=scratch_root or memory)
        )
        self._log = self._scratch / "log"
        self._log_sent = 0
        self._host = LocalProcess(replace(spec, log=self._log, remove=(self._scratch,)))
        self._pending: dict[int, _Pending] = {}
        self._num_received = 0

    async def begin(
        self, call: int, kind: _Kind, method: str, payload: bytes, timeout_s: float | None
    ) -> bytes:
        """Begin a call; return its first answers, like `poll`.

        The arguments are read by the worker: here that would import PyTorch, for seconds in which
        no call is answered.
        """
        pending = self._pending[call] = _Pending(kind)
        arguments = pickle.loads(payload) if kind == "start" else (Packed(payload),)
        pending.task = asyncio.create_task(
            self._run(call, pending, kind, method, arguments, timeout_s)
        )
        return await self.poll(call)

    async def poll(self, call: int) -> bytes:
        """Wait a while for answers of a call; return them, pickled, with the worker's output."""
        pending = self._pending[call]
        with contextlib.suppress(asyncio.TimeoutError):
            await result_within(_POLL_S, pending.arrived.wait())
        answers, pending.answers = pending.answers, []
        pending.arrived.clear()
        if any(pending.is_last(answer) for answer in answers):
            self._pending.pop(call, None)
        return pickle.dumps((answers, self._new_output()), protocol=pickle.HIGHEST_PROTOCOL)

    async def end(self, call: int) -> None:
        """End a call whose answers nobody wants any more."""
        pending = self._pending.pop(call, None)
        if pending is not None and pending.task is not None:
            pending.task.cancel()
            await asyncio.gather(pending.task, return_exceptions=True)

    async def begin_receive(
        self, call: int, digests: dict[str, str], files: dict[str, Any]
    ) -> bytes:
        """Begin to fetch and write files (see `RayHost.receive`); return like `poll`."""
        pending = self._pending[call] = _Pending("call")
        pending.task = asyncio.create_task(self._receive(call, pending, digests, files))
        return await self.poll(call)

    async def _receive(
        self, call: int, pending: _Pending, digests: dict[str, str], files: dict[str, Any]
    ) -> None:
        self._num_received += 1
        folder = self._scratch / f"received-{self._num_received}"
        try:
            contents = [await reference for reference in files.values()]
            await asyncio.to_thread(write_checked, folder, digests, list(files), tuple(contents))
        except DistillError as error:
            pending.put(Error(call, error))
        except Exception as error:  # noqa: BLE001 - Ray's errors: a lost object, a full store
            text = str(error).strip().splitlines() or [type(error).__name__]
            pending.put(Error(call, EngineLost(f"the files cannot be fetched: {text[-1]}")))
        else:
            pending.put(Value(call, str(folder)))
        old = self._scratch / f"received-{self._num_received - 2}"
        shutil.rmtree(old, ignore_errors=True)

    async def close(self) -> bytes:
        """End the worker; return the rest of its output."""
        await self._host.close()
        rest = self._new_output()
        shutil.rmtree(self._scratch, ignore_errors=True)
        return rest

    async def kill(self) -> None:
        self._host.kill()

    async def node_id(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    async def pids(self) -> tuple[int, int | None]:
        """This actor's process, and the worker's guard; for tests that strike them."""
        return os.getpid(), self._host.pid

    async def _run(
        self,
        call: int,
        pending: _Pending,
        kind: _Kind,
        method: str,
        arguments: tuple[Any, ...],
        timeout_s: float | None,
    ) -> None:
        host = self._host
        try:
            if kind == "stream":
                stream = host.stream(method, *arguments)
                async with contextlib.aclosing(stream):
                    async for value in stream:
                        pending.put(Value(call, value))
                pending.put(End(call))
            elif kind == "start":
                with contextlib.suppress(OSError):  # the worker would inherit Ray's low priority
                    os.setpriority(os.PRIO_PROCESS, 0, 0)  # of this thread, which starts it
                await host.start(*arguments)
                pending.put(Value(call, None))
            elif kind == "quiet":
                assert timeout_s is not None
                value = await host.call_without_heartbeat(method, *arguments, timeout_s=timeout_s)
                pending.put(Value(call, value))
            else:
                value = await host.call(method, *arguments, timeout_s=timeout_s)
                pending.put(Value(call, value))
        except DistillError as error:
            pending.put(Error(call, error))
        except Exception as error:  # noqa: BLE001 - the boundary: every failure becomes an answer
            pending.put(Error(call, f"{method}: {type(error).__name__}: {error}"))

    def _new_output(self) -> bytes:
        try:
            with self._log.open("rb") as log:
                log.seek(self._log_sent)
                text = log.read(_LOG_BYTES)
        except OSError:
            return b""
        self._log_sent += len(text)
        return text


def write_checked(
    folder: Path, digests: dict[str, str], names: list[str], contents: tuple[Any, ...]
) -> None:
    """Write files below a new folder; see `RayHost.receive`.

    Raises:
        EngineLost: a content has another digest. It is not written.
    """
    folder.mkdir()
    for name, content in zip(names, contents, strict=True):
        found = hashlib.blake2b(content).hexdigest()
        if found != digests[name]:
            raise EngineLost(f"{name} arrived with digest {found[:12]}, sent {digests[name][:12]}")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
