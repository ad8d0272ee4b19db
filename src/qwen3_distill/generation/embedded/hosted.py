"""The embedded rollout engine in a host, as the controller makes it."""

from pathlib import Path

from qwen3_distill.config import EmbeddedGeneration
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.hosts.host import MakeHost, WorkerSpec
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.modeling.loading import load_identity

_MODULE = "qwen3_distill.generation.embedded.worker"


def hosted_embedded_engine(
    model_dir: str | Path,
    config: EmbeddedGeneration,
    *,
    log: Path,
    make_host: MakeHost = LocalProcess,
) -> HostedRolloutEngine:
    """Make a `StreamingRolloutEngine` whose worker runs an `EmbeddedRolloutEngine`.

    Args:
        model_dir: the student.
        log: file that takes the worker's output.
        make_host: where the worker runs.
    """
    host = make_host(
        WorkerSpec(
            name="embedded rollout engine",
            module=_MODULE,
            log=log,
            hang_timeout_s=config.hang_timeout_s,
            start_timeout_s=config.start_timeout_s,
        )
    )
    opening = Opening(str(Path(model_dir).resolve()), config, timeout_s=config.start_timeout_s)
    return HostedRolloutEngine(
        host,
        opening,
        max_model_tokens=load_identity(model_dir).context_length,
        max_restarts=config.max_restarts,
    )
