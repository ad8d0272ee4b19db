"""The doctor passes on the lab pair with vLLM, SGLang and unsloth in their processes."""

from pathlib import Path

import pytest

from qwen3_distill.config.load import load_config
from qwen3_distill.doctor.diagnosis import diagnose
from qwen3_distill.pipeline.finding import Status
from tests.doctor.worlds import by_name, with_status
from tests.pipeline.test_real_engines import CONFIG, ROOT, engine_settings

pytestmark = [pytest.mark.vllm, pytest.mark.sglang, pytest.mark.unsloth]


def test_every_check_passes_on_the_lab_pair(tmp_path: Path) -> None:
    models = [
        f"student.model={ROOT / 'models/lab/student'}",
        f"scoring.model={ROOT / 'models/lab/teacher'}",
    ]
    settings = [f"output_dir={tmp_path / 'run'}", *models, *engine_settings()]
    diagnosis = diagnose(
        load_config(CONFIG, settings),
        engines=True,
        num_rollouts=8,
        unquantized=None,
        say=lambda text: None,
        tell=lambda finding: None,
    )
    assert with_status(diagnosis, Status.FAIL, Status.WARN) == []
    found = by_name(diagnosis)
    for line in (
        "engine versions",
        "memory plan",
        "scores alone and in a batch",
        "scores at another temperature",
        "teacher has its weights",
        "learner against engine",
        "rollouts after a step",
        "engines end",
    ):
        assert found[line].status is Status.PASS, line
    assert not found["engines end"].verdict.found.startswith("0 ")
    assert not (tmp_path / "run").exists()
