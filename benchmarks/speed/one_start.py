"""Measures steps of several kinds on engines that are started once, to spare minutes of starts.

    python -m benchmarks.speed.one_start --config configs/h200-streaming.yaml \\
        --name h200_one_start --measure fixed,longtail8,plan,topk16,n4 --limit-s 900 \\
        student.model=models/random-4B scoring.model=models/random-8B \\
        generation.max_model_tokens=2304 training.max_model_tokens=2304

The config streams; prompts are random tokens, and answers have the lengths that are asked for
(`speed/overlap.py`), so the models must not stop by themselves. Parts:

- the start itself: ``ready_s``, from the process's begin until the student's weights are served
- ``fixed``: all answers have `sampling.max_new_tokens`; sequential, then streaming:
  ``opd_tok_s_<rollouts>x<tokens>``, ``fixed_vs_sequential``
- ``longtail8``: lognormal lengths, median ``--median-tokens``, 99th percentile 8 times as much, cut
  at ``--max-tokens``; tokens may be ``--longtail-staleness`` steps old: ``longtail8_vs_sequential``
- ``plan``: sequential steps of other sizes, beside what `qwen3-distill plan` predicts for them and
  for the long tails: ``time_plan_error_pct``
- ``topk16``: scoring and steps with the teacher's 16 most likely tokens and with the sampled token,
  each with a learner of its own, sequential: ``score_topk16_tok_s``, ``topk16_vs_sampled_step`` and
  ``opd_topk16_tok_s``
- ``score_topk16``: the teacher's rate with the sampled token and with them, alone
- ``topk16_streaming``: scoring with them, and streaming: ``opd_topk16_streaming_tok_s``
- ``n4``: a quarter of the prompts, four answers to each, and a learner that computes a prompt once:
  ``opd_tok_s_n4``

`topk16`, `topk16_streaming` and `n4` come last: they leave a learner of another config. A part that
fails is noted, and the next begins. None begins that might end after ``--limit-s``.
"""

import argparse
import asyncio
import copy
import json
import os
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, Report, timed
from benchmarks.lib.device_memory import PeakMemory
from benchmarks.lib.overlap_parts import Plan
from benchmarks.lib.random_work import Work, for_random_work
from benchmarks.lib.stage_parts import measure_score, opd_step, stage_seconds, started_learner
from benchmarks.lib.time_plan_case import Case, Row
from benchmarks.lib.time_plan_rows import measured_rows
from benchmarks.speed.overlap import Bench, RandomPrompts, TooFewSteps, refuse
from benchmarks.speed.time_plan import error_figures
from qwen3_distill.config import (
    ObjectiveConfig,
    RunConfig,
    SampledReverseKL,
    StreamingPipeline,
    TopKDivergence,
)
from qwen3_distill.config.load import load_config
from qwen3_distill.errors import DistillError
from qwen3_distill.hosts.mps import MpsDaemon, private_mps
from qwen3_distill.pipeline.assembly.engines import build_parts
from qwen3_distill.pipeline.assembly.plan import engine_log
from qwen3_distill.pipeline.step import push_weights
from qwen3_distill.ports import CACHED_TOKENS, Learner, TeacherScorer
from qwen3_distill.recording.trace import Trace
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.types import SampledRequest, ScoreRequest, TopKRequest

_SIZES = (
    # rollouts, tokens of a prompt and of an answer, steps
    ("64 rollouts", 64, 128, 512, 2),
    ("512 short answers", 512, 128, 128, 2),
    ("long prompts", 128, 1024, 256, 2),
    ("long answers", 128, 128, 1536, 1),
)


_OF_ANOTHER_LEARNER = ("topk16", "topk16_streaming", "n4")
_TOP_16 = TopKDivergence(kind="top_k", k=16)
_FAILURES = (DistillError, TooFewSteps, RuntimeError, LookupError, ValueError, OSError)


class Session:
    """Running engines and the measurements on them."""

    def __init__(self, bench: Bench, arguments: argparse.Namespace) -> None:
        self.bench = bench
        self._arguments = arguments
        self._given = bench.parts
        self._learners = 0
        self.measures: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "fixed": (170, self.fixed),
            "longtail8": (170, self.longtail8),
            "plan": (90, self.plan),
            "score_topk16": (90, self.score_topk16),
            "topk16": (260, self.topk16),
            "topk16_streaming": (190, self.topk16_streaming),
            "n4": (170, self.n4),
        }
        """The seconds that a part may take on an H200, and what it does."""

    @property
    def report(self) -> Report:
        return self.bench.report

    async def fixed(self) -> None:
        await self.bench.compare(Plan("fixed", *self._arguments.fixed_steps))

    async def longtail8(self) -> None:
        config = self._given.config
        assert isinstance(config.pipeline, StreamingPipeline)
        older = {"max_staleness_steps": self._arguments.longtail_staleness}
        pipeline = config.pipeline.model_copy(update=older)
        self.bench.parts = replace(
            self._given, config=config.model_copy(update={"pipeline": pipeline})
        )
        try:
            await self.bench.compare(Plan("longtail8", *self._arguments.longtail_steps))
        finally:
            self.bench.parts = self._given

    async def plan(self) -> None:
        """Measure steps of other sizes; compare all with the time plan."""
        found = dict[str, Any]()
        for name, sequences, prompt_tokens, new_tokens, steps in _SIZES:
            scale = self._arguments.scale
            sizes = {
                "sequences": max(1, sequences // scale),
                "prompt_tokens": max(1, prompt_tokens // scale),
                "new_tokens": max(1, new_tokens // scale),
            }
            work = self.work(self._given.config, **sizes)
            measured, metrics = [], dict[str, float]()
            for _ in range(steps):
                trace = Trace()
                _, update = await opd_step(work, self._given, trace)
                measured.append(stage_seconds(trace))
                metrics = {metric.key: metric.total for metric in update.metrics}
            case = self.case(
                sizes["sequences"],
                prompt_tokens=sizes["prompt_tokens"],
                response_tokens=sizes["new_tokens"],
                max_new_tokens=sizes["new_tokens"],
                recomputed_layers=int(metrics.get("train/recomputed_layers", 0)),
            )
            found[name] = {"case": asdict(case), "steps": measured[-1:]}
        rows = [*measured_rows(found), *self.longtail_rows()]
        self.report.add(
            "plan", error_figures(rows), measured=found, rows=[row.as_record() for row in rows]
        )

    def case(self, sequences: int, *more: str, **lengths: Any) -> Case:
        """The case of some steps with this config, for the time plan."""
        config = self._given.config
        assert config.teacher.kind == "sglang"
        overrides = (
            f"prompts_per_step={sequences}",
            f"generation.max_sequences={config.generation.max_sequences}",
            f"training.micro_batch_tokens={config.training.micro_batch_tokens}",
            f"scoring.chunk_tokens={config.teacher.chunk_tokens}",
            *more,
        )
        objective = json.dumps(config.objective.model_dump(mode="json"))
        return Case(overrides=overrides, objective=objective, **lengths)

    def longtail_rows(self) -> list[Row]:
        """Rows of the long tails, if they were measured."""
        found, arguments = self.report.parts.get("longtail8", {}), self._arguments
        config = self._given.config
        rows = list[Row]()
        for kind in ("sequential", "streaming"):
            if kind not in found:
                continue
            pipeline = json.dumps(config.pipeline.model_dump(mode="json"))
            case = self.case(
                config.rollouts_per_step,
                *([f"pipeline={pipeline}"] if kind == "streaming" else []),
                response_tokens=arguments.median_tokens,
                max_new_tokens=arguments.max_tokens,
                tail=8.0,
            )
            rows.append(
                Row(
                    name=f"longtail8 {kind}",
                    source="measured",
                    what="step",
                    measured_s=found[kind]["time/step_s"],
                    case=case,
                )
            )
        return rows

    async def topk16(self) -> None:
        """Compare scoring and steps with the teacher's top 16 and with the sampled token."""
        teacher = self._given.required_teacher
        found = dict[str, Any]()
        for name, objective, request in (
            ("sampled", SampledReverseKL(kind="sampled_reverse_kl"), SampledRequest()),
            ("topk16", _TOP_16, TopKRequest(k=16)),
        ):
            config = self._given.config.model_copy(update={"objective": objective})
            asked = asking(teacher, request)
            what = "score" if name == "sampled" else "score_topk16"
            await self.score(what, objective, request)
            await self.use(config, asked)
            found[name] = await self.sequential(name)
        dense, sampled = found["topk16"], found["sampled"]
        ratio = dense["seconds"] / dense["steps"] / (sampled["seconds"] / sampled["steps"])
        figures = {"topk16_vs_sampled_step": ratio, "opd_topk16_tok_s": dense["tok_s"]}
        self.report.add("topk16", figures, **found)

    async def score_topk16(self) -> None:
        """Score with the sampled token and with the teacher's top 16."""
        await self.score("score", SampledReverseKL(kind="sampled_reverse_kl"), SampledRequest())
        await self.score("score_topk16", _TOP_16, TopKRequest(k=16))

    async def score(self, name: str, objective: ObjectiveConfig, request: ScoreRequest) -> None:
        config = self._given.config.model_copy(update={"objective": objective})
        asked = asking(self._given.required_teacher, request)
        # Two rounds differed by a tenth.
        work = replace(self.work(config), rounds=4)
        await measure_score(work, self.report, asked, name)

    async def topk16_streaming(self) -> None:
        """Score with the teacher's top 16, then stream with them."""
        config = self._given.config.model_copy(update={"objective": _TOP_16})
        asked = asking(self._given.required_teacher, TopKRequest(k=16))
        if "score_topk16_tok_s" not in self.report.figures:
            await self.score("score_topk16", _TOP_16, TopKRequest(k=16))
        if self.bench.parts.config.objective != _TOP_16:  # else `topk16` has left such a learner
            await self.use(config, asked)
        _, steps, skip = self._arguments.fixed_steps
        streaming = await self.bench.pipeline("streaming", "fixed", steps, "topk16", skip=skip)
        figures = {"opd_topk16_streaming_tok_s": streaming["tok_s"]}
        self.report.add("topk16_streaming", figures, streaming=streaming)

    async def sequential(self, label: str) -> dict[str, Any]:
        await self.bench.pipeline("sequential", "fixed", 1, "warm-up")
        return await self.bench.pipeline("sequential", "fixed", 2, label)

    async def n4(self) -> None:
        """Stream with four answers to a prompt, which the learner computes once."""
        config = self._given.config
        training = config.training.model_copy(update={"shared_prompts": True})
        fewer = {
            "samples_per_prompt": 4,
            "prompts_per_step": config.rollouts_per_step // 4,
            "training": training,
        }
        await self.use(config.model_copy(update=fewer), self._given.required_teacher)
        before = dict(self.bench.parts.counters)
        _, steps, skip = self._arguments.fixed_steps
        found = await self.bench.pipeline("streaming", "fixed", steps, "n4", skip=skip)
        cached = self.bench.parts.counters.get(CACHED_TOKENS, 0) - before.get(CACHED_TOKENS, 0)
        describe = getattr(self.bench.parts.learner, "describe", dict)
        self.report.add(
            "n4",
            {"opd_tok_s_n4": found["tok_s"]},
            streaming=found,
            teacher_cached_tokens=cached,
            learner={str(key): str(value) for key, value in describe().items()},
        )

    async def use(self, config: RunConfig, teacher: TeacherScorer) -> None:
        """Start a learner of this config in place of the one before."""
        await self.bench.parts.learner.close()
        self._learners += 1  # its log needs a folder in which there are no runs yet
        folder = str(config.output_path / f"learner-{self._learners}")
        learner: Learner
        learner, start_s = await started_learner(config.model_copy(update={"output_dir": folder}))
        print(f"another learner after {start_s:.1f} s", flush=True)
        changes: dict[str, Any] = {"config": config, "teacher": teacher, "learner": learner}
        self.bench.parts = replace(self.bench.parts, **changes)
        self._given = replace(self._given, learner=learner)  # the one before has ended

    def work(self, config: RunConfig, **sizes: int) -> Work:
        defaults = {
            "sequences": config.rollouts_per_step,
            "prompt_tokens": self._arguments.prompt_tokens,
            "new_tokens": config.sampling.max_new_tokens,
        }
        vocab_size = self._given.learner.identity.vocab_size
        all_sizes = defaults | sizes
        return Work(
            config=config,
            sequences=all_sizes["sequences"],
            prompt_tokens=all_sizes["prompt_tokens"],
            new_tokens=all_sizes["new_tokens"],
            rounds=2,
            opd_steps=1,
            vocab_size=vocab_size,
        )


def asking(teacher: TeacherScorer, request: ScoreRequest) -> TeacherScorer:
    """Return the teacher with another request to the same server."""
    assert isinstance(teacher, ServedTeacher)
    other = copy.copy(teacher)
    other._request = request
    return other


def seconds_of_process() -> float:
    """Seconds since this process began."""
    with Path("/proc/self/stat").open() as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


async def measure(arguments: argparse.Namespace, config: RunConfig, report: Report) -> None:
    daemon = MpsDaemon(engine_log(config, "mps"))
    async with AsyncExitStack() as stack:
        if config.pipeline.mps:
            await stack.enter_async_context(private_mps(daemon, refuse))
        parts = build_parts(config)
        prompts = RandomPrompts(arguments.prompt_tokens, parts.learner.identity.vocab_size)
        bench = Bench(
            replace(parts, prompts=prompts), report, arguments.median_tokens, arguments.max_tokens
        )
        stack.push_async_callback(lambda: bench.parts.close())
        with PeakMemory() as memory:
            _, start_s = await timed(bench.parts.start(lambda text: print(text, flush=True)))
            await push_weights(bench.parts)
            ready = {arguments.ready_figure: seconds_of_process()}
            report.add("start", ready, start_s=start_s, mps=config.pipeline.mps)
            session = Session(bench, arguments)
            for name in arguments.measure:
                most_s, work = session.measures[name]
                if seconds_of_process() + most_s > arguments.limit_s:
                    print(f"{name}: not begun, it might take {most_s} s", flush=True)
                    continue
                try:
                    await work()
                except _FAILURES as error:  # the others may still be measured
                    traceback.print_exc()
                    report.add(f"{name}_failed", {}, error=str(error)[:500])
                print(f"{name} ended after {seconds_of_process():.0f} s", flush=True)
            report.add("memory", {"streaming_peak_gib": memory.peak_gib})


def main() -> None:
    arguments = parse()
    given = load_config(arguments.config, arguments.overrides)
    config = for_random_work(given)
    if not isinstance(config.pipeline, StreamingPipeline):
        raise SystemExit(f"{arguments.config} does not stream: pipeline.kind=streaming")
    if config.samples_per_prompt > 1:
        raise SystemExit("samples_per_prompt: expected 1: of the parts, n4 alone has several")
    report = Report(arguments.name, arguments.results)
    asyncio.run(measure(arguments, config, report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    names = ("fixed", "longtail8", "plan", "score_topk16", *_OF_ANOTHER_LEARNER)
    default = [name for name in names if name != "score_topk16"]  # `topk16` measures it as well
    parser.add_argument("--measure", type=lambda text: text.split(","), default=default)
    parser.add_argument("--limit-s", type=float, default=3600)
    steps = "SEQUENTIAL:STREAMING:SKIP"
    parser.add_argument("--fixed-steps", type=numbers, default=(2, 7, 3), metavar=steps)
    parser.add_argument("--longtail-steps", type=numbers, default=(3, 18, 8), metavar=steps)
    parser.add_argument("--longtail-staleness", type=int, default=24)
    parser.add_argument("--median-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--scale", type=int, default=1, help="divides the sizes of `plan`")
    parser.add_argument("--ready-figure", default="ready_s")
    parser.add_argument("--name", default="one_start", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_intermixed_args()
    if unknown := set(arguments.measure) - set(names):
        parser.error(f"--measure: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    changing = [name in _OF_ANOTHER_LEARNER for name in arguments.measure]
    if changing != sorted(changing):
        last = ", ".join(_OF_ANOTHER_LEARNER)
        parser.error(f"--measure: {last} leave another learner; name them last")
    return arguments


def numbers(text: str) -> tuple[int, ...]:
    """Numbers with colons between them."""
    return tuple(map(int, text.split(":")))


if __name__ == "__main__":
    main()
