"""Real unsloth for the contract suite of `Learner`."""

import atexit
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_distill.config import ObjectiveConfig, UnslothTraining, needs_hidden_states
from qwen3_distill.hosts.process import WorkerProcess
from qwen3_distill.training.unsloth.learner import UnslothLearner
from tests.contract.builders import run
from tests.engines import INSTALLED, LOGS

if TYPE_CHECKING:
    from tests.contract.adapters import LearnerSettings

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


class _Pool:
    """One process per kind of tuning: on CUDA unsloth patches the model's class for either."""

    def __init__(self) -> None:
        self._processes: dict[str, WorkerProcess] = {}
        self._numbers = itertools.count()

    async def process(self, kind: str) -> WorkerProcess:
        if kind not in self._processes:
            if not self._processes:
                atexit.register(self.end)
            environment = unsloth_environment()
            paths = [ROOT, environment.get("PYTHONPATH", "")]
            worker = WorkerProcess(
                f"unsloth pool ({kind})",
                python=INSTALLED.python["unsloth"],
                module="tests.contract.unsloth_pool",
                log=LOGS / f"unsloth-{kind}.log",
                environment={
                    **environment,
                    "PYTHONPATH": ":".join(filter(None, paths)),
                    "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp(prefix="unsloth-"),
                    "UNSLOTH_DISABLE_STATISTICS": "1",
                    "HF_HUB_OFFLINE": "1",
                },
            )
            await worker.start()
            self._processes[kind] = worker
        return self._processes[kind]

    def number(self) -> int:
        return next(self._numbers)

    def end(self) -> None:
        for worker in self._processes.values():
            worker.kill()
            run(worker.close())


_POOL = _Pool()


class _PooledWorker(WorkerProcess):
    """One learner's part of a process that many share."""

    def __init__(self, kind: str) -> None:
        super().__init__("unsloth learner", python="", module="", log=LOGS / "unsloth.log")
        self._kind = kind
        self._number = _POOL.number()
        self._shared: WorkerProcess | None = None

    async def start(self) -> None:
        self._shared = await _POOL.process(self._kind)

    async def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        assert self._shared is not None
        return await self._shared.call(
            "call", self._number, method, *arguments, timeout_s=timeout_s
        )

    async def close(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None and shared.is_running:
            await shared.call("drop", self._number)


class PooledUnslothLearner(UnslothLearner):
    """An `UnslothLearner` whose process it shares with others; all else is the real one's."""

    def _make_worker(self) -> WorkerProcess:
        return _PooledWorker(self._config.tuning.kind)


@dataclass(frozen=True)
class UnslothLearnerAdapter:
    """Learners in float32. On CUDA they add up in another order, in other kernels."""

    packing: bool = False

    @property
    def bitwise_repeatable(self) -> bool:
        return INSTALLED.device == "cpu"

    @property
    def slack(self) -> float:
        return 1.0 if INSTALLED.device == "cpu" else 10.0

    def supports(self, objective: ObjectiveConfig) -> bool:
        """Objectives over the teacher's hidden states stay in one process."""
        return not needs_hidden_states(objective)

    def build(self, model_dir: Path, settings: "LearnerSettings") -> UnslothLearner:
        learner = PooledUnslothLearner(
            model_dir,
            unsloth_config(
                tuning=settings.tuning,
                optimizer=settings.optimizer,
                micro_batch_tokens=settings.micro_batch_tokens,
                max_model_tokens=settings.max_model_tokens,
                chunk_tokens=settings.chunk_tokens,
                gradient_checkpointing="on" if settings.gradient_checkpointing else "off",
                autocast=settings.autocast,
                packing=self.packing,
            ),
            objective=settings.objective,
            total_steps=settings.total_steps,
            seed=settings.seed,
            publish_adapter=settings.publish_adapter,
            memory_bytes=None,
            log=LOGS / "unsloth.log",
            replay=settings.replay,
        )
        run(learner.start())
        return learner


def own_process(model_dir: Path, log: Path, settings: "LearnerSettings", **changes: Any) -> Any:
    """A learner with a process of its own, not started."""
    return UnslothLearner(
        model_dir,
        unsloth_config(tuning=settings.tuning, optimizer=settings.optimizer, **changes),
        objective=settings.objective,
        total_steps=settings.total_steps,
        seed=settings.seed,
        publish_adapter=settings.publish_adapter,
        memory_bytes=None,
        log=log,
    )
