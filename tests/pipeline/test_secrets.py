"""Secrets of a run's config reach none of its files, and the run goes on with other ones."""

import json
import stat
from pathlib import Path
from typing import Any

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config, dump_config
from qwen3_distill.pipeline.run_folder import RunFolder
from qwen3_distill.report.run_files import RunFiles
from tests.pipeline.builders import call_cli

SECRET = "s3cret-of-the-variables"


def config(folder: Path, secret: str, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "steps": 1,
        "prompts_per_step": 1,
        "student": {"model": "m"},
        "prompts": {"kind": "jsonl", "path": "a.jsonl"},
        "sampling": {"max_new_tokens": 8},
        "generation": {"kind": "vllm", "environment": {"HF_TOKEN": secret}},
        "scoring": {"kind": "sglang", "model": "t", "urls": [f"http://me:{secret}@host:1"]},
        "training": {"kind": "embedded"},
        "objective": {"kind": "sampled_reverse_kl"},
    }
    return check_config(values | changes)


def began(settings: RunConfig) -> Path:
    """Make the run folder of a run that has done a step."""
    with RunFolder(settings) as folder:
        folder.metrics.write_text('{"step": 1}\n')
        return folder.config


def test_the_folder_keeps_no_secret_and_its_config_is_private(tmp_path: Path) -> None:
    file = began(config(tmp_path, SECRET))
    assert SECRET not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "http://(hidden)@host:1" in file.read_text()


def test_a_run_goes_on_with_another_secret_and_shows_neither(tmp_path: Path) -> None:
    began(config(tmp_path, SECRET))
    with RunFolder(config(tmp_path, "another-s3cret")) as folder:
        assert folder.changes == []
    with RunFolder(config(tmp_path, SECRET, logging={"trace": False})) as folder:
        assert folder.changes == ["logging.trace: True -> False"]
        folder.accept_changes()
        assert SECRET not in folder.config.read_text()
        assert stat.S_IMODE(folder.config.stat().st_mode) == 0o600


def test_secrets_that_an_older_version_kept_are_taken_out(tmp_path: Path) -> None:
    settings = config(tmp_path, SECRET)
    file = began(settings)
    file.write_text(json.dumps(dump_config(settings)))
    file.chmod(0o644)
    assert SECRET not in json.dumps(RunFiles.load(file.parent).config)
    with RunFolder(settings) as folder:
        assert folder.changes == []
    assert SECRET not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_config_show_leaves_secrets_out(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(dump_config(config(tmp_path, SECRET))))
    shown = call_cli("config", "show", "-c", file)
    assert shown.code == 0
    assert SECRET not in shown.out
    assert '"HF_TOKEN": "(not recorded)"' in shown.out
