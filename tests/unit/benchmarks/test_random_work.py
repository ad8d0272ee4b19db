"""Benchmarks without data plan every engine with the memory that was free before the first."""

from pathlib import Path

import pytest

from benchmarks.lib import random_work
from qwen3_distill.config.load import load_config
from qwen3_distill.planning.device import stated_memory

CONFIG = Path(__file__).parents[3] / "configs" / "h200.yaml"


def test_memory_is_what_is_free_now_unless_it_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_work, "detect_memory", lambda: stated_memory(100 << 30))
    found = random_work.for_random_work(load_config(CONFIG, ["planning.prompt_tokens=7"]))
    assert found.planning.device_memory_gib == 100
    assert found.planning.prompt_tokens == 7
    assert (found.prompts.kind, found.verifier, found.evaluation) == ("task", None, None)
    stated = load_config(CONFIG, ["planning.device_memory_gib=80"])
    assert random_work.for_random_work(stated).planning.device_memory_gib == 80
