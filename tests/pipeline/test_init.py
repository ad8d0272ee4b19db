"""The command `init`: shipped configs are what it writes; its configs run; wrong input is named."""

import json
import shlex
from pathlib import Path

import pytest

from qwen3_distill.config.load import load_config
from qwen3_distill.environments import installed as environments
from tests.pipeline.builders import call_cli

ROOT = Path(__file__).parents[2]
LAB = (
    *("--student", str(ROOT / "models/lab/student")),
    *("--teacher", str(ROOT / "models/lab/teacher")),
)
PAIR = ("--student", "Qwen/Qwen3-4B", "--teacher", "Qwen/Qwen3-8B")
HUB = ("--data", "openai/gsm8k", "--field", "question")


@pytest.fixture(autouse=True)
def without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environments, "machine_kind", lambda: "cpu")


def command_of(config: Path) -> list[str]:
    """The command in the head of a config."""
    lines = [line.removeprefix("#") for line in config.read_text().splitlines() if line[:1] == "#"]
    (start,) = [n for n, line in enumerate(lines) if line.strip().startswith("qwen3-distill init")]
    words = ""
    for line in lines[start:]:
        words += line.rstrip("\\")
        if not line.endswith("\\"):
            break
    return shlex.split(words)[1:]


@pytest.mark.parametrize("name", ["h200.yaml", "h200-streaming.yaml", "gb10.yaml"])
def test_shipped_config_is_what_the_command_in_its_head_writes(name: str, tmp_path: Path) -> None:
    shipped = ROOT / "configs" / name
    command = command_of(shipped)
    machine = name.removesuffix(".yaml").removesuffix("-streaming")
    assert command[command.index("--machine") + 1] == machine
    (tmp_path / "configs").mkdir()
    result = call_cli(*command)
    assert (result.code, result.err) == (0, "")
    written = tmp_path / "configs" / name
    assert written.read_bytes() == shipped.read_bytes(), f"rm {shipped}; {shlex.join(command)}"


def test_config_for_the_lab_pair_on_a_cpu_is_checked_and_runs(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    wishes = ("--data", "task", "--steps", "2", "--max-new-tokens", "16", "--out", str(file))
    result = call_cli("init", *LAB, *wishes)
    assert (result.code, result.err) == (0, "")
    assert f"config check --config {file}" in result.out
    assert call_cli("config", "check", "--config", file).code == 0
    small = ["prompts_per_step=8", "evaluation.final_num_problems=10", "evaluation.num_problems=10"]
    result = call_cli("run", "--config", file, *small)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "runs" / "lab" / "summary.json").read_text())
    assert summary["steps"] == 2


def test_config_for_files_reads_them_and_names_a_wrong_field(tmp_path: Path) -> None:
    rows = ROOT / "tests" / "data" / "gsm8k_sample.jsonl"
    asked = ("--data", str(rows), "--answer-field", "answer", "--out", "a.yaml")
    result = call_cli("init", *LAB, *asked, "--field", "prompt", "--max-new-tokens", "64")
    assert result.code == 2
    assert "has no field" in result.err
    assert "question" in result.err  # the fields that are there
    assert not (tmp_path / "a.yaml").exists()
    result = call_cli("init", *LAB, *asked, "--field", "question", "--max-new-tokens", "64")
    assert result.code == 0, result.err
    assert "kind: jsonl" in (tmp_path / "a.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*LAB, "--data", "task", "--out", "there.yaml"), "--out there.yaml exists already"),
        ((*LAB, "--data", "task", "--out", "no/c.yaml"), "there is no folder no"),
        ((*LAB, "--data", "openai/gsm8k", "--out", "c.yaml"), "--field is missing"),
        ((*LAB, "--data", "no.jsonl", "--field", "q", "--out", "c.yaml"), "--data no.jsonl: exp"),
        ((*LAB, *HUB, "--held-out", "test", "--out", "c.yaml"), "--held-out needs --answer-field"),
        ((*PAIR, *HUB, "--kind", "cuda", "--out", "c.yaml"), "no NVIDIA driver is seen here"),
        (
            (*PAIR, *HUB, "--kind", "cpu", "--machine", "h200", "--out", "c.yaml"),
            "--machine h200 has a GPU",
        ),
        (
            (*PAIR, *HUB, "--machine", "h200", "--gpu-memory", "24", "--out", "c.yaml"),
            "What would free memory",
        ),
        ((*LAB, "--data", "task"), "Missing option '--out'"),
        (("--student", "models/no/such", *LAB[2:], "--data", "task", "--out", "c.yaml"), "no/such"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value.split(":")[0],
)
def test_wrong_or_missing_option_is_named_and_nothing_is_written(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "there.yaml").write_text("mine\n")
    result = call_cli("init", *arguments)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine\n"


def test_option_with_line_breaks_stays_in_its_comment_and_its_value(tmp_path: Path) -> None:
    suffix = "\n\noutput_dir: /elsewhere\nIt's \\boxed{}"
    rows = str(ROOT / "tests" / "data" / "gsm8k_sample.jsonl")
    asked = ("--data", rows, "--field", "question", "--suffix", suffix, "--out", "a.yaml")
    result = call_cli("init", *LAB, *asked, "--max-new-tokens", "64")
    assert result.code == 0, result.err
    config = load_config(tmp_path / "a.yaml")
    assert config.prompts.kind == "jsonl"
    assert config.prompts.suffix == suffix
    assert config.output_dir == "runs/a"
    assert r"--suffix $'\n\noutput_dir" in (tmp_path / "a.yaml").read_text()
