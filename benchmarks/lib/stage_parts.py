"""Measures single stages on running engines, for `speed/stages.py`."""

import asyncio
import http.client
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.lib.common import Report, timed
from benchmarks.lib.device_memory import PeakMemory
from benchmarks.lib.random_work import Work, total_tokens
from qwen3_distill.config import EmbeddedTraining, LoraTuning, RunConfig, UnslothTraining
from qwen3_distill.pipeline.assembly.engines import Parts, build_learner, build_teacher, plan_memory
from qwen3_distill.pipeline.step import generate, push_weights, score
from qwen3_distill.ports import Learner, RolloutEngine, TeacherScorer
from qwen3_distill.recording.jsonl import STEP_STAGES
from qwen3_distill.recording.trace import Trace
from qwen3_distill.scoring.served.groups import request_groups
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.scoring.views import SameView
from qwen3_distill.types import Rollout, ScoreRequest, ScoringJob, Update


async def measure_generate(work: Work, report: Report, engine: RolloutEngine) -> None:
    """Measure new tokens per second with all sequences decoded concurrently."""
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


async def measure_score(
    work: Work, report: Report, teacher: TeacherScorer, name: str = "score"
) -> None:
    """Measure tokens per second (prompts included) of our client and of the server alone."""
    # Warm-up: only a whole round has full passes.
    await teacher.score(jobs_of(work.rollouts(work.sequences)))
    ours, server = Rate(), Rate()
    for _ in range(work.rounds):
        rollouts = work.rollouts(work.sequences)
        _, seconds = await timed(teacher.score(jobs_of(rollouts)))
        ours.add(total_tokens(rollouts), seconds)
        if isinstance(teacher, ServedTeacher) and teacher.server is not None:
            rollouts = work.rollouts(work.sequences)
            request = work.config.objective.score_request
            assert request is not None
            send = bare_requests(work.config, teacher, request, rollouts)
            seconds = await asyncio.to_thread(send)
            server.add(total_tokens(rollouts), seconds)
    figures = {f"{name}_tok_s": ours.tok_s}
    details: dict[str, Any] = {"client_rounds": ours.rounds}
    if server.rounds:
        figures[f"{name}_client_overhead_pct"] = 100 * (server.tok_s / ours.tok_s - 1)
        details |= {"server_tok_s": server.tok_s, "server_rounds": server.rounds}
    report.add(name, figures, **details)


def jobs_of(rollouts: Sequence[Rollout]) -> list[ScoringJob]:
    """Make the jobs of a teacher that reads the student's own tokens."""
    return [SameView().job(rollout) for rollout in rollouts]


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
    config: RunConfig, teacher: ServedTeacher, request: ScoreRequest, rollouts: Sequence[Rollout]
) -> Callable[[], float]:
    """Prepare the requests that our client would send; return a function that sends them.

    The function returns its seconds. It reads answers to the last byte and does not parse them.
    """
    scoring = config.teacher
    assert scoring.kind != "embedded"
    assert teacher.server is not None
    wire = teacher.wire
    jobs = jobs_of(rollouts)
    bodies = [
        wire.score_body([jobs[index] for index in group], request)
        for group in request_groups(jobs, scoring.request_tokens, max_jobs=wire.max_jobs)
    ]
    address = urlsplit(teacher.server.url)
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {teacher.server.api_key}",
    }

    def worker(own: Sequence[bytes]) -> None:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=600)
        for body in own:
            connection.request("POST", wire.path, body, headers)
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
    """Measure tokens per second (prompts included) of each mode's learner, one after another."""
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
    """Measure the optimizer steps of a running learner."""
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
    """The learner's peak memory as torch counts it; 0 without a count."""
    values = [m.value for m in update.metrics if m.key == "train/peak_memory_gib"]
    return max(values, default=0.0)


async def measure_opd(work: Work, report: Report, parts: Parts, memory: PeakMemory) -> None:
    """Measure whole steps of the loop with all engines resident."""
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
    """Measure the device's peak memory over one whole step with all engines resident."""
    await push_weights(parts)
    trace = Trace()
    generated, update = await opd_step(work, parts, trace)
    report.add(
        "resident",
        {figure: memory.peak_gib},
        teacher=parts.required_teacher.teacher_id,
        generated_tokens=generated,
        first_step_s=stage_seconds(trace),
        learner_peak_gib=peak_gib(update),
    )


def stage_seconds(trace: Trace) -> dict[str, float]:
    """Seconds of each stage in the trace of a single step."""
    return {stage: trace.busy_seconds(stage) for stage in STEP_STAGES}


async def opd_step(work: Work, parts: Parts, trace: Trace) -> tuple[int, Update]:
    """Take one step like `run_sequential`; return its new tokens and the learner's update."""
    requests = work.requests(work.sequences, work.new_tokens)
    with trace.span("generate"):
        rollouts = await generate(parts.engine, requests)
    with trace.span("score"):
        scored = await score(parts.required_teacher, parts.view, rollouts)
    with trace.span("train"):
        update = await parts.learner.update(parts.make_batch(scored))
    with trace.span("publish"):
        await push_weights(parts)
    return sum(rollout.num_tokens for rollout in rollouts), update
