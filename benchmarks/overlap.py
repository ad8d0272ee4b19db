"""Sequential, streaming and one model at a time: the same engines, the same rollouts, one run.

    python benchmarks/overlap.py --config configs/h200.yaml --lengths fixed:3,longtail8:4 \
        --swapping longtail8 student.model=models/random-4B scoring.model=models/random-8B

Every rollout has a length of its own, drawn by its number: ``fixed`` is `sampling.max_new_tokens`
for all; ``longtail8`` is lognormal with a median of ``--median-tokens`` and a 99th percentile of 8
times as much (``longtail16``: 16 times), cut at ``--max-tokens``. Models must not stop by
themselves: random weights hardly ever do; with ``--ignore-eos`` copies of the models are used that
name an end-of-sequence token which is never sampled.

``NAME:STEPS`` measures so many steps of a distribution. Both pipelines train on the same rollouts,
from the first request to the last weights in use: what streaming needs to fill and to drain its
stages is in its time. A warm-up step of the same lengths comes before.

``--swapping NAME`` measures one step of that distribution in which only one model is loaded at a
time: start the rollout engine, generate, end it, and so on, all caches of compiled code warm.

The trace of every run lies in ``<output_dir>/<name>-<pipeline>/trace.json``.
"""

import argparse
import asyncio
import json
import math
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS
from device_memory import PeakMemory
from qwen3_distill.config import (
    LoggingConfig,
    RunConfig,
    SequentialPipeline,
    StreamingPipeline,
    TaskPrompts,
)
from qwen3_distill.config_io import load_config
from qwen3_distill.pipeline.build import Parts, build_parts
from qwen3_distill.pipeline.recorder import Recorder
from qwen3_distill.pipeline.requests import requests_for_step
from qwen3_distill.pipeline.run_folder import RunFolder
from qwen3_distill.pipeline.sequential import generate, push_weights, run_sequential, score
from qwen3_distill.pipeline.streaming import run_streaming
from qwen3_distill.reporting.console import SilentReporter
from qwen3_distill.reporting.metrics import read_jsonl
from qwen3_distill.types import Prompt, Rollout, RolloutRequest, RunCursor
from qwen3_distill.utils.seeds import derive_seed
from qwen3_distill.weights.directory import DirectoryChannel
from stages import Report, start_side_by_side, timed

Z_99 = 2.326348


@dataclass(frozen=True)
class Lengths:
    """How many new tokens a rollout has, by its id."""

    name: str
    median_tokens: int
    max_tokens: int

    first_step: int = 0
    """Of the run: every run draws the same lengths."""

    def of(self, rollout_id: str) -> int:
        if self.name == "fixed":
            return self.median_tokens
        ratio = float(self.name.removeprefix("longtail"))
        step, _, rest = rollout_id.removeprefix("step-").partition("/")
        seed = derive_seed(0, "length", int(step) - self.first_step, rest)
        normal = np.random.Generator(np.random.PCG64(seed)).standard_normal()
        tokens = self.median_tokens * math.exp(normal * math.log(ratio) / Z_99)
        return int(min(max(tokens, 1), self.max_tokens))


class ForcedLengths:
    """A rollout engine that is asked for other lengths; all else is the engine's own."""

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
    """Prompt n is so many random tokens, always the same ones."""

    tokens: int
    vocab_size: int

    def take(self, start: int, count: int) -> list[Prompt]:
        return [self._prompt(number) for number in range(start, start + count)]

    def _prompt(self, number: int) -> Prompt:
        rng = np.random.Generator(np.random.PCG64(derive_seed(0, "prompt", number)))
        ids = rng.integers(0, self.vocab_size, self.tokens)
        return Prompt(prompt_id=f"random:{number}", token_ids=ids)


@dataclass
class Bench:
    """Engines that run, and what is measured on them."""

    parts: Parts
    report: Report
    median_tokens: int
    max_tokens: int
    max_staleness_steps: int

    def engine(self, name: str, first_step: int) -> Any:
        fixed = self.parts.config.sampling.max_new_tokens
        median = fixed if name == "fixed" else self.median_tokens
        return ForcedLengths(self.parts.engine, Lengths(name, median, self.max_tokens, first_step))

    async def pipeline(self, kind: str, name: str, steps: int, label: str) -> dict[str, float]:
        """Seconds and tokens of some steps; the rollouts are those of the numbers asked for."""
        config = self.run_config(kind, steps, label)
        version = self.parts.learner.version
        engine = self.engine(name, version.step)
        parts = replace(self.parts, config=config, engine=engine)
        # Prompts that no run before had: nothing of them is in the teacher's cache.
        drawn = version.step * config.prompts_per_step
        cursor = RunCursor(step=version.step, prompts_drawn=drawn, weight_version=version)
        run = run_streaming if kind == "streaming" else run_sequential
        shutil.rmtree(config.output_path, ignore_errors=True)
        with RunFolder(config) as folder, PeakMemory() as memory:
            recorder = Recorder(parts, folder, SilentReporter(), start_step=version.step)
            try:
                _, seconds = await timed(run(parts, recorder, cursor))
            finally:
                recorder.close()
            records = read_jsonl(folder.metrics)
        tokens = sum(record["tokens/trained"] for record in records)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tok_s": tokens / seconds,
            "steps": steps,
            "dropped": sum(record.get("staleness/dropped_rollouts", 0) for record in records),
            "age_steps": float(np.mean([r.get("staleness/age_steps", 0) for r in records])),
            "peak_beyond_gib": memory.peak_gib,
            **{
                key: float(np.mean([record.get(key) or 0.0 for record in records]))
                for key in records[-1]
                if key.startswith(("idle/", "queue/", "time/"))
            },
        }

    def run_config(self, kind: str, steps: int, label: str) -> RunConfig:
        config = self.parts.config
        pipeline = SequentialPipeline(kind="sequential", mps=config.pipeline.mps)
        if kind == "streaming":
            given = config.pipeline if config.pipeline.kind == "streaming" else None
            pipeline = given or StreamingPipeline(
                kind="streaming",
                mps=config.pipeline.mps,
                max_staleness_steps=self.max_staleness_steps,
            )
        return config.model_copy(
            update={
                "pipeline": pipeline,
                "steps": self.parts.learner.version.step + steps,
                "output_dir": str(config.output_path / label),
                "logging": LoggingConfig(tensorboard=False, rollouts_every_steps=1 << 30),
                "checkpoint": config.checkpoint.model_copy(update={"every_steps": 1 << 30}),
            }
        )

    async def compare(self, name: str, steps: int) -> None:
        """Both pipelines on the same rollouts."""
        results: dict[str, dict[str, float]] = {}
        await self.pipeline("sequential", name, 1, "warm-up")  # shapes that were not seen yet
        for kind in ("sequential", "streaming"):
            results[kind] = await self.pipeline(kind, name, steps, f"{name}-{kind}")
            print(name, kind, json.dumps(results[kind]), flush=True)
        ratio = results["streaming"]["tok_s"] / results["sequential"]["tok_s"]
        figures = {f"{name}_vs_sequential": ratio}
        if name == "fixed":
            figures["opd_tok_s_256x512"] = results["streaming"]["tok_s"]
        self.report.add(name, figures, **results)

    async def swapping(self, name: str) -> None:
        """One step with one model loaded at a time; the engines are closed afterwards."""
        parts, config = self.parts, self.parts.config
        folder = Path(tempfile.mkdtemp(prefix="qwen3-distill-overlap-", dir=shared_memory()))
        channel = DirectoryChannel(folder / "weights")
        state = folder / "state"
        state.mkdir()
        times: dict[str, float] = {}
        step = parts.learner.version.step
        engine = self.engine(name, step)
        prompts = parts.prompts.take(step * config.prompts_per_step, config.prompts_per_step)
        requests = requests_for_step(config, prompts, step)
        await parts.close()
        _, times["first_learner_start_s"] = await timed(parts.learner.start())  # not counted
        version = await parts.learner.publish(channel)
        await parts.learner.save_state(state)
        await parts.learner.close()

        _, times["start_generate_s"] = await timed(parts.engine.start())
        _, times["load_weights_s"] = await timed(parts.engine.load(version, channel))
        rollouts, times["generate_s"] = await timed(generate(engine, requests))
        _, times["end_generate_s"] = await timed(parts.engine.close())
        _, times["start_score_s"] = await timed(parts.teacher.start())
        scored, times["score_s"] = await timed(score(parts.teacher, rollouts))
        _, times["end_score_s"] = await timed(parts.teacher.close())
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
    parts = build_parts(config)
    vocab_size = parts.learner.identity.vocab_size
    parts = replace(parts, prompts=RandomPrompts(arguments.prompt_tokens, vocab_size))
    bench = Bench(
        parts, report, arguments.median_tokens, arguments.max_tokens, arguments.max_staleness_steps
    )
    try:
        with PeakMemory() as memory:
            _, start_s = await timed(start_side_by_side(parts))
            await push_weights(parts)
            for name, steps in arguments.lengths:
                await bench.compare(name, steps)
            report.add("together", {"peak_gib": memory.peak_gib}, start_s=start_s)
        if arguments.swapping:
            await bench.swapping(arguments.swapping)
    finally:
        await parts.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--lengths", type=_lengths, default=[("fixed", 3), ("longtail8", 4)])
    parser.add_argument("--swapping", help="a distribution of --lengths")
    parser.add_argument("--median-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-staleness-steps", type=int, default=8)
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
        config = given.model_copy(update=update)
        asyncio.run(measure(arguments, config, Report(arguments.name, arguments.results)))
    print(arguments.results / f"{arguments.name}.json")


def _lengths(text: str) -> list[tuple[str, int]]:
    pairs = [item.partition(":") for item in text.split(",")]
    return [(name, int(steps or 3)) for name, _, steps in pairs]


def without_eos(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Student and teacher as copies whose end-of-sequence token is the padding token."""
    copies: dict[str, str] = {}
    for role, source in (("student", config.student.model), ("teacher", config.scoring.model)):
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
        "scoring": config.scoring.model_copy(update={"model": copies["teacher"]}),
    }


if __name__ == "__main__":
    main()
