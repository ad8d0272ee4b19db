"""Measures parts of one arm of `speed/cluster.py`, with engines that are started once."""

import argparse
import asyncio
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lib.cards import peak_memory
from benchmarks.lib.cluster_parts import append_log, ledger_check, member_rates, role_idle
from benchmarks.lib.common import Report, timed
from benchmarks.lib.overlap_parts import FEWEST_STEPS
from benchmarks.lib.random_work import Work
from benchmarks.speed.overlap import Bench, RandomPrompts, StopsAfter, TooFewSteps
from qwen3_distill.config import LoraTuning, RunConfig, TaskPrompts
from qwen3_distill.config.load import load_config
from qwen3_distill.generation.fleet import RolloutFleet
from qwen3_distill.hosts.mps import PIPE_VARIABLE, MpsDaemon, private_mps
from qwen3_distill.hosts.ray_host import RayHost
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.pipeline.assembly.engines import build_parts
from qwen3_distill.pipeline.assembly.plan import engine_log
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.step import push_weights
from qwen3_distill.scoring.fleet import TeacherFleet
from qwen3_distill.training.group import GroupLearner
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.weights.adapter_files import version_name

_STRIKE_AFTER, _STEPS_AFTER_RETURN = 2, 2
_FLOAT32 = 4
_HANDLES = ".pickle"
_WARM_UP = ((32, 512), (32, 300), (1, 1024), (1, 700))
"""Sequences a rank and new tokens of the learner's first steps. Kernels may be compiled anew for a
second shape, and for a first micro-batch of a single row, which long tails bring."""
_MEMORY = ("train/peak_memory_gib", "train/held_memory_gib", "train/memory_retries")
_STOPS = ("train/compiled_graphs", "train/allocator_retries")
"""Counters of the learner's process: what may have stopped a step."""


class StopsInTime(StopsAfter):
    """Stops a run after a step, or at the end of the time."""

    def __init__(self, last_step: int, ends: float) -> None:
        super().__init__(last_step)
        self._ends = ends

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        found = {key: values[key] for key in (*_MEMORY, *_STOPS) if values.get(key) is not None}
        print(f"step {step}: {values.get('time/step_s')} s {found}", flush=True)
        super().step(step, values)
        if time.time() >= self._ends and self.recorder is not None:
            self.recorder.stop_requested = True


class Strikes(StopsInTime):
    """Kills a rollout replica's process, and stops some steps after it serves again."""

    def __init__(self, first_step: int, last_step: int, ends: float, fleet: RolloutFleet) -> None:
        super().__init__(last_step, ends)
        self._strike_at = first_step + _STRIKE_AFTER
        self._fleet = fleet
        self._steps_since = 0
        self.struck_at: float | None = None
        self.served_again_s: float | None = None

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        super().step(step, values)
        if self.struck_at is None:
            if step >= self._strike_at:
                print("a replica is killed", flush=True)
                self.struck_at = time.time()
                host_of(self._fleet.replicas[-1]).kill()
            return
        if self._fleet.state.num_restarts and not self._fleet.awaited:
            if self.served_again_s is None:
                self.served_again_s = time.time() - self.struck_at
                print(f"it serves again after {self.served_again_s:.0f} s", flush=True)
            self._steps_since += 1
        if self._steps_since > _STEPS_AFTER_RETURN and self.recorder is not None:
            self.recorder.stop_requested = True


def host_of(engine: Any) -> Any:
    return engine.host


def hosts_of(parts: Parts) -> list[RayHost]:
    """Return the hosts that are in a cluster."""
    engines: list[Any] = []
    if isinstance(parts.engine, RolloutFleet):
        engines += parts.engine.replicas
    if isinstance(parts.teacher, TeacherFleet):
        engines += parts.teacher.teachers
    learner = parts.learner
    if isinstance(learner, GroupLearner):
        engines += learner.ranks
    elif isinstance(learner, HostedLearner):
        engines.append(learner)
    return [engine.host for engine in engines if isinstance(engine.host, RayHost)]


class Traffic:
    """Bytes that a step moves: counted calls, and the files of a version and sums of gradients."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._before = self._calls()

    def per_step(self, steps: int) -> dict[str, float]:
        """Return bytes of a step since the last call, by kind."""
        now = self._calls()
        calls, self._before = (now - self._before) / steps, now
        found = {
            "calls": calls,
            "versions": float(self._version_bytes()),
            "gradients": float(self._gradient_bytes()),
        }
        return found | {"all": sum(found.values())}

    def _calls(self) -> int:
        return sum(host.bytes_sent + host.bytes_received for host in hosts_of(self._parts))

    def _version_bytes(self) -> int:
        """Bytes of the newest version's files; by CUDA IPC these are handles only."""
        folder = self._parts.scratch
        if folder is None or self._parts.config.cluster is None:
            return 0
        newest = version_name(self._parts.learner.version)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return sum(
            path.stat().st_size
            for path in files
            if path.parent.name == newest or path.suffix == _HANDLES
        )

    def _gradient_bytes(self) -> int:
        """Bytes that all ranks send to add up the adapters' gradients, in a ring."""
        config, learner = self._parts.config, self._parts.learner
        tuning = config.training.tuning
        if not isinstance(learner, GroupLearner) or not isinstance(tuning, LoraTuning):
            return 0
        shape = read_shape(config.student.model)
        sizes = sum(rows + columns for rows, columns in shape.linear_layers.values())
        parameters = shape.num_layers * tuning.rank * sizes
        return 2 * (len(learner.ranks) - 1) * parameters * _FLOAT32


async def start(parts: Parts, stagger_s: float) -> None:
    """Reserve the places, then start all engines, one kind some seconds after the other."""

    def say(text: str) -> None:
        print(text, flush=True)

    places_s = 0.0
    if parts.cluster is not None:
        _, places_s = await timed(parts.cluster.start(say))

    async def later(delay_s: float, engine: Any) -> None:
        await asyncio.sleep(delay_s)
        _, start_s = await timed(engine.start())
        say(f"{type(engine).__name__} started in {start_s:.0f} s")
        if engine is parts.learner:
            _, warm_s = await timed(warm_up(parts))
            say(f"the learner's first steps took {warm_s:.0f} s")

    engines = (parts.required_teacher, parts.engine, parts.learner)
    starts = (later(index * stagger_s, engine) for index, engine in enumerate(engines))
    _, engines_s = await timed(asyncio.gather(*starts))
    version, publish_s = await timed(parts.learner.publish(parts.channel))
    _, load_s = await timed(push_weights(parts))
    say(
        f"{version}: places after {places_s:.1f} s, engines after {engines_s:.1f}, published in "
        f"{publish_s:.1f}, published and loaded in {load_s:.1f}"
    )


async def warm_up(parts: Parts) -> None:
    """Have the learner compile what it needs, by small steps, while other engines still load."""
    learner = parts.learner
    num_ranks = len(learner.ranks) if isinstance(learner, GroupLearner) else 1
    for per_rank, new_tokens in _WARM_UP:
        work = Work(
            config=parts.config,
            sequences=per_rank * num_ranks,
            prompt_tokens=128,
            new_tokens=new_tokens,
            rounds=1,
            opd_steps=0,
            vocab_size=learner.identity.vocab_size,
        )
        await learner.update(work.batch(work.sequences))


async def measure(arguments: argparse.Namespace) -> bool:
    """Start the engines and measure the parts; return whether all of them count."""
    config = config_of(arguments)
    shutil.rmtree(config.output_path, ignore_errors=True)  # of a command that was cut short
    parts = build_parts(config, lambda message: print(message, flush=True))
    vocab_size = parts.learner.identity.vocab_size
    parts = replace(parts, prompts=RandomPrompts(arguments.prompt_tokens, vocab_size))
    report = Report("cluster-arm", config.output_path)
    bench = Bench(parts, report, arguments.median_tokens, arguments.max_tokens)
    is_complete = True
    with peak_memory() as peaks:
        async with AsyncExitStack() as stack:
            if config.pipeline.mps:
                daemon = MpsDaemon(engine_log(config, "mps"))
                await stack.enter_async_context(private_mps(daemon, print))
            stack.push_async_callback(parts.close)
            _, start_s = await timed(start(parts, arguments.stagger_s))
            print(f"started after {start_s:.0f} s", flush=True)
            for part in arguments.parts.split(","):
                try:
                    found = await measure_part(arguments, bench, part)
                except TooFewSteps as error:
                    print(f"{part} is not recorded: {error}", flush=True)
                    is_complete = False
                    continue
                append_log(
                    arguments.log,
                    {
                        "arm": arguments.arm,
                        "part": part,
                        "cards": arguments.cards,
                        "overrides": arguments.overrides,
                        "start_s": start_s,
                        "mps": bool(os.environ.get(PIPE_VARIABLE)),
                        "peaks_gib": list(peaks),
                        **found,
                    },
                )
                print(f"{arguments.arm}:{part} {found['tok_s']:,.0f} tok/s", flush=True)
    return is_complete


def config_of(arguments: argparse.Namespace) -> RunConfig:
    config = load_config(arguments.config, arguments.overrides)
    name = f"{arguments.arm}-{arguments.parts}".replace(",", "-").replace("@", "-")
    return config.model_copy(
        update={
            "prompts": TaskPrompts(kind="task"),
            "verifier": None,
            "evaluation": None,
            # Of its own: arms may run concurrently, and a folder holds one run.
            "output_dir": str(Path(config.output_dir) / name),
        }
    )


async def measure_part(arguments: argparse.Namespace, bench: Bench, part: str) -> dict[str, Any]:
    """Measure one part on the running engines.

    Raises:
        TooFewSteps: the time was over before enough steps counted.
    """
    parts = bench.parts
    lengths = part if part.startswith("longtail") else "fixed"
    kind = "sequential" if part == "sequential" else "streaming"
    steps, skip = arguments.steps, arguments.skip
    if lengths != "fixed":
        steps, skip = arguments.longtail_steps, arguments.longtail_skip
    if kind == "sequential":
        steps, skip = max(2, steps // 3), 1
    first = parts.learner.version.step
    stops = StopsInTime(first + steps, arguments.ends)
    if part == "struck":
        if not isinstance(parts.engine, RolloutFleet) or len(parts.engine.replicas) < 2:
            raise TooFewSteps("no replica can be killed: the arm has one rollout engine")
        steps, skip = arguments.struck_steps, 0
        stops = Strikes(first, first + steps, arguments.ends, parts.engine)
    traffic = Traffic(parts)
    label = f"{arguments.arm}-{part}"
    found = await bench.pipeline(kind, lengths, steps, label, skip=skip, stops=stops)
    least = 1 if kind == "sequential" else FEWEST_STEPS
    if found["steps"] < least:
        raise TooFewSteps(f"{found['steps']} steps count, {least} are needed")
    return {**found, "lengths": lengths, "kind": kind, **recorded(bench, stops, traffic, skip)}


def recorded(bench: Bench, stops: StopsAfter, traffic: Traffic, skip: int) -> dict[str, Any]:
    """Return what the last part's files say: ledger, engines, bytes, and the fault if any."""
    last = bench.last
    assert last is not None, "a part was measured"
    samples = bench.parts.config.samples_per_prompt
    drawn = last.cursor.prompts_drawn * samples
    members = member_rates(last.steps[skip:])
    found: dict[str, Any] = {
        "struck": isinstance(stops, Strikes) and stops.struck_at is not None,
        "ledger": ledger_check(last.ledger, last.first_number, drawn, last.cursor.outstanding),
        "members": members,
        "role_idle": role_idle(members, last.steps[skip:]),
        "bytes_per_step": traffic.per_step(len(last.steps)),
        "restarts": last.steps[-1].get("health/rollout_engine_restarts", 0),
        "learner": {key: max(step.get(key) or 0.0 for step in last.steps) for key in _MEMORY},
        "learner_by_step": {
            key: [step.get(key) for step in last.steps] for key in ("time/train_s", *_STOPS)
        },
    }
    if isinstance(stops, Strikes):
        found["served_again_s"] = stops.served_again_s
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*")
    for name in ("config", "arm", "parts"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--log", type=Path, required=True)
    for name in ("ends", "stagger-s"):
        parser.add_argument(f"--{name}", type=float, required=True)
    for name in ("cards", "steps", "longtail-steps", "skip", "longtail-skip", "struck-steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("prompt-tokens", "median-tokens", "max-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_intermixed_args()
    sys.exit(0 if asyncio.run(measure(arguments)) else 1)


if __name__ == "__main__":
    main()
