"""The worker of an SGLang teacher on another node."""

from pathlib import Path

from qwen3_distill.config import SglangScoring
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.scoring.served.worker import ServedTeacherWorker
from qwen3_distill.scoring.sglang.server import MemoryFraction
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.types import ScoreRequest


def make_teacher(
    config: SglangScoring,
    request: ScoreRequest,
    memory_fraction: MemoryFraction,
    max_total_tokens: int | None,
    log: Path,
) -> SglangTeacher:
    """Make the teacher of what `hosted_sglang_teacher` sends."""
    return SglangTeacher(
        config,
        request=request,
        memory_fraction=memory_fraction,
        max_total_tokens=max_total_tokens,
        log=log,
    )


if __name__ == "__main__":
    serve_worker(ServedTeacherWorker(make_teacher))
