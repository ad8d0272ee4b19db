"""The controller's side of the example of docs/extend/your-own-engine.md, and its adapter."""

from dataclasses import dataclass
from pathlib import Path

from qwen3_distill.hosts.host import MakeHost, WorkerSpec
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.hosted import HostedTeacher
from qwen3_distill.types import SampledRequest, ScoreRequest
from tests.contract.builders import run
from tests.engines import LOGS

_MODULE = "tests.contract.plain_teacher_worker"
_ROOT = str(Path(__file__).parents[2])


def plain_teacher(
    model_dir: str | Path, request: ScoreRequest, *, log: Path, make_host: MakeHost = LocalProcess
) -> HostedTeacher:
    """Make a `TeacherScorer` whose worker runs a transformers model."""
    there = Path(model_dir).resolve()
    host = make_host(
        WorkerSpec(
            name="plain teacher",
            module=_MODULE,
            log=log,
            environment={"PYTHONPATH": _ROOT},
            hang_timeout_s=900.0,
        )
    )
    return HostedTeacher(
        host,
        Opening(str(there), request, timeout_s=900.0),
        identity=load_identity(there),
        max_restarts=3,
    )


@dataclass(frozen=True)
class PlainTeacherAdapter:
    make_host: MakeHost = LocalProcess
    gives_hidden_states: bool = False
    scores_given_candidates: bool = False
    parity_nats: float = 1e-4
    """Between two float32 forward passes; 5e-6 was seen. A wrong shift is off by nats."""
    repeat_nats: float = 1e-5
    tokens_that_show_a_fault: int = 3

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> TeacherScorer:
        """Batches and chunks are of no use to it: one job is one pass."""
        teacher = plain_teacher(
            model_dir, request, log=LOGS / "plain-teacher.log", make_host=self.make_host
        )
        run(teacher.start())
        return teacher
