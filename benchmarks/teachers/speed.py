"""Measures tokens/s of scoring by teachers in servers: SGLang, vLLM, behind a context, two at once.

    python -m benchmarks.teachers.speed --config configs/h200.yaml \
        student.model=models/random-4B scoring.model=models/random-8B

All get the config's model, precision, tokens per request and requests in flight; the other engine
than the config's teacher has the interpreter and the environment of ``generation``. Parts, in the
order of ``--parts``; each is written into the result as soon as it is measured:

- `sglang`: a step's rollouts of ``--prompt-tokens`` and ``--new-tokens``, by our client and as bare
  requests whose replies are not parsed, which shows what reading them costs; the same with
  ``--top-k`` candidates a token; then rollouts behind ``--context-tokens`` more, and of
  ``--samples`` to a prompt, with and without them.
- `two`: a second such server beside the first, as `scoring.kind: several` starts it, and each of
  them asked for one half of a step's rollouts. Comes with `sglang`, on the same server.
- `vllm`: as `sglang`. vLLM computes the logits of a whole chunk of a prompt at once, so its chunk
  is swept; rollouts behind a context are measured with the first one.

Figures begin with ``sglang_``, ``two_`` or ``vllm_chunk_N_``: ``score_tok_s`` (tokens of prompts,
contexts and responses), ``server_tok_s`` (bare), ``score_top_k_tok_s``, ``server_top_k_tok_s``,
``start_s``, ``peak_gib``; with ``context_``, ``samples_`` or ``context_samples_`` before them
``tok_s``, ``response_tok_s`` and ``cached_percent``, the share of prompt and context that was in
the server's cache. Tokens are random and never repeated, so no cache helps between prompts.
"""

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.lib.common import RESULTS, Report, timed
from benchmarks.lib.device_memory import PeakMemory
from benchmarks.lib.random_work import Work, for_random_work, total_tokens
from benchmarks.lib.stage_parts import Rate, bare_requests, jobs_of
from qwen3_distill.config import (
    RunConfig,
    ServedScoring,
    SeveralScoring,
    SglangScoring,
    VllmGeneration,
    VllmScoring,
)
from qwen3_distill.config.load import load_config
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.assembly.teachers import build_teacher
from qwen3_distill.ports import CACHED_TOKENS, TeacherScorer
from qwen3_distill.scoring.by_tag import TeachersByTag
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.types import (
    Rollout,
    SampledRequest,
    ScoreFailure,
    ScoreRequest,
    ScoringJob,
    TopKRequest,
)

PARTS = ("sglang", "two", "vllm")
SHARED = set(ServedScoring.model_fields) - {"python", "environment", "urls", "port", "cache"}
TAGS = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rollouts that differ in what stands before the response."""

    label: str
    prompt_tokens: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, for all parts."""

    given: RunConfig
    arguments: argparse.Namespace
    report: Report
    keys: Path
    """Folder of the servers' keys."""
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    """Of all cases: no token sequence is sent twice."""

    @property
    def plain(self) -> Case:
        return Case(label="", prompt_tokens=self.arguments.prompt_tokens, samples=1)

    @property
    def others(self) -> list[Case]:
        prompt, samples = self.arguments.prompt_tokens, self.arguments.samples
        longer = prompt + self.arguments.context_tokens
        return [
            Case(label="context_samples", prompt_tokens=longer, samples=samples),
            Case(label="samples", prompt_tokens=prompt, samples=samples),
            Case(label="context", prompt_tokens=longer, samples=1),
        ]

    def config(self, kind: str, **changes: object) -> RunConfig:
        """Return the config with its teacher in a kind of server, and room for every case."""
        longest = self.arguments.prompt_tokens + self.arguments.context_tokens
        if kind == "vllm":
            changes = {"max_model_tokens": longest + self.new_tokens} | changes
        planning = self.given.planning.model_copy(update={"prompt_tokens": longest})
        return with_teacher(self.given, kind, changes).model_copy(update={"planning": planning})

    @property
    def new_tokens(self) -> int:
        return self.arguments.new_tokens or self.given.sampling.max_new_tokens

    def work(self, config: RunConfig, case: Case) -> Work:
        return Work(
            config=config.model_copy(update={"samples_per_prompt": case.samples}),
            sequences=self.arguments.sequences or config.rollouts_per_step,
            prompt_tokens=case.prompt_tokens,
            new_tokens=self.new_tokens,
            rounds=self.arguments.rounds,
            opd_steps=0,
            rng=self.rng,
            vocab_size=load_identity(self.given.teacher.model).vocab_size,
        )


def with_teacher(config: RunConfig, kind: str, changes: dict[str, object]) -> RunConfig:
    """Return the config with its teacher in another kind of server.

    Raises:
        ConfigError: the config's teacher is in no server.
    """
    given = config.teacher
    if not isinstance(given, SglangScoring | VllmScoring):
        raise ConfigError(f"scoring.kind={given.kind}: this compares servers; use sglang or vllm")
    values: dict[str, object] = {}
    if given.kind == kind:
        values = given.model_dump(exclude={"urls", "port", "cache", "api_key_file"})
    else:
        stated = given.model_dump(include=SHARED & given.model_fields_set)
        values = {**stated, "kind": kind}
        if kind == "vllm" and isinstance(config.generation, VllmGeneration):
            engine = config.generation
            values |= {"python": engine.python, "environment": engine.environment}
    section = SglangScoring if kind == "sglang" else VllmScoring
    scoring = section.model_validate(values | changes)
    return config.model_copy(update={"scoring": scoring})


def with_two(config: RunConfig) -> RunConfig:
    """Return the config with its teacher twice, each for a tag."""
    section = config.teacher.model_dump()
    several = {"kind": "several", "by": "tag", "teachers": dict.fromkeys(TAGS, section)}
    return config.model_copy(update={"scoring": SeveralScoring.model_validate(several)})


@asynccontextmanager
async def started(teacher: ServedTeacher) -> AsyncIterator[float]:
    """Start a teacher, give the seconds, and close it."""
    try:
        _, start_s = await timed(teacher.start())
        yield start_s
    finally:
        await teacher.close()


async def measure_sglang(setup: Setup, *, alone: bool, two: bool) -> None:
    """Measure a teacher in SGLang's server, then with a second one beside it."""
    config = setup.config("sglang")
    if not two:
        teacher = served(build_teacher(config, plan_memory(config)))
        with PeakMemory() as memory:
            async with started(teacher) as start_s:
                await measure(setup, config, teacher, "sglang", start_s, memory)
        return
    both = with_two(config)
    teachers = build_teacher(both, plan_memory(both), request=SampledRequest())
    assert isinstance(teachers, TeachersByTag)
    first, second = (served(teachers.teachers[tag]) for tag in TAGS)
    with PeakMemory() as memory:
        async with started(first) as start_s:
            if alone:
                await measure(setup, config, first, "sglang", start_s, memory)
            async with started(second) as start_s:
                work = setup.work(config, setup.plain)
                rate, _ = await scored(work, teachers, tagged=True)
                figures = {
                    "two_score_tok_s": rate.tok_s,
                    "two_start_s": start_s,
                    "two_peak_gib": memory.peak_gib,
                }
                setup.report.add("two", figures, rounds=rate.rounds, **described(work, teachers))


async def measure_vllm(setup: Setup) -> None:
    """Measure a teacher in vLLM's server, with every size of a chunk."""
    for number, chunk in enumerate(setup.arguments.vllm_chunks):
        config = setup.config("vllm", chunked_prefill_tokens=chunk)
        # A server is told at its start how many candidates may be asked for.
        request = TopKRequest(k=setup.arguments.top_k)
        teacher = served(build_teacher(config, plan_memory(config), request=request))
        cases = [] if number else setup.others
        with PeakMemory() as memory:
            async with started(teacher) as start_s:
                name = f"vllm_chunk_{chunk}"
                await measure(setup, config, teacher, name, start_s, memory, cases)


def served(teacher: TeacherScorer) -> ServedTeacher:
    assert isinstance(teacher, ServedTeacher)
    return teacher


async def measure(
    setup: Setup,
    config: RunConfig,
    teacher: ServedTeacher,
    name: str,
    start_s: float,
    memory: PeakMemory,
    others: Sequence[Case] | None = None,
) -> None:
    """Measure a server that runs: at the sampled token, with candidates, and other rollouts."""
    assert teacher.server is not None
    key = setup.keys / name
    key.write_text(teacher.server.api_key)
    there = {"urls": (teacher.server.url,), "api_key_file": str(key)}
    scoring = config.teacher.model_copy(update=there)
    asking = config.model_copy(update={"scoring": scoring})
    requests: dict[str, ScoreRequest] = {
        "": SampledRequest(),
        "top_k_": TopKRequest(k=setup.arguments.top_k),
    }
    for label, request in requests.items():
        client = served(build_teacher(asking, plan_memory(config), request=request))
        async with started(client):
            work = setup.work(config, setup.plain)
            ours, _ = await scored(work, client)
            bare = await sent(work, teacher, request)
        figures = {
            f"{name}_score_{label}tok_s": ours.tok_s,
            f"{name}_server_{label}tok_s": bare.tok_s,
            f"{name}_peak_gib": memory.peak_gib,
            f"{name}_start_s": start_s,
        }
        setup.report.add(
            f"{name}_score{label and '_top_k'}",
            figures,
            rounds=ours.rounds,
            server_rounds=bare.rounds,
            candidates=setup.arguments.top_k if label else 0,
            **described(work, teacher),
        )
    client = served(build_teacher(asking, plan_memory(config), request=SampledRequest()))
    async with started(client):
        for case in setup.others if others is None else others:
            await measure_case(setup, setup.work(config, case), client, name, case)


async def measure_case(
    setup: Setup, work: Work, client: ServedTeacher, name: str, case: Case
) -> None:
    """Measure rollouts with other prompts, and how much of these the server had in its cache."""
    ours, cached = await scored(work, client)
    responses = work.rounds * work.sequences * work.new_tokens
    head = f"{name}_{case.label}"
    figures = {
        f"{head}_tok_s": ours.tok_s,
        f"{head}_response_tok_s": responses / ours.seconds,
        f"{head}_cached_percent": 100 * cached / (ours.tokens - responses),
    }
    details = described(work, client)
    setup.report.add(head, figures, rounds=ours.rounds, samples=case.samples, **details)


def described(work: Work, teacher: TeacherScorer) -> dict[str, object]:
    """Return what a result says of the work and of who did it."""
    return {
        "teacher": teacher.teacher_id,
        "sequences": work.sequences,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
    }


async def scored(work: Work, teacher: TeacherScorer, *, tagged: bool = False) -> tuple[Rate, float]:
    """Return the rate of our client on tokens that are never repeated, and the cached tokens."""

    def jobs(rollouts: Sequence[Rollout]) -> list[ScoringJob]:
        made = jobs_of(rollouts)
        if not tagged:
            return made
        return [replace(job, tag=TAGS[place % 2]) for place, job in enumerate(made)]

    await teacher.score(jobs(work.rollouts(work.sequences)))  # warm-up: full passes
    before = teacher.counters.get(CACHED_TOKENS, 0.0)
    rate = Rate()
    for _ in range(work.rounds):
        rollouts = work.rollouts(work.sequences)
        results, seconds = await timed(teacher.score(jobs(rollouts)))
        if failed := [one for one in results if isinstance(one, ScoreFailure)]:
            raise RuntimeError(f"{len(failed)} rollouts got no score: {failed[0].reason}")
        rate.add(total_tokens(rollouts), seconds)
    return rate, teacher.counters.get(CACHED_TOKENS, 0.0) - before


async def sent(work: Work, teacher: ServedTeacher, request: ScoreRequest) -> Rate:
    """Return the rate of the server alone, on tokens that are never repeated."""
    rate = Rate()
    for _ in range(work.rounds):
        rollouts = work.rollouts(work.sequences)
        send = bare_requests(work.config, teacher, request, rollouts)
        rate.add(total_tokens(rollouts), await asyncio.to_thread(send))
    return rate


async def measure_all(setup: Setup) -> None:
    parts: Sequence[str] = setup.arguments.parts
    if "sglang" in parts or "two" in parts:
        await measure_sglang(setup, alone="sglang" in parts, two="two" in parts)
    if "vllm" in parts:
        await measure_vllm(setup)


def main() -> None:
    arguments = parse()
    given = load_config(arguments.config, arguments.overrides)
    config = for_random_work(given)
    report = Report(arguments.name, arguments.results)
    with tempfile.TemporaryDirectory() as keys:
        setup = Setup(given=config, arguments=arguments, report=report, keys=Path(keys))
        asyncio.run(measure_all(setup))
    print(arguments.results / f"{arguments.name}.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument(
        "--vllm-chunks", type=lambda text: [int(n) for n in text.split(",")], default=[8192, 2048]
    )
    parser.add_argument("--top-k", type=int, default=20, help="candidates a token")
    parser.add_argument("--name", default="h200_teachers", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--sequences", type=int, help="of a step; default: the config's")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4, help="to a prompt")
    parser.add_argument("--new-tokens", type=int, help="default: the config's")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
