"""Servers that are started here: supervised, restarted, ended; and what stops a start."""

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from qwen3_distill.errors import ConfigError, EngineLost, EngineStartError
from qwen3_distill.ports import CACHED_TOKENS
from qwen3_distill.scoring.served.client import ServerClient
from qwen3_distill.scoring.served.endpoint import RESTARTS
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.scoring.sglang.in_server import THRESHOLDS
from qwen3_distill.scoring.sglang.wire import SGLANG
from qwen3_distill.types import TeacherScore
from tests.contract.builders import jobs_of, run, scores_of, synthetic_rollout
from tests.contract.reference import largest_gap, reference_model, token_logprobs
from tests.contract.served_adapter import (
    SERVED,
    SGLANG_STAND_IN,
    STAND_INS,
    VLLM_STAND_IN,
    Served,
    build_served,
    sglang_config,
)
from tests.sglang_stand_in import StandInServer
from tests.tiny_models import TinyModels

ROOT = Path(__file__).parents[2]
ROLLOUTS = [synthetic_rollout(6, 5, seed) for seed in range(6)]

Build = Callable[..., ServedTeacher]


@pytest.fixture
def build_as(tiny_models: TinyModels, tmp_path: Path) -> Iterator[Build]:
    """Makes teachers of an engine that are not started, and closes them."""
    made: list[ServedTeacher] = []

    def build_one(
        served: Served, *, prelude: str | None = None, **changes: object
    ) -> ServedTeacher:
        if prelude is not None:
            changes["python"] = served.interpreter(tmp_path / "python", prelude)
        config = served.config(tiny_models.teacher, **changes)
        log = tmp_path / "logs" / "server.log"
        fraction = 0.1 if served.on_gpu else 0.25
        made.append(build_served(config, memory_fraction=fraction, log=log))
        return made[-1]

    yield build_one
    for teacher in made:
        run(teacher.close())


@pytest.fixture(params=STAND_INS)
def stand_in(request: pytest.FixtureRequest) -> Served:
    return request.param


@pytest.fixture
def build(build_as: Build, stand_in: Served) -> Build:
    """Makes teachers in a server of every stand-in."""
    return partial(build_as, stand_in)


def events_of(teacher: ServedTeacher) -> dict[str, float]:
    """Return the teacher's counters without the tokens that the server had in its cache."""
    return {key: value for key, value in teacher.counters.items() if key != CACHED_TOKENS}


def processes_of(group: int) -> list[int]:
    """Living processes of a process group's session."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == group and fields[0] != b"Z":
                found.append(int(entry.name))
    return found


def wait_until_gone(group: int, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(group):
        assert time.monotonic() < deadline, f"still there: {processes_of(group)}"
        time.sleep(0.1)


# --- Life ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", SERVED)
def test_a_server_that_is_killed_while_it_scores_is_started_again(
    build_as: Build, tiny_models: TinyModels, served: Served
) -> None:
    teacher = build_as(served, request_tokens=11, max_in_flight=1, max_restarts=1)
    says_so = served == Served("sglang", "real")
    assert run(has_its_memory_before_it_answers(teacher)) == says_so
    server = teacher.server
    assert server is not None
    first_group = server.pid
    assert first_group is not None
    assert_hidden_key(server.api_key, server.pid)

    async def score_and_kill() -> list[object]:
        scoring = asyncio.create_task(teacher.score(jobs_of(ROLLOUTS)))
        await asyncio.sleep(0)  # its first request is on its way
        server.kill()
        return list(await scoring)

    results = run(score_and_kill())
    reference = reference_model(tiny_models.teacher)
    for rollout, result in zip(ROLLOUTS, results, strict=True):
        assert isinstance(result, TeacherScore)
        gap = largest_gap(result.logprobs, token_logprobs(reference, rollout))
        assert gap < served.adapter.parity_nats
    assert events_of(teacher) == {RESTARTS: 1}
    assert processes_of(first_group) == []
    second_group = server.pid
    assert second_group is not None
    assert processes_of(second_group)
    run(teacher.close())
    wait_until_gone(second_group)


async def has_its_memory_before_it_answers(teacher: ServedTeacher) -> bool:
    """Start it; return whether it was known to have its memory meanwhile."""
    starting = asyncio.create_task(teacher.start())
    taking = asyncio.create_task(teacher.memory_taken())
    done, _ = await asyncio.wait({starting, taking}, return_when=asyncio.FIRST_COMPLETED)
    taking.cancel()
    await starting
    return done == {taking}


def assert_hidden_key(api_key: str, group: int | None) -> None:
    """The key is in no command line of the server's processes."""
    assert group is not None
    assert len(api_key) >= 32
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(group)]
    assert lines
    assert not any(api_key.encode() in line for line in lines)


def test_sglang_is_told_that_its_start_is_over(build_as: Build, tmp_path: Path) -> None:
    run(build_as(SGLANG_STAND_IN).start())
    assert "Freezing GC" in (tmp_path / "logs" / "server.log").read_text()


@pytest.mark.sglang
def test_sglang_can_be_told_that_its_start_is_over(build_as: Build) -> None:
    teacher = build_as(Served("sglang", "real"))
    run(teacher.start())
    assert teacher.server is not None
    key = {"Authorization": f"Bearer {teacher.server.api_key}"}
    told = httpx.post(f"{teacher.server.url}{SGLANG.settle_path}", headers=key, trust_env=False)
    assert told.status_code == 200


@pytest.mark.sglang
def test_sglangs_scheduler_has_our_plugins(build_as: Build, tmp_path: Path) -> None:
    run(build_as(Served("sglang", "real")).start())
    log = (tmp_path / "logs" / "server.log").read_text()
    where = re.findall(re.escape(f"thresholds {THRESHOLDS} in ") + r"(\S+)", log)
    assert len(set(where) - {"MainProcess"}) == 1, where
    selecting = re.findall(r"selected by blocks in (\S+)", log)
    assert set(selecting) == set(where) - {"MainProcess"}
    assert "Failed to apply hooks" not in log


class Refusing:
    """Knows no path."""

    def answer(self, headers: object, body: bytes) -> tuple[int, object]:
        return 404, {"error": "not found"}


def test_a_server_that_cannot_be_told_is_used_all_the_same() -> None:
    server = StandInServer(Refusing()).start()

    async def tell_twice() -> None:
        client = ServerClient(
            [server.url], path="/generate", api_key="k", max_in_flight=1, timeout_s=9
        )
        await client.tell("/freeze_gc/")
        server.close()
        await client.tell("/freeze_gc/")
        await client.close()

    asyncio.run(tell_twice())


def test_files_that_hold_the_key_are_ours_alone(
    build: Build, stand_in: Served, tmp_path: Path
) -> None:
    teacher = build(prelude='cp "$4" "$0.yaml"; ls -ld "$(dirname "$4")" > "$0.mode"')
    run(teacher.start())
    server = teacher.server
    assert server is not None
    has_key = server.api_key in (tmp_path / "python.yaml").read_text()
    assert has_key == (stand_in.engine == "sglang")  # vLLM reads it from a variable
    assert (tmp_path / "python.mode").read_text().startswith("drwx------")
    assert stat.S_IMODE((tmp_path / "logs" / "server.log").stat().st_mode) == 0o600


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_a_server_that_dies_too_often_stops_the_run(build: Build, max_restarts: int) -> None:
    teacher = build(max_restarts=max_restarts)
    run(teacher.start())
    assert teacher.server is not None
    for _ in range(max_restarts):
        teacher.server.kill()
        assert len(scores_of(teacher, ROLLOUTS)) == len(ROLLOUTS)
    teacher.server.kill()
    with pytest.raises(
        EngineLost, match=rf"died, after {max_restarts} restarts \(scoring.max_restarts\)"
    ):
        run(teacher.score(jobs_of(ROLLOUTS)))


def test_an_idle_server_that_died_is_started_again(build: Build) -> None:
    teacher = build()
    run(teacher.start())
    for expected_restarts in (1, 2):
        assert teacher.server is not None
        teacher.server.kill()
        assert len(scores_of(teacher, ROLLOUTS)) == len(ROLLOUTS)
        assert events_of(teacher) == {RESTARTS: expected_restarts}
    run(teacher.start())  # begins anew
    assert events_of(teacher) == {}


def test_a_restart_that_fails_is_tried_again_within_the_limit(build: Build) -> None:
    counting = 'n=$(cat "$0.n" || echo 0); echo $((n + 1)) > "$0.n"; [ $n = 1 ] && exit 1'
    teacher = build(prelude=counting, max_restarts=2)
    run(teacher.start())
    assert teacher.server is not None
    teacher.server.kill()
    assert len(scores_of(teacher, ROLLOUTS)) == len(ROLLOUTS)
    assert events_of(teacher) == {RESTARTS: 2}


def test_the_memory_fraction_is_asked_for_at_every_start(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    fractions = iter([0.5, 0.25])
    keep = SGLANG_STAND_IN.interpreter(tmp_path / "python", 'cat "$4" >> "$0.yaml"')
    teacher = build_served(
        sglang_config(tiny_models.teacher, "stand_in", python=keep),
        memory_fraction=lambda: next(fractions),
        log=tmp_path / "log",
    )
    run(teacher.start())
    assert teacher.server is not None
    teacher.server.kill()
    assert len(scores_of(teacher, ROLLOUTS)) == len(ROLLOUTS)
    run(teacher.close())
    lines = (tmp_path / "python.yaml").read_text().splitlines()
    asked = [line for line in lines if line.startswith("mem-fraction-static")]
    assert asked == ["mem-fraction-static: 0.5", "mem-fraction-static: 0.25"]


@pytest.mark.parametrize("served", SERVED)
def test_nothing_is_left_when_the_controller_is_killed(
    tiny_models: TinyModels, tmp_path: Path, served: Served
) -> None:
    config = served.config(tiny_models.teacher)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = f"""
import asyncio, time
from pathlib import Path
from qwen3_distill.config import {type(config).__name__} as Scoring
from tests.contract.served_adapter import build_served

async def main():
    config = Scoring.model_validate_json(Path({str(tmp_path / "config.json")!r}).read_text())
    teacher = build_served(config, log=Path({str(tmp_path / "log")!r}))
    await teacher.start()
    print(teacher.server.pid, flush=True)
    time.sleep(600)

asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as controller:
        assert controller.stdout is not None
        group = int(controller.stdout.readline())
        assert len(processes_of(group)) >= 2  # the guard and the server
        os.kill(controller.pid, signal.SIGKILL)
    wait_until_gone(group)


# --- Starts that fail ---------------------------------------------------------------------------


def start_error(teacher: ServedTeacher) -> str:
    with pytest.raises(EngineStartError) as error:
        run(teacher.start())
    assert teacher.server is not None
    assert not teacher.server.is_running
    return str(error.value)


def test_a_port_that_is_taken_is_named(build: Build) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = start_error(build(port=port))
    assert f"port {port} " in message
    assert "scoring.port" in message


def test_nobody_else_gets_the_port_of_a_server_that_starts(build: Build) -> None:
    server = build().server
    assert server is not None

    async def while_it_starts() -> None:
        await server.start()  # the process; it listens later
        try:
            port = int(server.url.rpartition(":")[2])
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
        finally:
            await server.close()

    run(while_it_starts())


def test_a_port_that_was_just_used_is_free(build: Build) -> None:
    first = build()
    run(first.start())
    assert first.server is not None
    port = int(first.server.url.rpartition(":")[2])
    assert len(scores_of(first, ROLLOUTS)) == len(ROLLOUTS)
    run(first.close())
    second = build(port=port)
    run(second.start())
    assert second.server is not None
    assert second.server.url.endswith(f":{port}")


def test_an_interpreter_that_does_not_exist_is_named(build: Build) -> None:
    message = start_error(build(python="/nowhere/python"))
    assert "/nowhere/python does not exist" in message


def test_an_interpreter_without_the_engine_is_told_what_to_install(
    build: Build, stand_in: Served
) -> None:
    message = start_error(build(python=sys.executable))
    assert f"{stand_in.name} is not installed" in message
    assert f"engines install {stand_in.engine}" in message
    assert "scoring.python is null" in message


def test_a_server_that_dies_at_its_start_leaves_its_last_words(build: Build) -> None:
    message = start_error(build(prelude="echo ValueError: by hand >&2; exit 1"))
    assert "did not start" in message
    assert "ValueError: by hand" in message


def test_the_last_words_are_those_of_this_start(build: Build, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text("CUDA out of memory, an earlier one\n")
    message = start_error(build(prelude="echo ValueError: this one; exit 1"))
    assert "ValueError: this one" in message
    assert "earlier" not in message
    assert "ran out of memory" not in message


def test_out_of_memory_says_what_was_planned_found_and_may_be_changed(build_as: Build) -> None:
    found = "echo 'Load weight begin. avail mem=17.25 GB'"
    message = start_error(
        build_as(SGLANG_STAND_IN, prelude=f"{found}; echo CUDA out of memory. Tried; exit 1")
    )
    assert "Planned: memory fraction 0.25, cache of 32768 tokens" in message
    assert "17.25 GB free at load weight begin" in message
    assert "lower scoring.max_total_tokens" in message


def test_a_share_of_memory_that_is_too_small_is_to_be_raised(build_as: Build) -> None:
    words = "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."
    message = start_error(build_as(SGLANG_STAND_IN, prelude=f"echo '{words}'; exit 1"))
    assert "raise scoring.memory_fraction" in message


def test_a_server_that_never_answers_ends_the_start(build: Build) -> None:
    message = start_error(build(prelude="echo loading; sleep 600", start_timeout_s=1.0))
    assert "no answer within scoring.start_timeout_s=1" in message
    assert "loading" in message


def test_fp8_without_a_gpu_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"quantization=fp8 needs a GPU"):
        run(build(quantization="fp8").start())


@pytest.mark.parametrize(
    "served",
    [
        pytest.param(Served("sglang", "real"), marks=pytest.mark.sglang),
        pytest.param(Served("vllm", "real"), marks=pytest.mark.vllm),
    ],
)
def test_an_option_that_the_engine_does_not_have_is_named(build_as: Build, served: Served) -> None:
    message = start_error(build_as(served, server_arguments={"no-such-option": 3}))
    assert f"{served.name} has no option no-such-option" in message
    assert "unrecognized arguments: --no-such-" in message
    assert "change scoring.server_arguments" in message


@pytest.mark.parametrize(
    ("served", "words"),
    [
        (SGLANG_STAND_IN, "sglang serve: error: unrecognized arguments: --enable-fp32-lm-head"),
        (SGLANG_STAND_IN, "ImportError: cannot import name 'x' from 'sglang.srt' (/srt.py)"),
        (SGLANG_STAND_IN, "ModuleNotFoundError: No module named 'sglang.launch_server'"),
        (VLLM_STAND_IN, "api_server.py: error: unrecognized arguments: --kv-cache-memory-bytes"),
        (VLLM_STAND_IN, "ModuleNotFoundError: No module named 'vllm.entrypoints.openai'"),
    ],
    ids=str,
)
def test_another_version_is_named(build_as: Build, served: Served, words: str) -> None:
    message = start_error(build_as(served, prelude=f'echo "{words}"; exit 1'))
    assert "is a version that this does not work with" in message
    assert words.partition("rror: ")[2] in message


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("larger than the available KV cache memory (0.1 GiB)", "raise scoring.max_total_tokens"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "lower scoring.max_total_tokens"),
    ],
)
def test_vllm_out_of_memory_says_what_was_planned_and_may_be_changed(
    build_as: Build, words: str, change: str
) -> None:
    message = start_error(build_as(VLLM_STAND_IN, prelude=f"echo '{words}'; exit 1"))
    assert "Planned: a cache of 0.12 GiB, for sequences of up to 1024 tokens" in message
    assert change in message


def test_vllm_is_told_what_the_run_needs(build_as: Build, tmp_path: Path) -> None:
    teacher = build_as(
        VLLM_STAND_IN,
        prelude='cp "$4" "$0.yaml"',
        max_model_tokens=500,
        server_arguments={"block-size": 32},
    )
    assert teacher.identity.context_length == 500
    run(teacher.start())
    told = yaml.safe_load((tmp_path / "python.yaml").read_text())
    assert told["max-model-len"] == 501  # one token is sampled, and not read
    assert told["kv-cache-memory-bytes"] == 128 << 20
    assert told["logprobs-mode"] == "processed_logprobs"
    assert told["max-num-batched-tokens"] == 2048
    assert told["enable-chunked-prefill"] is False  # on a CPU
    assert told["block-size"] == 32
    assert teacher.server is not None
    assert teacher.server.api_key not in (tmp_path / "logs" / "server.log").read_text()
