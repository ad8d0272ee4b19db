"""The SGLang teacher in a host, as the controller makes it."""

from pathlib import Path

from qwen3_distill.config import SglangScoring
from qwen3_distill.hosts.host import MakeHost
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.scoring.served.hosted import HostedServedTeacher
from qwen3_distill.scoring.sglang.server import MemoryFraction
from qwen3_distill.scoring.sglang.wire import SGLANG
from qwen3_distill.types import ScoreRequest


def hosted_sglang_teacher(
    config: SglangScoring,
    *,
    request: ScoreRequest,
    memory_fraction: MemoryFraction,
    max_total_tokens: int | None,
    log: Path,
    make_host: MakeHost,
) -> HostedServedTeacher:
    """Make a `TeacherScorer` whose worker starts an SGLang server next to it.

    Args:
        request: what the objective needs.
        memory_fraction: see `MemoryFraction`; a callable must be importable by name.
        max_total_tokens: of the server; None: SGLang's default.
        log: file that takes the worker's and the server's output.
        make_host: where the worker runs.
    """
    opening = Opening(
        config,
        request,
        memory_fraction,
        max_total_tokens,
        timeout_s=config.start_timeout_s,
    )
    return HostedServedTeacher(
        config,
        SGLANG,
        module="qwen3_distill.scoring.sglang.worker",
        opening=opening,
        make_host=make_host,
        log=log,
    )
