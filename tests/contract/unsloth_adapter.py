"""Real unsloth for the contract suite of `Learner`."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_distill.config import ObjectiveConfig, UnslothTraining, needs_hidden_states
from qwen3_distill.hosts.host import Host, WorkerSpec
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.training.unsloth.learner import unsloth_learner
from tests.contract.builders import run
from tests.contract.pooled_host import PooledHost
from tests.engines import INSTALLED, LOGS

if TYPE_CHECKING:
    from tests.contract.adapters import LearnerCase

ROOT = str(Path(__file__).parents[2])


def unsloth_environment() -> dict[str, str]:
    given = INSTALLED.variables.get("unsloth", {})
    environment = {"OMP_NUM_THREADS": "1", **given}
    if INSTALLED.device == "cpu":
        environment |= {"UNSLOTH_FORCE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def unsloth_config(**changes: Any) -> UnslothTraining:
    """float32, in the environment that the command line names."""
    values: dict[str, Any] = {
        "kind": "unsloth",
        "dtype": "float32",
        "autocast": "off",
        "gradient_checkpointing": "off",
        "python": INSTALLED.python.get("unsloth"),
        "environment": unsloth_environment(),
    }
    return UnslothTraining.model_validate(values | changes)


@cache
def pool(kind: str) -> WorkerSpec:
    """One process per kind of tuning: on CUDA unsloth patches the model's class for either."""
    environment = unsloth_environment()
    paths = [ROOT, environment.get("PYTHONPATH", "")]
    return WorkerSpec(
        name=f"unsloth pool ({kind})",
        python=INSTALLED.python["unsloth"],
        module="tests.contract.unsloth_pool_worker",
        log=LOGS / f"unsloth-{kind}.log",
        environment={
            **environment,
            "PYTHONPATH": ":".join(filter(None, paths)),
            "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp(prefix="unsloth-"),
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )


def pooled_learner(settings: LearnerSettings[UnslothTraining], log: Path) -> HostedLearner:
    """An unsloth learner whose process it shares with others; all else is the real one's."""

    def make(spec: WorkerSpec) -> Host:
        return PooledHost(spec.name, LocalProcess, pool(settings.training.tuning.kind))

    return unsloth_learner(settings, log=log, make_host=make)


@dataclass(frozen=True)
class UnslothLearnerAdapter:
    """Learners in float32. On CUDA they add up in another order, in other kernels."""

    packing: bool = False
    shared_prompts: bool = False

    @property
    def bitwise_repeatable(self) -> bool:
        return INSTALLED.device == "cpu"

    @property
    def slack(self) -> float:
        return 1.0 if INSTALLED.device == "cpu" else 10.0

    def supports(self, objective: ObjectiveConfig) -> bool:
        """Objectives over the teacher's hidden states stay in one process."""
        return not needs_hidden_states(objective)

    def build(self, model_dir: Path, wanted: "LearnerCase") -> HostedLearner:
        training = unsloth_config(
            tuning=wanted.tuning,
            optimizer=wanted.optimizer,
            micro_batch_tokens=wanted.micro_batch_tokens,
            max_model_tokens=wanted.max_model_tokens,
            chunk_tokens=wanted.chunk_tokens,
            gradient_checkpointing="on" if wanted.gradient_checkpointing else "off",
            autocast=wanted.autocast,
            packing=self.packing,
            shared_prompts=self.shared_prompts,
        )
        learner = pooled_learner(wanted.settings(model_dir, training), LOGS / "unsloth.log")
        run(learner.start())
        return learner


def own_process(model_dir: Path, log: Path, wanted: "LearnerCase", **changes: Any) -> HostedLearner:
    """A learner with a process of its own, not started."""
    training = unsloth_config(tuning=wanted.tuning, optimizer=wanted.optimizer, **changes)
    return unsloth_learner(wanted.settings(model_dir, training), log=log)
