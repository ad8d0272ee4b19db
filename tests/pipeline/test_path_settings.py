"""Every path setting and option takes ~ for the home directory and refuses URLs and variables."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config
from qwen3_distill.data.rollout_files import read_scored
from qwen3_distill.errors import ConfigError
from tests.pipeline.builders import EVALUATION, call_cli, refused, tiny_values, write_config
from tests.tiny_models import TinyModels

JSONL = {"kind": "jsonl", "path": "{}"}
SGLANG = {"kind": "sglang", "model": "m"}
SERVER = SGLANG | {"urls": ["http://127.0.0.1:1"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "output_dir": {"output_dir": "{}"},
    "student.model": {"student.model": "{}"},
    "scoring.model": {"scoring.model": "{}"},
    "prompts.path": {"prompts": JSONL},
    "prompts.path ": {"prompts": {"kind": "parquet", "path": "{}"}},
    "prompts.path  ": {"prompts": {"kind": "hf", "path": "{}"}},
    "evaluation.prompts.path": {
        "evaluation": EVALUATION
        | {"prompts": JSONL | {"answer_field": "a"}, "verifier": {"kind": "math"}}
    },
    "generation.python": {"generation": {"kind": "vllm", "python": "{}"}},
    "training.python": {"training": {"kind": "unsloth", "python": "{}"}},
    "scoring.python": {"scoring": SGLANG | {"python": "{}"}},
    "scoring.model ": {"scoring": {"kind": "sglang", "model": "{}"}},
    "scoring.cache": {"scoring": SGLANG | {"cache": "{}"}},
    "scoring.api_key_file": {"scoring": SERVER | {"api_key_file": "{}"}},
}


def filled(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {key: filled(inner, text) for key, inner in value.items()}
    return text if value == "{}" else value


def config_with(setting: str, text: str, models: TinyModels, tmp_path: Path) -> RunConfig:
    return check_config(tiny_values(models, tmp_path / "run", filled(SETTINGS[setting], text)))


def value_of(config: RunConfig, setting: str) -> Any:
    value: Any = config
    for name in setting.strip().split("."):
        value = getattr(value, name)
    return value


def test_the_file_of_a_verifiers_function(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    def function(text: str) -> Any:
        changes = {"verifier": {"kind": "python", "function": text}}
        return value_of(
            check_config(tiny_values(tiny_models, tmp_path, changes)), "verifier.function"
        )

    assert function("~/judge.py:f") == "/home/me/judge.py:f"
    assert function("judge.py:f") == "judge.py:f"
    for text, words in (("s3://b/judge.py:f", "URL"), ("${HOME}/judge.py:f", "variable")):
        with pytest.raises(ConfigError, match=words):
            function(text)


def path_settings(schema: dict[str, Any]) -> set[str]:
    """The names of all settings whose name says that they hold a path."""
    names = {name for part in schema["$defs"].values() for name in part.get("properties", {})}
    return names & {"path", "model", "python", "cache", "api_key_file"} | {"output_dir"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_path_setting(
    setting: str, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert value_of(config_with(setting, "~/x", tiny_models, tmp_path), setting) == "/h/x"
    assert value_of(config_with(setting, "a/x", tiny_models, tmp_path), setting) == "a/x"
    for text in ("s3://b/x", "file:///x", "hf://x/y", "${HOME}/x", "$HOME/x", "~nobody-here/x"):
        with pytest.raises(ConfigError) as refusal:
            config_with(setting, text, tiny_models, tmp_path)
        assert f"{setting.strip()}: " in str(refusal.value)
        assert repr(text) in str(refusal.value)


def test_no_path_setting_is_forgotten() -> None:
    covered = {setting.strip().rpartition(".")[2] for setting in SETTINGS}
    assert path_settings(RunConfig.model_json_schema()) == covered


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--config", "{}"],
        ["config", "show", "-c", "{}"],
        ["generate", "--config", "c.yaml", "--out", "{}"],
        ["score", "--config", "c.yaml", "--rollouts", "{}"],
        ["score", "--config", "c.yaml", "--out", "{}"],
        ["train", "--config", "c.yaml", "--scored", "{}"],
        ["train", "--config", "c.yaml", "--out", "{}"],
        ["eval", "--config", "c.yaml", "--model", "{}"],
        ["eval", "--config", "c.yaml", "--out", "{}"],
        ["audit-teacher", "--config", "c.yaml", "--unquantized", "{}"],
        ["audit-teacher", "--config", "c.yaml", "--rollouts", "{}"],
        ["audit-teacher", "--config", "c.yaml", "--out", "{}"],
        ["report", "{}"],
        ["report", "x", "--out", "{}"],
    ],
    ids=" ".join,
)
def test_every_path_option(command: list[str]) -> None:
    for text, words in (("s3://b/x", ["URL", "mount"]), ("${HOME}/x", ["variable"])):
        result = call_cli(*(part.replace("{}", text) for part in command))
        assert result.code == 2
        assert [word for word in words if word not in result.err] == []


def test_options_and_settings_lead_to_the_same_files(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    shutil.copytree(tiny_models.student, home / "student")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    values = {"steps": 1, "student.model": "~/student", "output_dir": "~/run"}
    write_config(home / "c.yaml", tiny_values(tiny_models, Path("x"), values))
    assert call_cli("run", "--config", "~/c.yaml").code == 0
    assert call_cli("report", "~/run", "--out", "~/report.html").code == 0
    assert call_cli("generate", "--config", "~/c.yaml", "--out", "~/r.parquet").code == 0
    assert sorted(os.listdir(home)) == ["c.yaml", "r.parquet", "report.html", "run", "student"]
    assert os.listdir(work) == []


@pytest.mark.parametrize("folder", ["./~", "./~x/run", "run:1", "hdfs:x", "a b", "\u00e9"])
def test_names_that_libraries_would_read_otherwise(
    folder: str, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    changes = {"steps": 1, "output_dir": folder, "logging.tensorboard": True}
    write_config(tmp_path / "c.yaml", tiny_values(tiny_models, Path("x"), changes))
    result = call_cli("run", "--config", "c.yaml")
    assert result.code == 0, result.err
    files = os.listdir(tmp_path / folder)
    assert {"summary.json", "rollouts", "tensorboard", "student", "report.html"} <= set(files)
    assert read_scored(Path(folder) / "rollouts" / "step-000000.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml", Path(folder).parts[0]}


def test_refused_folder_is_not_made(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, Path("x")))
    for text in ("s3://bucket/run", "${HOME}/run", "$HOME/run", "file:///run"):
        refused("run", "--config", config, f"output_dir={text}", words=["output_dir: ", text])
    assert os.listdir(tmp_path) == ["c.yaml"]
