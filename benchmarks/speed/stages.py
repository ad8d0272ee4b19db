"""Tokens/s and memory of every stage, and of the sequential loop, for any config.

    python -m benchmarks.speed.stages --config configs/h200.yaml --parts generate,score,train,opd \
        student.model=models/random-4B scoring.model=models/random-8B
    python -m benchmarks.speed.stages --config configs/h200.yaml --parts resident \
        student.model=models/random-4B scoring.model=models/random-32B-FP8 scoring.quantization=null

Prompts are random tokens, and random models hardly ever stop by themselves, so lengths are what is
asked for. What is counted is what was really generated. Results are written into one file as they
come; a part that is measured again replaces its figures, so the parts may be run one by one.

- `generate`: the rollout engine alone, serving the student's own weights.
- `score`: the teacher alone; also the same requests, made beforehand and sent without looking at
  the answers, by as many connections: what our client costs.
- `train`: the learner alone, without gradient checkpointing (micro-batches of 8 sequences; with
  `--together` the config's), with it (of 32), and as the config says, with the memory that the plan
  leaves.
- `opd`: all three resident; whole steps of the loop, stage by stage, weights pushed every step.
- `resident`: the same for one step, for the memory of a larger teacher.
- `trl`: `benchmarks/speed/trl_distillation.py` in an interpreter with TRL and vLLM.

With `--together` all engines are started once, side by side, and every part but `trl` is measured
on them; `resident` then puts the teacher of `--resident-teacher` in the place of the first. It
costs minutes less, and asks for settings that leave room while one loads beside another
(`scoring.memory_fraction` well above what the plan says).
"""

import argparse
import asyncio
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.lib.common import RESULTS, command_line, write_result
from benchmarks.lib.device_memory import PeakMemory
from qwen3_distill.config import (
    EmbeddedTraining,
    LoraTuning,
    RunConfig,
    TaskPrompts,
    UnslothTraining,
)
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline.assembly.engines import build_learner, build_parts, static_engine
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.assembly.teachers import build_teacher
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.step import generate, push_weights, score
from qwen3_distill.ports import Learner, RolloutEngine, TeacherScorer
from qwen3_distill.recording.jsonl import STEP_STAGES
from qwen3_distill.recording.trace import Trace
from qwen3_distill.scoring.score_request import TopKRequest, request_for
from qwen3_distill.scoring.sglang.teacher import SglangTeacher, request_groups
from qwen3_distill.scoring.sglang.wire import TokenSequence, score_body
from qwen3_distill.types import (
    Batch,
    FinishReason,
    Prompt,
    Rollout,
    RolloutRequest,
    ScoredRollout,
    TeacherScore,
    TopKScore,
    Update,
    VersionSpan,
    WeightVersion,
)

PARTS = ("generate", "score", "train", "opd", "resident", "trl")


@dataclass(frozen=True)
class Work:
    """How much is measured, and random numbers for it."""

    config: RunConfig
    sequences: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    opd_steps: int
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    vocab_size: int = 0

    def ids(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.vocab_size, count).astype(np.int32)

    def prompt(self) -> Prompt:
        """A prompt that was never seen before: no cache holds it."""
        name = f"random:{self.rng.integers(1 << 62)}"
        return Prompt(prompt_id=name, token_ids=self.ids(self.prompt_tokens))

    def requests(self, count: int, new_tokens: int) -> list[RolloutRequest]:
        """``samples_per_prompt`` requests for each prompt."""
        samples = self.config.samples_per_prompt
        sampling = self.config.sampling.model_copy(update={"max_new_tokens": new_tokens})
        prompts = [self.prompt() for _ in range(-(-count // samples))]
        requests = [
            RolloutRequest(
                rollout_id=f"{prompt.prompt_id}/{sample}",
                prompt=prompt,
                sampling=sampling.spec(int(self.rng.integers(1 << 31))),
            )
            for prompt in prompts
            for sample in range(samples)
        ]
        return requests[:count]

    def rollouts(self, count: int) -> list[Rollout]:
        """Rollouts that nobody sampled: random tokens, as likely as any other."""
        version = WeightVersion(step=0, digest="random")
        return [
            Rollout(
                rollout_id=request.rollout_id,
                prompt=request.prompt,
                sampling=request.sampling,
                response_ids=self.ids(self.new_tokens),
                behavior_logprobs=np.full(self.new_tokens, -np.log(self.vocab_size)),
                versions=(VersionSpan(start=0, stop=self.new_tokens, version=version),),
                finish_reason=FinishReason.LENGTH,
            )
            for request in self.requests(count, self.new_tokens)
        ]

    def batch(self, count: int) -> Batch:
        """Random rollouts with scores of the kind that the objective needs."""
        request = request_for(self.config.objective)
        scored = []
        for rollout in self.rollouts(count):
            tokens = rollout.num_tokens
            logprobs = rollout.behavior_logprobs + 0.1 * self.rng.standard_normal(tokens)
            score = TeacherScore(teacher_id="random", logprobs=logprobs)
            if isinstance(request, TopKRequest):
                ids = np.stack([self.ids(request.k) for _ in range(tokens)])
                ids = (ids[:, :1] + np.arange(request.k)) % self.vocab_size  # distinct
                score = TopKScore(
                    teacher_id="random",
                    logprobs=logprobs,
                    candidate_ids=ids,
                    candidate_logprobs=np.full(ids.shape, -np.log(self.vocab_size)),
                )
            scored.append(ScoredRollout(rollout=rollout, score=score))
        return Batch.uniform(scored)


@dataclass
class Report:
    """Figures and details, written whenever there are new ones."""

    name: str
    folder: Path
    figures: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file = self.folder / f"{self.name}.json"
        if file.exists():
            earlier = json.loads(file.read_text())
            self.figures, self.parts = earlier["figures"], earlier["parts"]

    def add(self, part: str, figures: dict[str, float], **details: Any) -> None:
        self.figures |= {key: round(value, 4) for key, value in figures.items()}
        known = self.parts.get(part, {})
        self.parts[part] = known | {"command": command_line(), **figures, **details}
        print(part, json.dumps(figures | details, default=str), flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_result(self.name, self.figures, folder=self.folder, parts=self.parts)


def total_tokens(rollouts: Sequence[Rollout]) -> int:
    """Prompts included: what a forward pass sees."""
    return sum(r.num_tokens + int(r.prompt.token_ids.size) for r in rollouts)


async def timed(work: Awaitable[Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = await work
    return result, time.perf_counter() - began


# --- Parts --------------------------------------------------------------------------------------


async def measure_generate(work: Work, report: Report, engine: RolloutEngine) -> None:
    """New tokens a second with all sequences decoded together."""
    await generate(engine, work.requests(work.sequences, min(32, work.new_tokens)))  # warm-up
    tokens, seconds = 0, 0.0
    for _ in range(work.rounds):
        requests = work.requests(work.sequences, work.new_tokens)
        rollouts, round_s = await timed(generate(engine, requests))
        tokens += sum(rollout.num_tokens for rollout in rollouts)
        seconds += round_s
    figures = {"vllm_tok_s": tokens / seconds}
    details = {"sequences": work.sequences, "generated_tokens": tokens, "seconds": seconds}
    report.add("generate", figures, **details)


async def measure_score(work: Work, report: Report, teacher: TeacherScorer) -> None:
    """Tokens a second, prompts included, by our client and by the server alone, in turn."""
    await teacher.score(work.rollouts(work.sequences))  # warm-up: a whole round has full passes
    ours, server = Rate(), Rate()
    for _ in range(work.rounds):
        rollouts = work.rollouts(work.sequences)
        _, seconds = await timed(teacher.score(rollouts))
        ours.add(total_tokens(rollouts), seconds)
        if isinstance(teacher, SglangTeacher) and teacher.server is not None:
            rollouts = work.rollouts(work.sequences)
            send = bare_requests(work.config, teacher, rollouts)
            seconds = await asyncio.to_thread(send)
            server.add(total_tokens(rollouts), seconds)
    figures = {"score_tok_s": ours.tok_s}
    details: dict[str, Any] = {"client_rounds": ours.rounds}
    if server.rounds:
        figures["score_client_overhead_pct"] = 100 * (server.tok_s / ours.tok_s - 1)
        details |= {"server_tok_s": server.tok_s, "server_rounds": server.rounds}
    report.add("score", figures, **details)


@dataclass
class Rate:
    """Tokens and seconds of several rounds."""

    rounds: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.rounds.append(tokens / seconds)
        self.tokens += tokens
        self.seconds += seconds

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds


def bare_requests(
    config: RunConfig, teacher: SglangTeacher, rollouts: Sequence[Rollout]
) -> Callable[[], float]:
    """The requests that our client would make, ready to be sent; sending them gives the seconds.

    Answers are read to their last byte and not looked at.
    """
    scoring = config.scoring
    assert scoring.kind == "sglang"
    assert teacher.server is not None
    request = request_for(config.objective)
    bodies = [
        score_body([TokenSequence.of(rollouts[index]) for index in group], request)
        for group in request_groups(rollouts, scoring.request_tokens)
    ]
    address = urlsplit(teacher.server.url)
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {teacher.server.api_key}",
    }

    def worker(own: Sequence[bytes]) -> None:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=600)
        for body in own:
            connection.request("POST", "/generate", body, headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != http.client.OK:
                raise RuntimeError(f"status {response.status}: {content[:300]!r}")
        connection.close()

    def send() -> float:
        count = scoring.max_in_flight
        shares = [bodies[start::count] for start in range(count) if bodies[start::count]]
        began = time.perf_counter()
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(worker, shares))
        return time.perf_counter() - began

    return send


async def measure_train(work: Work, report: Report, modes: Sequence[str]) -> None:
    """Tokens a second, prompts included, of optimizer steps; one learner after another."""
    for mode in modes:
        training = train_settings(work, mode)
        config = work.config.model_copy(update={"training": training})
        learner, start_s = await started_learner(config)
        try:
            await measure_learner(work, report, learner, mode, training.micro_batch_tokens)
        finally:
            await learner.close()
        report.add(f"train_{mode}", {}, start_s=start_s)


def train_settings(work: Work, mode: str) -> EmbeddedTraining | UnslothTraining:
    """The config's learner with a mode's memory settings."""
    training, per_sequence = work.config.training, work.prompt_tokens + work.new_tokens
    if mode == "off":
        return with_checkpointing(training, "off", micro_batch_tokens=8 * per_sequence)
    if mode == "ckpt":
        return with_checkpointing(training, "unsloth", micro_batch_tokens=32 * per_sequence)
    return training


async def measure_learner(
    work: Work, report: Report, learner: Learner, mode: str, micro_batch_tokens: int
) -> None:
    """Steps of a learner that runs."""
    await learner.update(work.batch(32))  # warm-up
    batch, tokens, seconds, peaks = work.batch(work.sequences), 0, 0.0, []
    for _ in range(work.rounds):
        update, step_s = await timed(learner.update(batch))
        tokens += total_tokens([scored.rollout for scored in batch.scored])
        seconds += step_s
        peaks.append(peak_gib(update))
    describe = getattr(learner, "describe", dict)
    key = {"off": "unsloth", "ckpt": "unsloth_ckpt", "auto": "unsloth_auto"}[mode]
    figures = {f"{key}_tok_s": tokens / seconds}
    peak_gb = max(peaks) * 2**30 / 1e9
    if mode == "ckpt" and peak_gb:
        figures[f"unsloth_ckpt_peak_gb_32x{work.prompt_tokens + work.new_tokens}"] = peak_gb
    report.add(
        f"train_{mode}",
        figures,
        micro_batch_tokens=micro_batch_tokens,
        trained_tokens=tokens,
        seconds=seconds,
        peak_gb=peak_gb,
        learner={str(name): str(value) for name, value in describe().items()},
    )


async def started_learner(config: RunConfig) -> tuple[Learner, float]:
    plan = plan_memory(config)
    learner = build_learner(config, build_teacher(config, plan), plan)
    _, seconds = await timed(learner.start())
    return learner, seconds


def with_checkpointing(
    training: EmbeddedTraining | UnslothTraining, mode: str, *, micro_batch_tokens: int
) -> EmbeddedTraining | UnslothTraining:
    """The learner's config with other memory settings."""
    value: Any = mode if isinstance(training, UnslothTraining) else mode != "off"
    update = {"gradient_checkpointing": value, "micro_batch_tokens": micro_batch_tokens}
    return training.model_copy(update=update)


def peak_gib(update: Update) -> float:
    """The learner's own peak as torch counts it; 0 where it counts none."""
    values = [m.value for m in update.metrics if m.key == "train/peak_memory_gib"]
    return max(values, default=0.0)


async def measure_opd(work: Work, report: Report, parts: Parts, memory: PeakMemory) -> None:
    """Whole steps of the loop with all engines resident."""
    _, first_push_s = await timed(push_weights(parts))
    await opd_step(work, parts, Trace())  # warm-up
    steps: list[dict[str, float]] = []
    tokens, learner_peak_gib = 0, 0.0
    for _ in range(work.opd_steps):
        trace = Trace()
        generated, update = await opd_step(work, parts, trace)
        tokens += generated
        learner_peak_gib = max(learner_peak_gib, peak_gib(update))
        steps.append({**stage_seconds(trace), "generated_tokens": float(generated)})
    totals = {stage: sum(step[stage] for step in steps) for stage in STEP_STAGES}
    whole = sum(totals.values())
    report.add(
        "opd",
        {
            "opd_sequential_tok_s": tokens / whole,
            "publish_pct_of_step": 100 * totals["publish"] / whole,
            "opd_sequential_peak_gib": memory.peak_gib,
            "opd_generate_tok_s": tokens / totals["generate"],
        },
        adapters=isinstance(work.config.training.tuning, LoraTuning),
        steps=steps,
        stage_share={stage: seconds / whole for stage, seconds in totals.items()},
        first_push_s=first_push_s,
        learner_peak_gib=learner_peak_gib,
    )


async def measure_resident(
    work: Work, report: Report, parts: Parts, memory: PeakMemory, figure: str
) -> None:
    """The device's peak over one whole step with all engines resident."""
    await push_weights(parts)
    trace = Trace()
    generated, update = await opd_step(work, parts, trace)
    report.add(
        "resident",
        {figure: memory.peak_gib},
        teacher=parts.teacher.teacher_id,
        generated_tokens=generated,
        first_step_s=stage_seconds(trace),
        learner_peak_gib=peak_gib(update),
    )


def stage_seconds(trace: Trace) -> dict[str, float]:
    """Seconds of each stage of the one step in this trace."""
    return {stage: trace.busy_seconds(stage) for stage in STEP_STAGES}


async def opd_step(work: Work, parts: Parts, trace: Trace) -> tuple[int, Update]:
    """One step as `run_sequential` takes it; new tokens and what the learner reports."""
    requests = work.requests(work.sequences, work.new_tokens)
    with trace.span("generate"):
        rollouts = await generate(parts.engine, requests)
    with trace.span("score"):
        scored = await score(parts.teacher, rollouts)
    with trace.span("train"):
        update = await parts.learner.update(parts.make_batch(scored))
    with trace.span("publish"):
        await push_weights(parts)
    return sum(rollout.num_tokens for rollout in rollouts), update


STAGGER_S = 20.0
"""Between the starts of two engines: the teacher sizes its cache before the others are large."""


async def measure_together(arguments: argparse.Namespace, work: Work, report: Report) -> None:
    """Every part on one start of each engine."""
    wanted, config = arguments.parts, work.config
    parts = build_parts(config)
    with PeakMemory() as memory:
        try:
            _, start_s = await timed(start_side_by_side(parts))
            report.add("together", {}, start_s=start_s)
            await push_weights(parts)
            if "generate" in wanted:
                await measure_generate(work, report, parts.engine)
            if "score" in wanted:
                await measure_score(work, report, parts.teacher)
            if "opd" in wanted:
                await measure_opd(work, report, parts, memory)
            if "train" in wanted:
                await measure_own_learner(work, report, parts)
        except BaseException:
            await parts.close()
            raise
    try:
        for mode in arguments.train_modes if "train" in wanted else ():
            parts = await with_other_learner(work, report, parts, mode)
        if "resident" in wanted:
            await measure_other_teacher(arguments, work, report, parts, memory.before_bytes)
    finally:
        await parts.close()


async def with_other_learner(work: Work, report: Report, parts: Parts, mode: str) -> Parts:
    """A learner with other memory settings in the place of the first, measured; it stays."""
    await parts.learner.close()
    training = train_settings(work, mode)
    config = work.config.model_copy(update={"training": training})
    learner, start_s = await started_learner(config)
    await measure_learner(work, report, learner, mode, training.micro_batch_tokens)
    report.add(f"train_{mode}", {}, start_s=start_s)
    return replace(parts, learner=learner)


async def start_side_by_side(parts: Parts) -> None:
    async def later(delay_s: float, start: Awaitable[None]) -> None:
        await asyncio.sleep(delay_s)
        await start

    engines = (parts.teacher, parts.engine, parts.learner)
    await asyncio.gather(
        *(later(index * STAGGER_S, engine.start()) for index, engine in enumerate(engines))
    )


async def measure_own_learner(work: Work, report: Report, parts: Parts) -> None:
    """The resident learner under whichever name its settings have."""
    training = work.config.training
    setting = str(getattr(training, "gradient_checkpointing", "auto"))
    mode = {"off": "off", "unsloth": "ckpt", "on": "ckpt"}.get(setting, "auto")
    await measure_learner(work, report, parts.learner, mode, training.micro_batch_tokens)


async def measure_other_teacher(
    arguments: argparse.Namespace, work: Work, report: Report, parts: Parts, before_bytes: int
) -> None:
    """A larger teacher in the place of the first, beside the engines that are there.

    Args:
        before_bytes: of the device's memory, used before any engine was started.
    """
    await parts.teacher.close()
    scoring = work.config.scoring.model_copy(
        update={
            "model": arguments.resident_teacher,
            "quantization": None,  # as its directory says
            "memory_fraction": arguments.resident_memory_fraction,
            "chunk_tokens": arguments.resident_chunk_tokens or work.config.scoring.chunk_tokens,
        }
    )
    config = work.config.model_copy(update={"scoring": scoring})
    teacher = build_teacher(config, plan_memory(config))
    with PeakMemory(before_bytes) as memory:
        try:
            _, start_s = await timed(teacher.start())
            others = replace(parts, teacher=teacher)
            figure = arguments.resident_figure
            await measure_resident(work, report, others, memory, figure)
            report.add("resident", {}, start_s=start_s)
        finally:
            await teacher.close()


def measure_trl(work: Work, report: Report, arguments: argparse.Namespace) -> None:
    """TRL's trainer on the same step; see `benchmarks/speed/trl_distillation.py`."""
    out = Path(work.config.output_dir) / "trl.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [arguments.trl_python, "-m", "benchmarks.speed.trl_distillation"]
    command += ["--student", work.config.student.model, "--teacher", work.config.scoring.model]
    command += ["--prompts", str(work.sequences), "--prompt-tokens", str(work.prompt_tokens)]
    command += ["--new-tokens", str(work.new_tokens), "--out", str(out)]
    command += arguments.trl_arguments.split()
    environment = dict(os.environ)
    if arguments.trl_pythonpath:
        environment["PYTHONPATH"] = arguments.trl_pythonpath
    out.unlink(missing_ok=True)
    if subprocess.run(command, env=environment).returncode != 0 or not out.exists():
        sys.exit("TRL was not measured: the cause is above; what was measured before is kept")
    result = json.loads(out.read_text())
    best = result["best"]
    figures = {"trl_opd_tok_s": best["opd_tok_s"], "trl_peak_gib": best["peak_gib"]}
    report.add("trl", figures, **result)


# --- The whole ----------------------------------------------------------------------------------


async def measure(arguments: argparse.Namespace, work: Work, report: Report) -> None:
    wanted = arguments.parts
    config = work.config
    if arguments.together:
        await measure_together(arguments, work, report)
        wanted = [part for part in wanted if part == "trl"]
    if "generate" in wanted:
        with PeakMemory() as memory:
            async with static_engine(config, config.student.model) as engine:
                await measure_generate(work, report, engine)
            report.add("generate", {}, peak_gib=memory.peak_gib)
    if "score" in wanted:
        teacher = build_teacher(config, plan_memory(config))
        with PeakMemory() as memory:
            try:
                _, start_s = await timed(teacher.start())
                await measure_score(work, report, teacher)
            finally:
                await teacher.close()
            report.add("score", {}, peak_gib=memory.peak_gib, start_s=start_s)
    if "train" in wanted:
        await measure_train(work, report, arguments.train_modes)
    if {"opd", "resident"} & set(wanted):
        with PeakMemory() as memory:
            parts = build_parts(config)
            try:
                _, start_s = await timed(parts.start())
                if "opd" in wanted:
                    await measure_opd(work, report, parts, memory)
                    report.add("opd", {}, start_s=start_s)
                if "resident" in wanted:
                    figure = arguments.resident_figure
                    await measure_resident(work, report, parts, memory, figure)
            finally:
                await parts.close()
    if "trl" in wanted:
        measure_trl(work, report, arguments)


def main() -> None:
    arguments = parse()
    given = load_config(arguments.config, arguments.overrides)
    # Prompts are random tokens: neither a data file nor an evaluation is needed.
    config = given.model_copy(
        update={"prompts": TaskPrompts(kind="task"), "verifier": None, "evaluation": None}
    )
    work = Work(
        config=config,
        sequences=arguments.sequences or config.rollouts_per_step,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens or config.sampling.max_new_tokens,
        rounds=arguments.rounds,
        opd_steps=arguments.opd_steps,
        vocab_size=load_identity(config.student.model).vocab_size,
    )
    report = Report(arguments.name, arguments.results)
    asyncio.run(measure(arguments, work, report))
    print(arguments.results / f"{arguments.name}.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--parts", type=_names(PARTS), default=list(PARTS[:4]))
    parser.add_argument("--name", default="stages", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--sequences", type=int, help="of a step; default: the config's")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, help="default: the config's")
    parser.add_argument("--rounds", type=int, default=2, help="measured of each stage")
    parser.add_argument("--opd-steps", type=int, default=2, help="measured, after one to warm up")
    parser.add_argument("--together", action="store_true", help="start each engine once")
    parser.add_argument("--resident-teacher", help="model directory, with --together")
    parser.add_argument(
        "--resident-memory-fraction", type=float, help="its scoring.memory_fraction"
    )
    parser.add_argument("--resident-chunk-tokens", type=int, help="its scoring.chunk_tokens")
    modes = ("off", "ckpt", "auto")
    parser.add_argument("--train-modes", type=_names(modes), default=list(modes))
    parser.add_argument("--resident-figure", default="resident_4b_32b_fp8_gib")
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--trl-pythonpath", default="")
    parser.add_argument("--trl-arguments", default="", help="more for trl_distillation.py")
    return parser.parse_intermixed_args()


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown}: expected some of {','.join(known)}")
        return names

    return read


if __name__ == "__main__":
    main()
