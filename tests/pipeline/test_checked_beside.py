"""A run's answers are checked beside its steps: in a thread of their own, once each."""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.pipeline.verification import BackgroundVerifier
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.scoring.wrapper import TeacherWrapper
from qwen3_distill.types import Rollout, ScoreResult, ScoringJob
from tests.pipeline.builders import TASK_REWARD, Values, raise_warning, tiny_config
from tests.tiny_models import TinyModels

CHECKED: Values = {"verifier": {"kind": "task"}}
STREAMING: Values = {"pipeline": {"kind": "streaming"}}
OFFLINE: Values = {"pipeline": {"kind": "offline", "collect_steps": 2}}


@pytest.mark.parametrize(
    "changes",
    [CHECKED, TASK_REWARD, CHECKED | STREAMING, TASK_REWARD | STREAMING, CHECKED | OFFLINE],
    ids=["sequential", "its reward", "streaming", "its reward, streaming", "offline"],
)
def test_no_step_checks_an_answer_itself(
    tiny_models: TinyModels, tmp_path: Path, changes: Values
) -> None:
    threads: set[int] = set()
    checked: Counter[str] = Counter()

    def check(rollout: Rollout) -> float:
        threads.add(threading.get_ident())
        checked[rollout.rollout_id] += 1
        return float(rollout.response_ids[0] % 2)

    def with_check(parts: Parts) -> Parts:
        return replace(parts, verifier=BackgroundVerifier(check))

    config = tiny_config(tiny_models, tmp_path, {**changes, "steps": 2})
    assert run(config, SilentReporter(), raise_warning, with_check)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert len(checked) == 8  # two steps of four
    assert set(checked.values()) == {1}


def test_answers_are_checked_while_the_teacher_scores(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    begun = threading.Event()

    class WaitingTeacher(TeacherWrapper[TeacherScorer]):
        async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
            assert await asyncio.to_thread(begun.wait, 60), "no answer is checked meanwhile"
            begun.clear()
            return await super().score(jobs)

    def check(rollout: Rollout) -> float:
        begun.set()
        return 1.0

    def waiting(parts: Parts) -> Parts:
        teacher = WaitingTeacher(parts.required_teacher)
        return replace(parts, teacher=teacher, verifier=BackgroundVerifier(check))

    config = tiny_config(tiny_models, tmp_path, CHECKED | {"steps": 1})
    assert run(config, SilentReporter(), raise_warning, waiting)
