"""Fleets as adapters of the contract suites: several members behind one port."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.fleet import RolloutFleet
from qwen3_distill.ports import StreamingRolloutEngine, TeacherScorer
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.fleet import TeacherFleet
from qwen3_distill.types import SampledRequest, ScoreRequest
from tests.contract.builders import run


def no_losses(message: str) -> None:
    raise AssertionError(f"a member was lost: {message}")


def rollout_fleet(
    engines: list[StreamingRolloutEngine],
    *,
    max_restarts: int = 3,
    warn: Callable[[str], None] = no_losses,
) -> RolloutFleet:
    fleet = RolloutFleet(engines, max_restarts=max_restarts, warn=warn)
    run(fleet.start())
    return fleet


@dataclass(frozen=True)
class RolloutFleetAdapter:
    """Embedded engines of this process as replicas."""

    num_replicas: int
    keeps_cache_over_updates: bool = True

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> StreamingRolloutEngine:
        return rollout_fleet(
            [
                EmbeddedRolloutEngine(
                    model_dir, device="cpu", dtype="float32", max_sequences=max_sequences
                )
                for _ in range(self.num_replicas)
            ]
        )


@dataclass(frozen=True)
class TeacherFleetAdapter:
    """Embedded teachers of this process as members."""

    num_teachers: int
    gives_hidden_states: bool = True
    parity_nats: float = 1e-4
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
        fleet = TeacherFleet(
            [
                EmbeddedTeacher(
                    model_dir,
                    request=request,
                    device="cpu",
                    dtype="float32",
                    batch_tokens=batch_tokens,
                    chunk_tokens=chunk_tokens,
                )
                for _ in range(self.num_teachers)
            ],
            max_restarts=3,
            warn=no_losses,
        )
        run(fleet.start())
        return fleet
