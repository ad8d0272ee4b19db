"""Builds the two teachers that a precision audit compares."""

from qwen3_distill.config import EmbeddedScoring, RunConfig, ScoringConfig, VllmScoring
from qwen3_distill.pipeline.assembly.plan import engine_log, plan_memory, require_plan
from qwen3_distill.pipeline.assembly.teachers import build_served
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.types import TopKRequest

_AUDIT_BATCH_TOKENS = 16384
_AUDIT_CHUNK_TOKENS = 1024


def build_audited_teacher(config: RunConfig, request: TopKRequest) -> TeacherScorer:
    """Build the configured teacher for a precision audit: without its cache, with ``request``."""
    scoring = config.teacher
    if isinstance(scoring, EmbeddedScoring):
        return _embedded(scoring.model, request, device=scoring.device, dtype=scoring.dtype)
    plan = require_plan(plan_memory(config))
    if isinstance(scoring, VllmScoring):
        return build_served(config, scoring, plan, request, "")
    return SglangTeacher(
        scoring,
        request=request,
        memory_fraction=plan.sglang_memory_fraction,
        max_total_tokens=plan.sglang_max_total_tokens,
        log=engine_log(config, "sglang"),
    )


def build_unquantized_teacher(
    scoring: ScoringConfig, model_dir: str, request: TopKRequest
) -> TeacherScorer:
    """Build the embedded teacher that a precision audit compares the configured one with.

    An embedded teacher already has the precision that its config asks for, so it is compared with
    the same weights in float32.
    """
    dtype = "float32" if isinstance(scoring, EmbeddedScoring) else scoring.dtype
    return _embedded(model_dir, request, device=scoring.device, dtype=dtype)


def _embedded(model_dir: str, request: TopKRequest, *, device: str, dtype: str) -> EmbeddedTeacher:
    return EmbeddedTeacher(
        model_dir,
        request=request,
        device=device,
        dtype=dtype,
        batch_tokens=_AUDIT_BATCH_TOKENS,
        chunk_tokens=_AUDIT_CHUNK_TOKENS,
    )
