"""The unsloth learner, as the controller makes it. unsloth is not imported here."""

from collections.abc import Mapping
from pathlib import Path

from qwen3_distill.config import UnslothTraining
from qwen3_distill.environments.installed import engine_python
from qwen3_distill.hosts.host import MakeHost, WorkerSpec
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.training.settings import LearnerSettings

_MODULE = "qwen3_distill.training.unsloth.worker"


def unsloth_learner(
    settings: LearnerSettings[UnslothTraining], *, log: Path, make_host: MakeHost = LocalProcess
) -> HostedLearner:
    """Make a `ReplayingLearner` whose steps are taken by unsloth.

    Args:
        log: file that takes the worker's output; appended to.
        make_host: where the worker runs.

    Raises:
        ConfigError: no interpreter is named and no environment of unsloth is installed.
    """
    training = settings.training
    host = make_host(
        WorkerSpec(
            name="unsloth learner",
            python=engine_python("unsloth", "training", training.python),
            module=_MODULE,
            log=log,
            hang_timeout_s=training.hang_timeout_s,
            start_timeout_s=training.start_timeout_s,
        )
    )
    return HostedLearner(
        host, UnslothOpening(settings), settings.model_dir, max_restarts=training.max_restarts
    )


class UnslothOpening(Opening):
    """Opens the learner in its worker, with the variables that unsloth needs."""

    def __init__(self, settings: LearnerSettings[UnslothTraining]) -> None:
        super().__init__(settings.resolved(), timeout_s=settings.training.start_timeout_s)
        self._settings = settings

    def environment(self) -> Mapping[str, str]:
        return unsloth_environment(self._settings)


def unsloth_environment(settings: LearnerSettings[UnslothTraining]) -> dict[str, str]:
    """Variables of the worker; the config's come last."""
    variables = {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HUB_OFFLINE": "1",  # the student is a directory
    }
    return variables | settings.training.environment
