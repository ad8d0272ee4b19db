"""A run of the shipped config with nothing but hub ids: the real engines are found, not named."""

import json
from pathlib import Path

import pytest

from qwen3_distill.environments.make import default_cache
from tests.engines import INSTALLED
from tests.hub_stand_in import running_hub, use_hub
from tests.pipeline.builders import call_cli
from tests.pipeline.test_real_engines import CONFIG, ON_GPU, ROOT, SECTIONS

pytestmark = [pytest.mark.vllm, pytest.mark.sglang, pytest.mark.unsloth]

SHORT = ("steps=2", "prompts_per_step=8", "evaluation=null", "sampling.max_new_tokens=24")


@pytest.fixture(autouse=True)
def environments_of_the_cache() -> None:
    given = {Path(INSTALLED.python[engine]) for engine in SECTIONS.values()}
    if any(default_cache() not in python.parents for python in given):
        pytest.skip("the engines given are not those of `qwen3-distill engines install`")


def test_config_without_interpreters_runs_from_hub_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is the one of the docs; the hub is a stand-in, as no hub is reachable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with running_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "hub")
        hub.add("lab/student", ROOT / "models/lab/student")
        hub.add("lab/teacher", ROOT / "models/lab/teacher")
        settings = ["student.model=lab/student", "scoring.model=lab/teacher", *SHORT]
        settings += ON_GPU if INSTALLED.device == "cuda" else ()
        result = call_cli("run", "--config", CONFIG, "output_dir=run", *settings)
    assert result.code == 0, result.err
    (start,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
    assert start["engines"].keys() == set(SECTIONS.values())
    assert start["hub"]["student"]["repo"] == "lab/student"
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [saved[section]["python"] for section in SECTIONS] == [None] * 3
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
