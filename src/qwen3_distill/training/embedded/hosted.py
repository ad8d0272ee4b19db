"""The embedded learner in a host, as the controller makes it."""

from pathlib import Path

from qwen3_distill.config import EmbeddedTraining
from qwen3_distill.hosts.host import MakeHost, WorkerSpec
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.training.settings import LearnerSettings

_MODULE = "qwen3_distill.training.embedded.worker"


def hosted_embedded_learner(
    settings: LearnerSettings[EmbeddedTraining], *, log: Path, make_host: MakeHost = LocalProcess
) -> HostedLearner:
    """Make a `ReplayingLearner` whose worker runs an `EmbeddedLearner`.

    Args:
        settings: with an objective that needs no hidden states of the teacher.
        log: file that takes the worker's output; appended to.
        make_host: where the worker runs.
    """
    training = settings.training
    host = make_host(
        WorkerSpec(
            name="embedded learner",
            module=_MODULE,
            log=log,
            hang_timeout_s=training.hang_timeout_s,
            start_timeout_s=training.start_timeout_s,
        )
    )
    opening = Opening(settings.resolved(), timeout_s=training.start_timeout_s)
    return HostedLearner(host, opening, settings.model_dir, max_restarts=training.max_restarts)
