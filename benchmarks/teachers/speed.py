"""Measures tokens/s of scoring: the same teacher in SGLang's server and in vLLM's, one by one.

    python -m benchmarks.teachers.speed --config configs/h200.yaml \
        student.model=models/random-4B scoring.model=models/random-8B

Both get the config's model, precision, tokens per request and requests in flight. A teacher is
measured at the sampled token and with ``--top-k`` candidates a token; each once through our client
and once as bare requests whose replies are not parsed, which shows what reading them costs. vLLM
computes the logits of a whole chunk of a prompt at once, so its chunk is swept.

Figures (``sglang_``, and ``vllm_`` with ``chunk`` tokens a chunk): ``score_tok_s``,
``score_top_k_tok_s``, ``server_tok_s``, ``server_top_k_tok_s``, ``start_s``, ``peak_gib``. Prompts
are random tokens, so no cache helps; ``--prompt-tokens 640`` puts 512 more before each response.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.common import RESULTS, Report, timed
from benchmarks.lib.device_memory import PeakMemory
from benchmarks.lib.random_work import Work, total_tokens
from benchmarks.lib.stage_parts import Rate, bare_requests, jobs_of
from qwen3_distill.config import (
    RunConfig,
    ServedScoring,
    SglangScoring,
    TaskPrompts,
    VllmScoring,
)
from qwen3_distill.config.load import load_config
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.assembly.teachers import build_teacher
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.types import SampledRequest, ScoreFailure, ScoreRequest, TopKRequest

KINDS = ("sglang", "vllm")
SHARED = set(ServedScoring.model_fields) - {"python", "environment", "urls", "port", "cache"}


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
    section = SglangScoring if kind == "sglang" else VllmScoring
    scoring = section.model_validate(values | changes)
    return config.model_copy(update={"scoring": scoring})


async def measure(work: Work, report: Report, name: str, k: int) -> None:
    """Measure one teacher with every request; each gets a server of its own."""
    requests: dict[str, ScoreRequest] = {"": SampledRequest(), "top_k_": TopKRequest(k=k)}
    for label, request in requests.items():
        teacher = build_teacher(work.config, plan_memory(work.config), request=request)
        assert isinstance(teacher, ServedTeacher)
        with PeakMemory() as memory:
            try:
                _, start_s = await timed(teacher.start())
                ours, bare = await rates(work, teacher, request)
            finally:
                await teacher.close()
        report.add(
            f"{name}_{label}score",
            {
                f"{name}_score_{label}tok_s": ours.tok_s,
                f"{name}_server_{label}tok_s": bare.tok_s,
                f"{name}_{label}start_s": start_s,
                f"{name}_{label}peak_gib": memory.peak_gib,
            },
            client_rounds=ours.rounds,
            server_rounds=bare.rounds,
            teacher=teacher.teacher_id,
            candidates=k if label else 0,
            sequences=work.sequences,
            prompt_tokens=work.prompt_tokens,
            new_tokens=work.new_tokens,
        )


async def rates(work: Work, teacher: ServedTeacher, request: ScoreRequest) -> tuple[Rate, Rate]:
    """Return the rates of our client and of the server alone, on tokens that are never repeated."""
    await teacher.score(jobs_of(work.rollouts(work.sequences)))  # warm-up: full passes
    ours, bare = Rate(), Rate()
    for _ in range(work.rounds):
        rollouts = work.rollouts(work.sequences)
        results, seconds = await timed(teacher.score(jobs_of(rollouts)))
        if failed := [one for one in results if isinstance(one, ScoreFailure)]:
            raise RuntimeError(f"{len(failed)} rollouts got no score: {failed[0].reason}")
        ours.add(total_tokens(rollouts), seconds)
        rollouts = work.rollouts(work.sequences)
        send = bare_requests(work.config, teacher, request, rollouts)
        bare.add(total_tokens(rollouts), await asyncio.to_thread(send))
    return ours, bare


async def measure_all(arguments: argparse.Namespace, given: RunConfig, report: Report) -> None:
    for kind in arguments.kinds:
        chunks: Sequence[int | None] = arguments.vllm_chunks if kind == "vllm" else [None]
        for chunk in chunks:
            changes: dict[str, object] = {} if chunk is None else {"chunked_prefill_tokens": chunk}
            config = with_teacher(given, kind, changes)
            work = Work(
                config=config,
                sequences=arguments.sequences or config.rollouts_per_step,
                prompt_tokens=arguments.prompt_tokens,
                new_tokens=arguments.new_tokens or config.sampling.max_new_tokens,
                rounds=arguments.rounds,
                opd_steps=0,
                vocab_size=load_identity(config.teacher.model).vocab_size,
            )
            name = kind if chunk is None else f"{kind}_chunk_{chunk}"
            await measure(work, report, name, arguments.top_k)


def main() -> None:
    arguments = parse()
    given = load_config(arguments.config, arguments.overrides)
    # Prompts are random tokens: neither a data file nor an evaluation is needed.
    config = given.model_copy(
        update={"prompts": TaskPrompts(kind="task"), "verifier": None, "evaluation": None}
    )
    report = Report(arguments.name, arguments.results)
    asyncio.run(measure_all(arguments, config, report))
    print(arguments.results / f"{arguments.name}.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument(
        "--vllm-chunks", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 8192]
    )
    parser.add_argument("--top-k", type=int, default=20, help="candidates a token")
    parser.add_argument("--name", default="h200_teachers", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--sequences", type=int, help="of a step; default: the config's")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, help="default: the config's")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
