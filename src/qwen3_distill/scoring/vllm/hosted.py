"""The vLLM teacher in a host, as the controller makes it."""

from pathlib import Path

from qwen3_distill.config import VllmScoring
from qwen3_distill.hosts.host import MakeHost
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.scoring.served.hosted import HostedServedTeacher
from qwen3_distill.scoring.vllm.wire import VLLM
from qwen3_distill.types import ScoreRequest


def hosted_vllm_teacher(
    config: VllmScoring,
    *,
    request: ScoreRequest,
    kv_cache_bytes: int,
    log: Path,
    make_host: MakeHost,
) -> HostedServedTeacher:
    """Make a `TeacherScorer` whose worker starts a vLLM server next to it.

    Args:
        request: what the objective needs.
        kv_cache_bytes: of the server.
        log: file that takes the worker's and the server's output.
        make_host: where the worker runs.
    """
    opening = Opening(config, request, kv_cache_bytes, timeout_s=config.start_timeout_s)
    return HostedServedTeacher(
        config,
        VLLM,
        module="qwen3_distill.scoring.vllm.worker",
        opening=opening,
        make_host=make_host,
        log=log,
    )
