"""The doctor: makes every check of a config, then a short real pass with its engines."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen3_distill.config import RunConfig
from qwen3_distill.doctor.examined import examined, score_request
from qwen3_distill.doctor.precision import compare_with_unquantized, quantized_directory
from qwen3_distill.doctor.real_pass import RealPass
from qwen3_distill.doctor.tolerances import QUANTIZED_BROKEN_NATS, QUANTIZED_NOTICEABLE_NATS
from qwen3_distill.errors import DistillError
from qwen3_distill.pipeline.assembly.engines import build_parts
from qwen3_distill.pipeline.assembly.machine_checks import quantization_of
from qwen3_distill.pipeline.device_check import DEVICE_SPEED, check_speed
from qwen3_distill.pipeline.finding import (
    Finding,
    Status,
    Verdict,
    bad,
    doubtful,
    good,
    refusal,
    skipped,
)
from qwen3_distill.pipeline.models import LocalConfig, local_model, localize
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.preflight import findings
from qwen3_distill.planning.gpu import detect_gpu
from qwen3_distill.types import TopKRequest, TopKScore
from qwen3_distill.utils.signals import signals_as_ctrl_c

Say = Callable[[str], None]
Tell = Callable[[Finding], None]

_START, _CLOSE = "engines start", "engines end"
_PRECISION = "FP8 against bfloat16"
_NO_SCORES = "the objective needs no scores"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]
    seconds: float

    def count(self, status: Status) -> int:
        """Return how many checks ended so."""
        return sum(finding.status is status for finding in self.findings)

    @property
    def failed(self) -> int:
        return self.count(Status.FAIL)

    def record(self) -> dict[str, Any]:
        """Return the diagnosis as JSON values."""
        return {
            "checks": len(self.findings) - self.count(Status.SKIP),
            "failed": self.failed,
            "warned": self.count(Status.WARN),
            "skipped": self.count(Status.SKIP),
            "seconds": round(self.seconds, 2),
            "findings": [finding.record() for finding in self.findings],
        }


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A check of the real pass."""

    name: str
    find: Callable[[RealPass], Awaitable[Verdict]]
    needs: tuple[str, ...] = ()
    """Names of checks without whose success this one cannot be made."""
    needs_scores: bool = False
    """Whether it is left out where the objective needs no scores."""


_STAGES = (
    _Stage(name=_START, find=RealPass.start),
    _Stage(name="weights in the engine", find=RealPass.first_push, needs=(_START,)),
    _Stage(name="rollouts", find=RealPass.sample, needs=("weights in the engine",)),
    _Stage(name="ends of answers", find=RealPass.ends, needs=("rollouts",)),
    _Stage(name="teacher's answers", find=RealPass.teacher_answers, needs=("rollouts",)),
    _Stage(name="scores", find=RealPass.score, needs=("rollouts",), needs_scores=True),
    _Stage(
        name="scores alone and in a batch",
        find=RealPass.score_alone,
        needs=("scores",),
        needs_scores=True,
    ),
    _Stage(
        name="scores of every server",
        find=RealPass.score_by_each_server,
        needs=("scores",),
        needs_scores=True,
    ),
    _Stage(
        name="scores at another temperature",
        find=RealPass.score_at_other_temperature,
        needs=("scores",),
        needs_scores=True,
    ),
    _Stage(
        name="teacher has its weights",
        find=RealPass.teacher_is_awake,
        needs=("scores",),
        needs_scores=True,
    ),
    _Stage(
        name="learner against engine",
        find=RealPass.learner_against_engine,
        needs=("rollouts", "scores"),
    ),
    _Stage(
        name="weights after a step",
        find=RealPass.push_after_step,
        needs=("learner against engine",),
    ),
    _Stage(
        name="rollouts after a step",
        find=RealPass.sample_after_step,
        needs=("weights after a step",),
    ),
    _Stage(name=_CLOSE, find=RealPass.close, needs=(_START,)),
)

ENGINE_CHECKS = (DEVICE_SPEED, *(stage.name for stage in _STAGES), _PRECISION)
"""Names of the checks that start engines, in their order."""


def diagnose(
    config: RunConfig,
    *,
    engines: bool,
    num_rollouts: int,
    unquantized: str | None,
    say: Say,
    tell: Tell,
    adapt: Callable[[Parts], Parts] = lambda parts: parts,
) -> Diagnosis:
    """Make all checks of a config.

    Args:
        engines: also start the config's engines, unless a check before has failed.
        num_rollouts: how many rollouts the engines sample.
        unquantized: directory or hub id of the teacher before it was quantized; None: the config's.
        say: told what is being done.
        tell: told every finding as it is made.
        adapt: may replace parts before the engines start, e.g. by faulty ones in a test.

    Raises:
        ModelError, DataError: a model or dataset is neither here nor on the hub.
    """
    began = time.monotonic()
    found: list[Finding] = []

    def add(finding: Finding) -> None:
        found.append(finding)
        tell(finding)

    with signals_as_ctrl_c():
        local = localize(config, say=say, warn=say)
        say("checking files, data and machine")
        for finding in findings(local.config):
            add(finding)
        failed = [finding.name for finding in found if finding.status is Status.FAIL]
        if not engines or failed:
            reason = f"needs: {', '.join(failed)}" if engines else "not asked for (--no-engines)"
            for name in ENGINE_CHECKS:
                add(Finding(name=name, verdict=skipped(reason)))
        else:
            asyncio.run(_examine_engines(local, num_rollouts, unquantized, say, add, adapt))
    return Diagnosis(findings=tuple(found), seconds=time.monotonic() - began)


async def _examine_engines(
    local: LocalConfig,
    num_rollouts: int,
    unquantized: str | None,
    say: Say,
    add: Tell,
    adapt: Callable[[Parts], Parts],
) -> None:
    say(f"checking: {DEVICE_SPEED}")
    add(await _timed(DEVICE_SPEED, asyncio.to_thread(check_speed)))
    local.fetch_weights(say)
    folder = Path(tempfile.mkdtemp(prefix="qwen3-distill-doctor-"))
    config = examined(local.config, str(folder / "run"))
    request = score_request(config)
    statuses: dict[str, Status] = {}
    engines: RealPass | None = None
    keeps_logs = False
    try:
        say("loading models")
        parts = adapt(build_parts(config, warn=say, score_request=request))
        engines = RealPass(parts, config, num_rollouts, say, request)
        for stage in _STAGES:
            if stage.needs_scores and request is None:
                add(Finding(name=stage.name, verdict=skipped(_NO_SCORES)))
                continue
            finding = await _made(stage, engines, statuses, say)
            statuses[stage.name] = finding.status
            if finding.status is Status.FAIL and any((folder / "run" / "logs").glob("*")):
                keeps_logs = True
            add(finding)
        add(await _timed(_PRECISION, _precision(engines, unquantized, say)))
    finally:
        if engines is not None and not engines.is_closed:
            await engines.parts.close()
        if keeps_logs:
            say(f"the engines' logs are in {folder / 'run' / 'logs'}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


async def _made(stage: _Stage, engines: RealPass, statuses: dict[str, Status], say: Say) -> Finding:
    lacking = [name for name in stage.needs if statuses.get(name) in (Status.FAIL, Status.SKIP)]
    if lacking:
        return Finding(name=stage.name, verdict=skipped(f"needs: {', '.join(lacking)}"))
    say(f"checking: {stage.name}")
    return await _timed(stage.name, stage.find(engines))


async def _timed(name: str, work: Awaitable[Verdict]) -> Finding:
    began = time.monotonic()
    try:
        verdict = await work
    except DistillError as error:
        verdict = refusal(error)
        if not verdict.change:
            verdict = replace(verdict, change="see docs/start/troubleshooting.md")
    return Finding(name=name, verdict=verdict, seconds=time.monotonic() - began)


async def _precision(engines: RealPass, unquantized: str | None, say: Say) -> Verdict:
    """Compare the quantized teacher's scores with the unquantized one's, on the same rollouts."""
    config = engines.config
    if quantization_of(config) is None:
        return skipped("the teacher is not quantized")
    if len(config.teachers) > 1:
        return skipped(
            "there are several teachers: measure each with `qwen3-distill audit-teacher` and a "
            "config that has it alone"
        )
    if config.teacher.has_own_tokenizer:
        return skipped("scoring.tokenizer=own: precisions are compared on the student's own tokens")
    if detect_gpu() is None:
        return skipped("there is no GPU to compute the unquantized scores on")
    served = [result for result in engines.results if isinstance(result, TopKScore)]
    if not served or len(served) < len(engines.results):
        return skipped("needs: scores")
    directory = config.teacher.model
    if unquantized is not None:
        directory = local_model(unquantized, "--unquantized", say)
    elif quantized_directory(directory):
        return skipped(
            f"{directory} is itself quantized; give the unquantized teacher with --unquantized"
        )
    request = engines.request
    assert isinstance(request, TopKRequest), "candidates were given"
    say("loading the unquantized teacher")
    report = await compare_with_unquantized(
        config, directory, request, engines.rollouts, served, say
    )
    found = (
        f"{report.mean_abs_nats:.3f} nats apart on average, {report.p99_abs_nats:.2f} for 99%, "
        f"KL at least {report.kl_nats:.2g} a token"
    )
    change = "set scoring.quantization=null, if the memory allows (docs/measured/fp8.md)"
    if report.mean_abs_nats > QUANTIZED_BROKEN_NATS:
        return bad(found, change)
    return (
        good(found)
        if report.mean_abs_nats <= QUANTIZED_NOTICEABLE_NATS
        else doubtful(found, change)
    )
