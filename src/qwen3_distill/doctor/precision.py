"""The precision audit: compares the configured teacher with the unquantized one, token by token."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

from qwen3_distill.config import RunConfig
from qwen3_distill.data.rollout_files import read_rollouts
from qwen3_distill.errors import ConfigError, DataError, EngineError
from qwen3_distill.modeling.config_file import read_json_object
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.modeling.hub import is_snapshot
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline import step as pipeline_step
from qwen3_distill.pipeline.assembly.audited_teachers import (
    build_audited_teacher,
    build_unquantized_teacher,
)
from qwen3_distill.pipeline.assembly.data import build_prompts
from qwen3_distill.pipeline.assembly.engines import static_engine
from qwen3_distill.pipeline.assembly.views import refuse_own_tokenizer
from qwen3_distill.pipeline.models import local_model, localize
from qwen3_distill.pipeline.own_folder import input_paths, refuse_inputs_as_output
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.pipeline.requests import requests_for_step
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.handshake import check_compatible
from qwen3_distill.scoring.precision import METHOD, PrecisionReport, compare_scores
from qwen3_distill.scoring.views import SameView
from qwen3_distill.types import Rollout, ScoreFailure, TopKRequest, TopKScore
from qwen3_distill.utils.files import check_writable, write_json_atomic
from qwen3_distill.utils.signals import signals_as_ctrl_c

Say = Callable[[str], None]

CANDIDATES = 20
"""Each teacher's most likely tokens per position that the KL estimate uses."""


def audit_teacher(
    config: RunConfig,
    rollouts: Path | None,
    out: Path | None,
    *,
    num_rollouts: int,
    unquantized: str | None,
    say: Say,
) -> str:
    """Score a fixed sample with the configured teacher, then with the unquantized one.

    Args:
        rollouts: file whose first rollouts are scored; None: those of the config's first steps.
        unquantized: directory or hub id of the unquantized teacher; None: the config's teacher.

    Returns:
        A line for the user with the main result.

    Raises:
        ConfigError: the teacher's directory is itself quantized and ``unquantized`` is None.
    """
    refuse_own_tokenizer(config, "a comparison of precisions")
    local = localize(config, say=say, warn=say)
    if unquantized is None:
        _refuse_quantized(local.config.teacher.model, config.teacher.model)
    config, scoring = local.config, local.config.teacher
    if out is not None:
        inputs = {**input_paths(config), "--unquantized": unquantized or scoring.model}
        refuse_inputs_as_output(out, inputs | ({"--rollouts": rollouts} if rollouts else {}))
        check_writable(out)
    SameView().check(
        load_identity(config.student.model, weights=False),
        load_identity(scoring.model, weights=False),
    )
    exact_dir = scoring.model
    if unquantized is not None:
        exact_dir = local_model(unquantized, "--unquantized", say)
    local.fetch_weights(say)
    check_compatible(load_identity(scoring.model), load_identity(exact_dir))
    request = TopKRequest(k=min(CANDIDATES, load_identity(scoring.model).vocab_size))

    async def measure() -> tuple[PrecisionReport, str, str]:
        sample = await _sample(config, rollouts, num_rollouts, say)
        served, served_id = await _scores(build_audited_teacher(config, request), sample, say)
        # Built only now: the other teacher held the memory until it was closed.
        exact = build_unquantized_teacher(scoring, exact_dir, request)
        exact_scores, exact_id = await _scores(exact, sample, say)
        return compare_scores(sample, served, exact_scores), served_id, exact_id

    with signals_as_ctrl_c():
        report, served_id, exact_id = asyncio.run(measure())
    for line in table(report):
        say(line)
    if out is not None:
        record = {"served": served_id, "unquantized": exact_id, "kl_method": METHOD}
        write_json_atomic(out, {**record, "candidates": request.k, **asdict(report)})
    return (
        f"{served_id} is {report.mean_abs_nats:.4f} nats from {exact_id} on average, over "
        f"{report.num_tokens} tokens"
    )


def table(report: PrecisionReport) -> list[str]:
    """Format the report's figures, one per line."""
    rows = [
        ("rollouts, tokens", f"{report.num_rollouts}, {report.num_tokens}"),
        ("mean |difference|", f"{report.mean_abs_nats:.5f} nats"),
        ("99% of |differences| below", f"{report.p99_abs_nats:.5f} nats"),
        ("mean difference", f"{report.mean_nats:+.5f} nats"),
        ("advantages with another sign", f"{report.sign_flips:.2%}"),
        ("KL(unquantized || served), at least", f"{report.kl_nats:.6f} nats a token"),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


async def compare_with_unquantized(
    config: RunConfig,
    directory: str,
    request: TopKRequest,
    sample: Sequence[Rollout],
    served: Sequence[TopKScore],
    say: Say,
) -> PrecisionReport:
    """Score a sample with the unquantized teacher, and compare with the scores that were served.

    Args:
        directory: of the unquantized teacher.

    Raises:
        HandshakeError: it is another model than the config's teacher.
    """
    check_compatible(load_identity(config.teacher.model), load_identity(directory))
    teacher = build_unquantized_teacher(config.teacher, directory, request)
    exact, _ = await _scores(teacher, sample, say)
    return compare_scores(sample, served, exact)


def quantized_directory(directory: str) -> bool:
    """Return whether a model directory holds quantized weights.

    Raises:
        ModelError: there is no such directory.
    """
    config_file = check_model_dir(directory, weights=not is_snapshot(directory)) / "config.json"
    return "quantization_config" in read_json_object(config_file)


def _refuse_quantized(directory: str, named: str) -> None:
    if quantized_directory(directory):
        raise ConfigError(
            f"scoring.model={named} is itself quantized; give the directory of the "
            "unquantized teacher with --unquantized"
        )


async def _sample(
    config: RunConfig, rollouts: Path | None, num_rollouts: int, say: Say
) -> list[Rollout]:
    """Read the first rollouts of a file, or sample those of the config's first steps."""
    if rollouts is not None:
        found = [rollout for _, rollout in read_rollouts(rollouts)][:num_rollouts]
        if not found:
            raise DataError(f"{rollouts} has no rollouts to score")
        return found
    say(f"sampling {num_rollouts} rollouts from {config.student.model}")
    prompts = build_prompts(config, TextTools(config.student.model))
    sampled: list[Rollout] = []
    async with static_engine(config, config.student.model) as engine:
        for step in count():
            taken = prompts.take(step * config.prompts_per_step, config.prompts_per_step)
            requests = requests_for_step(config, taken, step)[: num_rollouts - len(sampled)]
            sampled += await pipeline_step.generate(engine, requests)
            if len(sampled) >= num_rollouts:
                return sampled
    raise AssertionError("unreachable: the steps are endless")


async def _scores(
    teacher: TeacherScorer, sample: Sequence[Rollout], say: Say
) -> tuple[list[TopKScore], str]:
    """Score all rollouts, then close the teacher; return the scores and the teacher's id."""
    say(f"scoring {len(sample)} rollouts with {teacher.teacher_id}")
    try:
        await teacher.start()
        results = await teacher.score([SameView().job(rollout) for rollout in sample])
    finally:
        await teacher.close()
    failures = [result for result in results if isinstance(result, ScoreFailure)]
    if failures:
        raise EngineError(
            f"{len(failures)} of {len(sample)} rollouts got no score from {teacher.teacher_id}; "
            f"the first: {failures[0].rollout_id}: {failures[0].reason}"
        )
    scores = [result for result in results if isinstance(result, TopKScore)]
    assert len(scores) == len(sample), "candidates were asked for"
    return scores, teacher.teacher_id
