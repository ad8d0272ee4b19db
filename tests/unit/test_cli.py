"""Help, versions and messages of the command line; the pipeline's tests run the commands."""

import json
import re
from pathlib import Path

import pytest

import qwen3_distill
from qwen3_distill.cli.reference import update
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config
from tests.pipeline.builders import call_cli, tiny_config, tiny_values, write_config
from tests.tiny_models import TinyModels

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "configuration.md"

COMMANDS = {
    "run": ["--config", "-c", "KEY.SUB=VALUE"],
    "generate": ["--config", "--out", "--step", "--num-steps", "KEY.SUB=VALUE"],
    "score": ["--config", "--rollouts", "--out", "KEY.SUB=VALUE"],
    "train": ["--config", "--scored", "--out", "--off-policy", "KEY.SUB=VALUE"],
    "eval": ["--config", "--model", "--out", "KEY.SUB=VALUE"],
    "plan": [
        "--config",
        "--shape-student",
        "--shape-teacher",
        "--device-memory-gib",
        "KEY.SUB=VALUE",
    ],
    "audit-teacher": [
        "--config",
        "--rollouts",
        "--num",
        "--unquantized",
        "--out",
        "KEY.SUB=VALUE",
    ],
    "report": ["RUN_FOLDER", "--out"],
    "config show": ["--config", "KEY.SUB=VALUE"],
    "config check": ["--config", "KEY.SUB=VALUE"],
    "config schema": [],
    "config reference": [],
}


def plain(text: str) -> str:
    """Strip colours, which a terminal or a CI variable may switch on."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_says_what_the_command_does(command: str) -> None:
    result = call_cli(*command.split(), "--help")
    assert result.code == 0
    text = plain(result.out)
    assert f"qwen3-distill {command}" in text
    assert [name for name in COMMANDS[command] if name.lower() not in text.lower()] == []


def test_help_lists_every_command() -> None:
    for arguments in (["--help"], ["-h"]):
        text = plain(call_cli(*arguments).out)
        assert all(command.split()[0] in text for command in COMMANDS)
    text = plain(call_cli("config", "--help").out)
    assert all(name in text for name in ("show", "check", "schema", "reference"))


def test_unknown_command_is_refused() -> None:
    result = call_cli("trian")
    assert result.code == 2
    assert "trian" in result.err


@pytest.fixture
def config_file(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.yaml", tiny_values(tiny_models, tmp_path / "run"))


def test_show_prints_the_resolved_config(
    config_file: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    result = call_cli("config", "show", "--config", config_file, "seed=3")
    assert (result.code, result.err) == (0, "")
    shown = check_config(json.loads(result.out))
    assert shown == tiny_config(tiny_models, tmp_path / "run", {"seed": 3})
    assert not (tmp_path / "run").exists()


def test_check_sums_a_valid_config_up(config_file: Path) -> None:
    result = call_cli("config", "check", "--config", config_file)
    assert (result.code, result.err) == (0, "")
    assert "4 steps of 2 prompts x 2 samples" in result.out
    assert result.out.rstrip().endswith("is valid")


def test_check_names_everything_that_is_not_there(config_file: Path, tmp_path: Path) -> None:
    absent = tmp_path / "no"
    settings = [
        f"student.model={absent}/student",
        f"prompts={{kind: jsonl, path: {absent}.jsonl}}",
        f"generation={{kind: vllm, python: {absent}/python}}",
    ]
    result = call_cli("config", "check", "--config", config_file, *settings)
    assert result.code == 2
    for name in ("no/student", "no.jsonl", "no/python"):
        assert name in result.err


def test_an_interrupt_that_ends_a_run_at_once_says_what_is_left(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3_distill.pipeline.run.run", interrupted)
    result = call_cli("run", "--config", config_file)
    assert result.code == 130
    assert "continues from the newest checkpoint" in result.err


def test_the_version_is_told() -> None:
    result = call_cli("--version")
    assert (result.code, result.out) == (0, f"qwen3-distill {qwen3_distill.__version__}\n")


def test_check_refuses_an_invalid_config(config_file: Path) -> None:
    result = call_cli("config", "check", "--config", config_file, "stepz=3")
    assert (result.code, result.out) == (2, "")
    assert "did you mean `steps`" in result.err


def test_schema_is_that_of_the_config() -> None:
    result = call_cli("config", "schema")
    assert json.loads(result.out) == RunConfig.model_json_schema()


def test_reference_explains_every_key() -> None:
    text = call_cli("config", "reference").out
    schema = RunConfig.model_json_schema()
    sections = [s for s in schema["$defs"].values() if "properties" in s]
    for section in (schema, *sections):
        assert f"## {section['title']}" in text
        assert [key for key in section["properties"] if f"| `{key}` |" not in text] == []


def test_index_of_the_reference_leads_to_every_section() -> None:
    text = call_cli("config", "reference").out
    index, *sections = text.partition("## Index")[2].split("\n## ")
    names = [section.partition("\n")[0] for section in sections]
    assert len(names) > 30
    assert [name for name in names if f"[{name}](#{name.lower()})" not in index] == []
    assert "| `objective` | [SampledReverseKL](#sampledreversekl)," in index


def test_reference_in_the_docs_is_up_to_date() -> None:
    text = REFERENCE.read_text(encoding="utf-8") if REFERENCE.is_file() else ""
    assert text == call_cli("config", "reference").out, (
        "docs/configuration.md is missing or out of date: run make docs"
    )


def test_commands_in_the_docs_are_up_to_date() -> None:
    """Compares every command, option, default and help text; `make docs` writes them."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert page == update(page), "make docs"
    listed = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert len(listed) > 15
    for command in listed:  # each is one that can be typed
        assert call_cli(*command.split()[1:], "--help").code == 0, command
    assert "| `--kind` `cuda\\|cpu` |" in page
