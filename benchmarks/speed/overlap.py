"""Compares the sequential and the streaming loop, and loading one model at a time, in one run.

    python -m benchmarks.speed.overlap --config configs/h200.yaml \
        --lengths longtail8:3:22:10,fixed:2:6 \
        --variants longtail8:8:pause_at_ready_steps=1 --other-mps longtail8:0:16:10 \
        --swapping longtail8 pipeline.kind=streaming pipeline.mps=true \
        student.model=models/random-4B scoring.model=models/random-8B

The length of a rollout is drawn from its number: ``fixed`` is `sampling.max_new_tokens` for all;
``longtail8`` is lognormal with a median of ``--median-tokens`` and a 99th percentile of 8 times as
much (``longtail16``: 16 times), cut at ``--max-tokens``. Models must not stop by themselves. Random
weights hardly ever do; ``--ignore-eos`` uses copies of the models whose end-of-sequence token is
never sampled.

``NAME:SEQUENTIAL:STREAMING:SKIP`` gives the number of steps to measure with a distribution. Figures
are tokens trained on over the time of these steps. All sequential steps count, after a warm-up step
of the same lengths; with long tails their times differ by their longest responses. A streaming run
first fills its stages: its first SKIP steps (default 3) do not count, and it is stopped while the
stages are full. With long tails its first steps have fewer tokens, because long responses come
later: ``tokens_and_seconds_of_steps`` in the result has every step.

With ``pipeline.mps=true`` both loops run as clients of an MPS daemon. ``--other-mps`` starts the
engines again with the opposite setting and gives ``mps_gain``, over the steps that count in both
(at least three). ``--variants NAME:STREAMING:SETTING=VALUE`` streams again on the same engines with
another setting of `pipeline`, and skips as many steps. ``--swapping NAME`` measures one step of
that distribution with one model loaded at a time: start the rollout engine, generate, end it, and
so on. Caches of compiled code on disk are warm, the processes are new.

The trace of every run is ``<output_dir>/<name>-<pipeline>/trace.json``.
"""

import argparse
import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.common import RESULTS, Report, timed
from benchmarks.lib.device_memory import PeakMemory
from benchmarks.lib.overlap_parts import (
    DEFAULT_SKIP,
    FEWEST_STEPS,
    Lengths,
    Plan,
    Variant,
    means_of_steps,
    rate_of_common_steps,
)
from benchmarks.speed.stages import start_side_by_side
from qwen3_distill.config import (
    LoggingConfig,
    RunConfig,
    SequentialPipeline,
    StreamingPipeline,
    TaskPrompts,
)
from qwen3_distill.config.load import load_config
from qwen3_distill.hosts.mps import MpsDaemon, private_mps
from qwen3_distill.pipeline.assembly.engines import build_parts
from qwen3_distill.pipeline.assembly.plan import engine_log
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.recorder import Recorder
from qwen3_distill.pipeline.requests import requests_for_step
from qwen3_distill.pipeline.run_folder import RunFolder
from qwen3_distill.pipeline.sequential import run_sequential
from qwen3_distill.pipeline.step import generate, push_weights, score
from qwen3_distill.pipeline.streaming import run_streaming
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.types import Prompt, Rollout, RolloutRequest, RunCursor
from qwen3_distill.utils.seeds import derive_seed
from qwen3_distill.weights.directory import DirectoryChannel


class ForcedLengths:
    """Wraps a rollout engine and replaces the lengths of its requests."""

    def __init__(self, engine: Any, lengths: Lengths) -> None:
        self._engine = engine
        self._lengths = lengths

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        forced = [
            replace(
                request,
                sampling=replace(
                    request.sampling, max_new_tokens=self._lengths.of(request.rollout_id)
                ),
            )
            for request in requests
        ]
        async for rollout in self._engine.generate(forced):
            yield rollout


@dataclass(frozen=True)
class RandomPrompts:
    """Random prompts; prompt n always has the same tokens."""

    tokens: int
    vocab_size: int

    def take(self, start: int, count: int) -> list[Prompt]:
        return [self._prompt(number) for number in range(start, start + count)]

    def _prompt(self, number: int) -> Prompt:
        rng = np.random.Generator(np.random.PCG64(derive_seed(0, "prompt", number)))
        ids = rng.integers(0, self.vocab_size, self.tokens)
        return Prompt(prompt_id=f"random:{number}", token_ids=ids)


class StopsAfter(SilentReporter):
    """Stops a run after a step, as Ctrl-C would."""

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step
        self.recorder: Recorder | None = None

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        if step >= self._last_step and self.recorder is not None:
            self.recorder.stop_requested = True


class TooFewSteps(Exception):
    """A run was ended before any step counted."""


@dataclass(frozen=True)
class Recorded:
    """Holds the records of a run of `Bench.pipeline`."""

    first_number: int
    """Number of the run's first rollout."""
    cursor: RunCursor
    steps: list[dict[str, Any]]
    ledger: list[dict[str, Any]]


@dataclass
class Bench:
    """Running engines, and the measurements on them."""

    parts: Parts
    report: Report
    median_tokens: int
    max_tokens: int
    suffix: str = ""
    """Suffix of the figures' names where MPS is not used as the config says."""
    drawn_steps: int = 0
    """Steps whose prompts were used; the teacher's cache holds none of later ones."""
    last: Recorded | None = None
    """Records of the last run; None before it."""

    def engine(self, name: str) -> Any:
        fixed = self.parts.config.sampling.max_new_tokens
        median = fixed if name == "fixed" else self.median_tokens
        lengths = Lengths(name, median, self.max_tokens, self.drawn_steps)
        return ForcedLengths(self.parts.engine, lengths)

    async def pipeline(
        self,
        kind: str,
        name: str,
        steps: int,
        label: str,
        *,
        skip: int = 0,
        stops: StopsAfter | None = None,
    ) -> dict[str, Any]:
        """Run some steps; return their seconds, tokens and the means of their metrics.

        Args:
            skip: number of first steps that do not count.
            stops: ends the run, ``steps`` steps later at the latest.
        """
        config = self.run_config(kind, steps, label)
        version = self.parts.learner.version
        parts = replace(self.parts, config=config, engine=self.engine(name))
        drawn = self.drawn_steps * config.prompts_per_step
        cursor = RunCursor(step=version.step, prompts_drawn=drawn, weight_version=version)
        self.drawn_steps += steps + config.max_steps_ahead + 1
        run = run_streaming if kind == "streaming" else run_sequential
        shutil.rmtree(config.output_path, ignore_errors=True)
        with RunFolder(config) as folder, PeakMemory() as memory:
            stops = stops or StopsAfter(version.step + steps)
            recorder = Recorder(parts, folder, stops, start_step=version.step)
            stops.recorder = recorder
            try:
                cursor = await run(parts, recorder, cursor)
            finally:
                recorder.close()
            records = read_jsonl(folder.metrics)
            first = drawn * config.samples_per_prompt
            self.last = Recorded(first, cursor, records, read_jsonl(folder.ledger))
        counted = records[skip:]
        if not counted:
            raise TooFewSteps(f"{label}: {len(records)} steps, and the first {skip} do not count")
        tokens = sum(record["tokens/trained"] for record in counted)
        seconds = sum(record["time/step_s"] for record in counted)
        return {
            "tok_s": tokens / seconds,
            "seconds": seconds,
            "tokens": tokens,
            "steps": len(counted),
            "first_step_s": records[0]["time/step_s"],
            "tokens_and_seconds_of_steps": [
                [record["tokens/trained"], round(record["time/step_s"], 3)] for record in records
            ],
            "skipped_steps": skip,
            "dropped": sum(r.get("staleness/dropped_rollouts", 0) for r in records),
            "mean_age_steps": float(np.mean([r.get("staleness/age_steps", 0) for r in counted])),
            "max_age_steps": max(r["weights/lag_steps"] for r in counted),
            "peak_beyond_gib": memory.peak_gib,
            **means_of_steps(counted),
        }

    def run_config(self, kind: str, steps: int, label: str) -> RunConfig:
        """The config of a run that continues after the learner's last step."""
        config = self.parts.config
        pipeline = config.pipeline if kind == "streaming" else SequentialPipeline(kind="sequential")
        ahead = config.max_steps_ahead + 1 if kind == "streaming" else 0
        return config.model_copy(
            update={
                "pipeline": pipeline,
                # More steps than are measured: near its end a run starts fewer rollouts.
                "steps": self.parts.learner.version.step + steps + ahead,
                "output_dir": str(config.output_path / label),
                "logging": LoggingConfig(tensorboard=False, rollouts_every_steps=1 << 30),
                "checkpoint": config.checkpoint.model_copy(update={"every_steps": 1 << 30}),
            }
        )

    async def compare(self, plan: Plan) -> None:
        """Measure both loops on the same distribution."""
        name, suffix, results = plan.name, self.suffix, dict[str, dict[str, Any]]()
        for kind, steps, skip in (
            ("sequential", plan.sequential_steps, 0),
            ("streaming", plan.streaming_steps, plan.skip),
        ):
            if kind == "sequential" and steps:
                await self.pipeline("sequential", name, 1, "warm-up")  # shapes not seen yet
            if steps:
                label = f"{name}-{kind}{suffix}"
                results[kind] = await self.pipeline(kind, name, steps, label, skip=skip)
                print(f"{name}{suffix}", kind, json.dumps(results[kind]), flush=True)
        self.report.add(f"{name}{suffix}", self.figures(name, results), **results)

    def figures(self, name: str, results: Mapping[str, dict[str, Any]]) -> dict[str, float]:
        """Speeds and ratios of these results; the gain of MPS if both settings were measured."""
        if "streaming" not in results:
            return {}
        streaming = results["streaming"]["tok_s"]
        figures = dict[str, float]()
        if "sequential" in results:
            figures[f"{name}_vs_sequential"] = streaming / results["sequential"]["tok_s"]
        if name == "fixed":
            config = self.parts.config
            work = f"{config.rollouts_per_step}x{config.sampling.max_new_tokens}"
            figures[f"opd_tok_s_{work}"] = streaming
        figures = {f"{key}{self.suffix}": value for key, value in figures.items()}
        other = self.report.parts.get(name, {}).get("streaming")
        if self.suffix and other:
            gain = rate_of_common_steps(other, results["streaming"])
            key = "mps_gain" if name == "longtail8" else f"mps_gain_{name}"
            if gain is None:
                print(f"no {key}: fewer than {FEWEST_STEPS} steps count in both runs", flush=True)
            else:
                figures[key] = gain if self.suffix == "_without_mps" else 1 / gain
        return figures

    async def vary(self, variant: Variant, pipeline: StreamingPipeline) -> None:
        """Stream again with the variant's pipeline."""
        parts, key = self.parts, f"{variant.name}-{variant.setting}{self.suffix}"
        self.parts = replace(parts, config=parts.config.model_copy(update={"pipeline": pipeline}))
        try:
            before = self.report.parts.get(variant.name, {}).get("streaming", {})
            skip = before.get("skipped_steps", DEFAULT_SKIP)
            steps = variant.streaming_steps
            result = await self.pipeline("streaming", variant.name, steps, key, skip=skip)
        finally:
            self.parts = parts
        print(key, json.dumps(result), flush=True)
        sequential = self.report.parts.get(variant.name, {}).get("sequential")
        figure = re.sub("[^a-z0-9]+", "_", key) + "_vs_sequential"
        ratio = {figure: result["tok_s"] / sequential["tok_s"]} if sequential else {}
        self.report.add(key, ratio, streaming=result)

    async def swapping(self, name: str) -> None:
        """Measure one step with one model loaded at a time; closes the engines."""
        parts, config = self.parts, self.parts.config
        folder = Path(tempfile.mkdtemp(prefix="qwen3-distill-overlap-", dir=shared_memory()))
        channel = DirectoryChannel(folder / "weights")
        state = folder / "state"
        state.mkdir()
        times: dict[str, float] = {}
        engine = self.engine(name)
        drawn = self.drawn_steps * config.prompts_per_step
        prompts = parts.prompts.take(drawn, config.prompts_per_step)
        requests = requests_for_step(config, prompts, self.drawn_steps)
        _, times["first_learner_start_s"] = await timed(parts.learner.start())  # not counted
        version = await parts.learner.publish(channel)
        await parts.learner.save_state(state)
        await parts.learner.close()

        _, times["start_generate_s"] = await timed(parts.engine.start())
        _, times["load_weights_s"] = await timed(parts.engine.load(version, channel))
        rollouts, times["generate_s"] = await timed(generate(engine, requests))
        _, times["end_generate_s"] = await timed(parts.engine.close())
        _, times["start_score_s"] = await timed(parts.required_teacher.start())
        scored, times["score_s"] = await timed(score(parts.required_teacher, parts.view, rollouts))
        _, times["end_score_s"] = await timed(parts.required_teacher.close())
        _, times["start_train_s"] = await timed(parts.learner.start())
        _, times["load_state_s"] = await timed(parts.learner.load_state(state, version))
        _, times["train_s"] = await timed(parts.learner.update(parts.make_batch(scored)))
        _, times["publish_s"] = await timed(parts.learner.publish(channel))
        _, times["save_state_s"] = await timed(parts.learner.save_state(state))
        _, times["end_train_s"] = await timed(parts.learner.close())
        shutil.rmtree(folder, ignore_errors=True)
        seconds = sum(times.values()) - times["first_learner_start_s"]
        tokens = sum(rollout.num_tokens for rollout in rollouts)
        streaming = self.report.parts[name]["streaming"]["tok_s"]
        self.report.add(
            f"{name}_swapping",
            {f"{name}_vs_swapping": streaming / (tokens / seconds)},
            seconds=seconds,
            tokens=tokens,
            tok_s=tokens / seconds,
            times=times,
        )


def shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


async def measure(arguments: argparse.Namespace, config: RunConfig, report: Report) -> None:
    def pipeline_of(variant: Variant) -> StreamingPipeline:
        overrides = [*arguments.overrides, f"pipeline.{variant.setting}"]
        pipeline = load_config(arguments.config, overrides).pipeline
        if not isinstance(pipeline, StreamingPipeline):
            raise SystemExit(f"--variants {variant.setting}: it must still stream")
        return pipeline

    variants = [(variant, pipeline_of(variant)) for variant in arguments.variants]
    parts = build_parts(config)
    vocab_size = parts.learner.identity.vocab_size
    parts = replace(parts, prompts=RandomPrompts(arguments.prompt_tokens, vocab_size))
    lengths = arguments.median_tokens, arguments.max_tokens
    bench = Bench(parts, report, *lengths)
    mps = config.pipeline.mps
    await together(bench, mps, arguments.lengths, variants)
    bench.suffix = "_without_mps" if mps else "_with_mps"
    await together(bench, not mps, arguments.other_mps, [])
    if arguments.swapping:
        try:
            await bench.swapping(arguments.swapping)
        finally:
            await parts.close()


async def together(
    bench: Bench,
    mps: bool,
    plans: Sequence[Plan],
    variants: Sequence[tuple[Variant, StreamingPipeline]],
) -> None:
    """Start all engines, measure, and close them."""
    if not plans and not variants:
        return
    parts = bench.parts
    daemon = MpsDaemon(engine_log(parts.config, "mps"))
    async with AsyncExitStack() as stack:
        if mps:
            await stack.enter_async_context(private_mps(daemon, refuse))
        stack.push_async_callback(parts.close)
        with PeakMemory() as memory:
            _, start_s = await timed(start_side_by_side(parts))
            await push_weights(parts)
            for plan in plans:
                await bench.compare(plan)
            for variant, pipeline in variants:
                await bench.vary(variant, pipeline)
        figures = {f"peak_gib{bench.suffix}": memory.peak_gib}
        bench.report.add(f"together{bench.suffix}", figures, start_s=start_s, mps=mps)


def refuse(reason: str) -> None:
    raise SystemExit(f"nothing is measured with MPS: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--lengths", type=Plan.parse, default=[])
    parser.add_argument("--variants", type=Variant.parse, default=[])
    parser.add_argument("--other-mps", type=Plan.parse, default=[])
    parser.add_argument("--swapping", metavar="NAME")
    parser.add_argument("--median-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--name", default="overlap", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_intermixed_args()
    given = load_config(arguments.config, arguments.overrides)
    update: dict[str, Any] = {
        "prompts": TaskPrompts(kind="task"),
        "verifier": None,
        "evaluation": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        if arguments.ignore_eos:
            update |= without_eos(given, Path(folder))
        if given.pipeline.kind != "streaming":
            parser.error("the config must say how to stream: pipeline.kind=streaming")
        config = given.model_copy(update=update)
        asyncio.run(measure(arguments, config, Report(arguments.name, arguments.results)))
    print(arguments.results / f"{arguments.name}.json")


def without_eos(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Copy student and teacher, with the padding token as their end-of-sequence token."""
    copies: dict[str, str] = {}
    for role, source in (("student", config.student.model), ("teacher", config.teacher.model)):
        target = folder / role
        shutil.copytree(source, target)
        for name in ("config.json", "generation_config.json"):
            if (target / name).exists():
                values = json.loads((target / name).read_text())
                values["eos_token_id"] = values.get("pad_token_id") or 0
                (target / name).write_text(json.dumps(values))
        copies[role] = str(target)
    return {
        "student": config.student.model_copy(update={"model": copies["student"]}),
        "scoring": config.teacher.model_copy(update={"model": copies["teacher"]}),
    }


if __name__ == "__main__":
    main()
