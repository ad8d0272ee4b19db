"""Runs of the lab pair with embedded engines in their own processes, which are killed or hang."""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.numpy import load_file

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.errors import EngineStartError
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.pipeline.assembly.channel import run_channel_folder
from qwen3_distill.pipeline.assembly.teachers import teacher_sampler
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.scoring.hosted import HostedTeacher
from qwen3_distill.training.hosted import HostedLearner
from tests.contract.builders import Hosted
from tests.pipeline.builders import raise_warning, read_json, student_bytes, timeless
from tests.pipeline.faults import struck

ROOT = Path(__file__).parents[2]
STEPS, ROLLOUTS = 6, 16
SHORT = (
    f"steps={STEPS}",
    f"prompts_per_step={ROLLOUTS}",
    "evaluation=null",
    "checkpoint.every_steps=2",
    "logging.tensorboard=false",
)
STREAMING = "pipeline={kind: streaming, max_staleness_steps: 2}"
OWN_PROCESSES = tuple(
    f"{section}.{setting}"
    for section in ("generation", "scoring", "training")
    # A hang is found in time, and a busy machine is not taken for one.
    for setting in ("own_process=true", "threads=1", "hang_timeout_s=8")
)


def lab_config(output: Path, *overrides: str, short: Sequence[str] = SHORT) -> RunConfig:
    models = (
        f"student.model={ROOT}/models/lab/student",
        f"scoring.model={ROOT}/models/lab/teacher",
    )
    return load_config(
        ROOT / "configs" / "demo.yaml", [f"output_dir={output}", *models, *short, *overrides]
    )


def lab_run(
    output: Path, *overrides: str, adapt: Callable[[Parts], Parts] = lambda parts: parts
) -> list[str]:
    """Run the lab pair for a few steps; return the warnings."""
    config = lab_config(output, *overrides)
    warnings: list[str] = []
    assert run(config, SilentReporter(), warnings.append, adapt) is not None
    return warnings


EVALUATED = (
    *(setting for setting in SHORT if not setting.startswith("evaluation")),
    "evaluation.num_problems=20",
    "evaluation.final_num_problems=20",
)


def evaluated_run(output: Path, *overrides: str) -> Path:
    config = lab_config(output, *overrides, short=EVALUATED)
    assert run(config, SilentReporter(), raise_warning) is not None
    return output


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run in one process."""
    return evaluated_run(tmp_path_factory.mktemp("calm") / "run")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run in three processes."""
    return evaluated_run(tmp_path_factory.mktemp("apart") / "run", *OWN_PROCESSES)


def test_processes_change_nothing_bit_for_bit(calm: Path, apart: Path) -> None:
    assert student_bytes(apart) == student_bytes(calm)
    assert timeless(apart / "ledger.jsonl") == timeless(calm / "ledger.jsonl")


def test_evaluations_side_by_side_are_those_of_one_after_another(calm: Path, apart: Path) -> None:
    records, times = {}, {}
    for folder in (calm, apart):
        lines = timeless(folder / "evaluations.jsonl")
        records[folder] = sorted(lines, key=lambda line: (line["step"], line["model"]))
        each = [line["wall_s"] for line in read_jsonl(folder / "evaluations.jsonl")]
        summed = read_json(folder / "summary.json")["wall_s"]["evaluate"]
        times[folder] = summed / sum(each)
    assert len(records[calm]) == 3 * 2  # the teacher, before and after, at two temperatures
    assert records[apart] == records[calm]
    assert times[calm] == pytest.approx(1, abs=0.02)
    assert times[apart] < 0.95  # what ran side by side is counted once


# --- Starting -----------------------------------------------------------------------------------


class Starting:
    """A part whose start waits for that of another one."""

    starts_first = False

    async def memory_taken(self) -> None:
        await asyncio.sleep(0.1)
        self._seen.append(f"{self._name} has its memory")

    def __init__(self, *, after: asyncio.Event | None = None, seen: list[str], name: str) -> None:
        self.begun = asyncio.Event()
        self._after, self._seen, self._name = after, seen, name

    async def start(self) -> None:
        self._seen.append(f"{self._name} begins")
        self.begun.set()
        if self._after is not None:
            await asyncio.wait_for(self._after.wait(), 60)
        self._seen.append(f"{self._name} is there")


class StartingInTwo(Starting):
    """A part whose process starts at once, whoever has memory."""

    async def prepare(self) -> None:
        self._seen.append(f"{self._name} is prepared")


@pytest.mark.parametrize("shares", [False, True], ids=["all-three", "two-after-the-teacher"])
def test_engines_start_side_by_side_once_a_teacher_has_its_share_of_what_is_free(
    tmp_path: Path, shares: bool
) -> None:
    server = f"scoring={{kind: sglang, model: {ROOT}/models/lab/teacher}}"
    config = lab_config(tmp_path, *([server] if shares else []))
    seen: list[str] = []

    async def start() -> None:
        learner = Starting(seen=seen, name="learner")
        engine = StartingInTwo(after=learner.begun, seen=seen, name="engine")
        teacher = Starting(after=engine.begun, seen=seen, name="teacher")
        teacher.starts_first = shares
        nothing: Any = None
        await Parts(
            config=config,
            prompts=nothing,
            engine=cast(Any, engine),
            teacher=cast(Any, teacher),
            view=nothing,
            learner=cast(Any, learner),
            channel=nothing,
            text=nothing,
            verifier=None,
            teacher_sampler=nothing,
            samples_elsewhere=False,
            loads_beside_steps=False,
        ).start()

    asyncio.run(start())
    assert len(seen) == 6 + 2 * shares
    if shares:
        assert seen[:3] == ["teacher begins", "engine is prepared", "teacher has its memory"]


def local(hosted: Hosted) -> LocalProcess:
    assert isinstance(hosted.host, LocalProcess)
    return hosted.host


def test_an_engine_that_does_not_start_leaves_no_process_of_the_others(tmp_path: Path) -> None:
    started: list[LocalProcess] = []

    def adapt(parts: Parts) -> Parts:
        engine, teacher = parts.engine, parts.required_teacher
        assert isinstance(engine, HostedRolloutEngine)
        assert isinstance(teacher, HostedTeacher)
        started.extend([local(engine), local(teacher)])

        async def fail() -> None:
            while not all(worker.is_running for worker in started):  # under way, not yet there
                await asyncio.sleep(0.01)
            raise EngineStartError("the learner does not start")

        parts.learner.start = fail
        return parts

    with pytest.raises(EngineStartError, match="the learner does not start"):
        lab_run(tmp_path / "run", *OWN_PROCESSES, adapt=adapt)
    for worker in started:
        assert worker.pid is not None
        with pytest.raises(ProcessLookupError):
            os.killpg(worker.pid, 0)


# --- Each process struck once -------------------------------------------------------------------


def nothing() -> None:
    """Strikes nobody."""


def kill(worker: LocalProcess) -> None:
    worker.kill()


def stop(worker: LocalProcess) -> None:
    """Stop the process without ending it."""
    assert worker.pid is not None
    os.killpg(worker.pid, signal.SIGSTOP)


def striking(strike: Callable[[LocalProcess], None]) -> Callable[[Parts], Parts]:
    def adapt(parts: Parts) -> Parts:
        engine, teacher, learner = parts.engine, parts.required_teacher, parts.learner
        assert isinstance(engine, HostedRolloutEngine)
        assert isinstance(teacher, HostedTeacher)
        assert isinstance(learner, HostedLearner)

        def strike_learner() -> None:
            strike(local(learner))

        return struck(
            parts,
            engine=lambda: strike(local(engine)),
            teacher=lambda: strike(local(teacher)),
            learner=strike_learner,
        )

    return adapt


def assert_each_came_back(output: Path, warnings: list[str]) -> None:
    assert len([w for w in warnings if "the learner is started again" in w]) == len(warnings) == 1
    (*_, last) = read_jsonl(output / "metrics.jsonl")
    assert last["health/rollout_engine_restarts"] == 1
    assert last["score/server_restarts"] == 1


def trained(output: Path) -> list[tuple[Any, ...]]:
    """Each step's tokens, loss and gradient norm."""
    keys = ("step", "tokens/trained", "loss/objective", "optim/grad_norm")
    return [tuple(row[key] for key in keys) for row in read_jsonl(output / "metrics.jsonl")]


@pytest.mark.parametrize("strike", [kill, stop])
def test_each_process_may_die_or_hang_once_and_the_run_ends_as_if_none_had(
    tmp_path: Path, calm: Path, strike: Callable[[LocalProcess], None]
) -> None:
    output = tmp_path / "run"
    assert_each_came_back(output, lab_run(output, *OWN_PROCESSES, adapt=striking(strike)))
    assert timeless(output / "ledger.jsonl") == timeless(calm / "ledger.jsonl")
    ours, theirs = trained(output), trained(calm)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one[2:] == pytest.approx(other[2:], rel=1e-3, abs=1e-5)
    before = load_file(ROOT / "models/lab/student/model.safetensors")
    mine, calms = (load_file(folder / "student" / "model.safetensors") for folder in (output, calm))
    for name, weights in calms.items():
        assert abs(mine[name] - weights).max() < 1e-4, name
    assert max(abs(calms[name] - before[name]).max() for name in calms) > 1e-3


@pytest.mark.parametrize("strike", [kill, stop])
def test_streaming_loses_no_rollout_and_trains_on_none_twice_when_processes_are_struck(
    tmp_path: Path, strike: Callable[[LocalProcess], None]
) -> None:
    output = tmp_path / "run"
    warnings = lab_run(output, *OWN_PROCESSES, STREAMING, adapt=striking(strike))
    assert_each_came_back(output, warnings)
    entries = [
        entry
        for record in read_jsonl(output / "ledger.jsonl")
        for entry in f"{record['trained']} {record['dropped']}".split()
    ]
    numbers = sorted(int(entry.partition(":")[0]) for entry in entries)
    assert numbers == list(range(STEPS * ROLLOUTS))


# --- What a run leaves behind, and what it is asked ---------------------------------------------


def test_a_run_that_was_asked_to_stop_stops_though_the_learner_is_lost_then(
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"

    def adapt(parts: Parts) -> Parts:
        learner = parts.learner
        assert isinstance(learner, HostedLearner)

        def stop_and_kill() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            learner.host.kill()

        return struck(parts, engine=nothing, teacher=nothing, learner=stop_and_kill)

    warnings: list[str] = []
    config = lab_config(output, *OWN_PROCESSES)
    assert run(config, SilentReporter(), warnings.append, adapt) is None
    assert len(warnings) == 1
    assert "lost while the run was stopping" in warnings[0]
    assert lab_run(output, *OWN_PROCESSES) == []
    assert [row["step"] for row in read_jsonl(output / "metrics.jsonl")] == list(
        range(1, STEPS + 1)
    )


def test_weights_that_a_killed_run_left_in_memory_go_when_it_is_started_again(
    tmp_path: Path,
) -> None:
    config = lab_config(tmp_path / "run", "generation.own_process=true")
    left = run_channel_folder(config)
    assert left is not None
    (left / "step-000001-abc").mkdir()
    assert run_channel_folder(lab_config(tmp_path / "other", "generation.own_process=true")) != left
    assert run_channel_folder(config) == left
    assert list(left.iterdir()) == []
    assert run_channel_folder(lab_config(tmp_path / "run")) is None  # none travel


@pytest.mark.parametrize("alone", [True, False])
def test_evaluating_the_teacher_leaves_this_process_its_threads(
    tmp_path: Path, alone: bool
) -> None:
    """The teacher's threads apply only where nothing else computes in this process."""
    learner = ("training.own_process=true",) if alone else ()
    scoring = ("scoring.own_process=true", "scoring.threads=1")
    config = lab_config(tmp_path, "generation.own_process=true", *scoring, *learner)
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    async def look() -> int:
        nobody: Any = None
        async with teacher_sampler(config, nobody):
            return torch.get_num_threads()

    try:
        assert asyncio.run(look()) == (1 if alone else 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
