"""vLLM and SGLang as members of fleets on a Ray cluster, each killed once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config.load import load_config
from qwen3_distill.generation.fleet import RolloutFleet
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.scoring.fleet import TeacherFleet
from tests.cluster.nodes import CARD, THREE_NODES
from tests.engines import INSTALLED
from tests.pipeline.faults import StruckEngine, StruckTeacher

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.vllm, pytest.mark.sglang]

ROOT = Path(__file__).parents[2]
STEPS, PROMPTS = 4, 8


def settings(output: Path) -> list[str]:
    training = "{kind: embedded, own_process: true, threads: 1, "
    training += "tuning: {kind: lora, rank: 8, alpha: 16.0}}"
    cluster = f"{{address: '{THREE_NODES.address}', card_resource: {CARD}, "
    cluster += "rollouts: {where: spark}, teachers: {where: spark}}"
    return [
        f"output_dir={output}",
        f"student.model={ROOT}/models/lab/student",
        f"scoring.model={ROOT}/models/lab/teacher",
        f"generation.python={INSTALLED.python['vllm']}",
        f"scoring.python={INSTALLED.python['sglang']}",
        *(
            f"{section}.environment={{OMP_NUM_THREADS: '1'}}"
            for section in ("generation", "scoring")
        ),
        f"training={training}",
        f"cluster={cluster}",
        f"steps={STEPS}",
        f"prompts_per_step={PROMPTS}",
        "evaluation=null",
    ]


def test_vllm_and_sglang_in_a_cluster_may_die_once_each(tmp_path: Path) -> None:
    def adapt(parts: Parts) -> Parts:
        assert isinstance(parts.engine, RolloutFleet)
        assert isinstance(parts.teacher, TeacherFleet)
        replica: Any = parts.engine.replicas[0]
        teacher: Any = parts.teacher.teachers[0]
        fakes: dict[str, Any] = {
            "engine": StruckEngine(parts.engine, 1, replica.host.kill),
            "teacher": StruckTeacher(parts.teacher, 1, teacher.host.kill),
        }
        return replace(parts, **fakes)

    losses: list[str] = []
    config = load_config(ROOT / "configs" / "lab-vllm.yaml", settings(tmp_path / "run"))
    assert run(config, SilentReporter(), losses.append, adapt) is not None
    assert any("rollout replica 0 was lost" in loss for loss in losses)
    assert any("teacher 0 was lost" in loss for loss in losses)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["score/dropped_rollouts"] for row in rows) == 0
    ledger = read_jsonl(tmp_path / "run" / "ledger.jsonl")
    numbers = [int(number) for row in ledger for number in row["trained"].split()]
    assert sorted(numbers) == list(range(STEPS * PROMPTS))
    logs = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert {"vllm-0.log", "sglang-0.log"} <= logs
