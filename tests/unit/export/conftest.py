"""Finished runs of tiny models, made once."""

from pathlib import Path

import pytest

from tests.pipeline.builders import EVALUATION, LORA, run_to_end, tiny_config
from tests.tiny_models import TinyModels

STEPS = 2


@pytest.fixture(scope="session")
def full_run(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights trained, evaluated."""
    folder = tmp_path_factory.mktemp("full") / "run"
    changes = {"steps": STEPS, "evaluation": EVALUATION}
    run_to_end(tiny_config(tiny_models, folder, changes))
    return folder


@pytest.fixture(scope="session")
def lora_run(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA, not evaluated."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    changes = {
        "steps": STEPS,
        "training.tuning": LORA,
        "training.optimizer": {"learning_rate": 0.05},  # an adapter that is plain to see
    }
    run_to_end(tiny_config(tiny_models, folder, changes))
    return folder
