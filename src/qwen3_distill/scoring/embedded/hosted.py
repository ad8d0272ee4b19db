"""The embedded teacher in a host, as the controller makes it."""

from pathlib import Path

from qwen3_distill.config import EmbeddedScoring
from qwen3_distill.hosts.host import MakeHost, WorkerSpec
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.hosted import HostedTeacher
from qwen3_distill.types import ScoreRequest

_MODULE = "qwen3_distill.scoring.embedded.worker"


def hosted_embedded_teacher(
    config: EmbeddedScoring,
    *,
    request: ScoreRequest,
    log: Path,
    make_host: MakeHost = LocalProcess,
) -> HostedTeacher:
    """Make a `TeacherScorer` whose worker runs an `EmbeddedTeacher`.

    Args:
        request: what the objective needs; hidden states are of no use without the output head.
        log: file that takes the worker's output.
        make_host: where the worker runs.
    """
    model_dir = Path(config.model).resolve()
    there = config.model_copy(update={"model": str(model_dir)})
    host = make_host(
        WorkerSpec(
            name="embedded teacher",
            module=_MODULE,
            log=log,
            hang_timeout_s=config.hang_timeout_s,
            start_timeout_s=config.start_timeout_s,
        )
    )
    return HostedTeacher(
        host,
        Opening(there, request, timeout_s=config.start_timeout_s),
        identity=load_identity(model_dir),
        max_restarts=config.max_restarts,
    )
