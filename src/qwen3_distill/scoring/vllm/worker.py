"""The worker of a vLLM teacher on another node."""

from pathlib import Path

from qwen3_distill.config import VllmScoring
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.scoring.served.worker import ServedTeacherWorker
from qwen3_distill.scoring.vllm.teacher import VllmTeacher
from qwen3_distill.types import ScoreRequest


def make_teacher(
    config: VllmScoring, request: ScoreRequest, kv_cache_bytes: int, log: Path
) -> VllmTeacher:
    """Make the teacher of what `hosted_vllm_teacher` sends."""
    return VllmTeacher(config, request=request, kv_cache_bytes=kv_cache_bytes, log=log)


if __name__ == "__main__":
    serve_worker(ServedTeacherWorker(make_teacher))
