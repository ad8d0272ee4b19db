"""`qwen3-distill plan` and `calibrate`."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from qwen3_distill.planning import calibrate as calibrate_module
from qwen3_distill.planning import device_rates
from tests.pipeline.builders import call_cli, refused
from tests.tiny_models import TinyModels

ROOT = Path(__file__).parents[3]


def write_config(folder: Path, tiny_models: TinyModels) -> Path:
    values = {
        "output_dir": "runs/plan",
        "steps": 1,
        "prompts_per_step": 256,
        "student": {"model": str(tiny_models.student)},
        "prompts": {"kind": "task"},
        "generation": {"kind": "vllm"},
        "scoring": {"kind": "sglang", "model": str(tiny_models.teacher)},
        "training": {"kind": "unsloth"},
        "objective": {"kind": "sampled_reverse_kl"},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_command_prints_the_table_and_the_settings(tiny_models: TinyModels, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_models)
    result = call_cli("plan", "-c", str(file), "--device-memory-gib", "32")
    assert result.code == 0, result.err
    for word in ("teacher", "student", "learner", "key-value cache", "left free", "32.0"):
        assert word in result.out
    for setting in ("memory_fraction", "max_total_tokens", "kv_cache_gib", "memory_gib"):
        assert f"{setting}=" in result.out


def test_command_plans_shapes_without_directories(tiny_models: TinyModels, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_models)
    shapes = ["--shape-student", "4B", "--shape-teacher", "32B-FP8"]
    big = call_cli("plan", "-c", str(file), *shapes, "--device-memory-gib", "140")
    assert (big.code, "32.76 B" in big.out) == (0, True)
    small = call_cli("plan", "-c", str(file), *shapes, "--device-memory-gib", "64")
    assert small.code == 2
    assert "What would free memory" in small.err
    assert call_cli("plan", "-c", str(file), "--shape-teacher", "31B").code == 2


@pytest.mark.parametrize("name", ["h200", "gb10"])
def test_plan_of_a_shipped_config_is_that_of_its_head(name: str) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    head = " ".join(line.removeprefix("# ") for line in file.read_text().splitlines()[:14])
    required, available = re.findall(r"([\d.]+) of ([\d.]+)\. The learner", head)[0]
    teacher = {"gb10": "32B", "h200": "8B"}[name]
    shapes = ("--shape-student", "4B", "--shape-teacher", teacher)
    call = ("plan", "-c", file, *shapes, "--device", name, "--device-memory-gib", available)
    result = call_cli(*call)
    assert result.code == 0, result.err
    assert re.findall(r"required\W+([\d.]+)", result.out) == [required]
    engines = re.findall(r"(teacher|student|learner|left free) ([\d.]+)[,;]", head)
    assert len(engines) == 4
    sums = re.findall(r"│ +│ +│ +([\d.]+) │", result.out)
    assert sums == [gib for _, gib in engines][:3]


def test_256_rollouts_do_not_fit_a_gb10_beside_the_32b_teacher() -> None:
    shapes = ("--shape-student", "4B", "--shape-teacher", "32B", "--device-memory-gib", "108")
    call = ("plan", "-c", ROOT / "configs/gb10.yaml", *shapes, "--device", "gb10")
    assert call_cli(*call, "generation.max_sequences=256").code == 2


# --- Time ---------------------------------------------------------------------------------------

SHAPES = ("--shape-student", "4B", "--shape-teacher", "8B", "--device-memory-gib", "140")


@pytest.fixture
def config(tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config on a machine without a GPU and without a calibration."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(device_rates, "detect_gpu", lambda: None)
    return write_config(tmp_path, tiny_models)


def test_command_predicts_times_with_their_bounds(config: Path) -> None:
    price = "cost.price_per_device_hour=3.5"
    result = call_cli("plan", "-c", config, *SHAPES, "--device", "h200", price)
    assert (result.code, result.err) == (0, "")
    for words in (
        *("sampling", "scoring", "training", "publishing", "host"),
        *("KV bandwidth", "compute", "new tokens/s", "the run: 1 steps in", "USD for 1 device"),
        *("assumed: prompts of 256 tokens, answers of 512", "H200 data sheet", "not counted:"),
    ):
        assert words in result.out, words


def test_lengths_are_options(config: Path) -> None:
    call = ("plan", "-c", config, *SHAPES, "--device", "h200")
    result = call_cli(*call, "--prompt-tokens", "77", "--response-tokens", "99", "--tail", "3")
    assert "prompts of 77 tokens, answers of 99 in the median, 3 times that" in result.out
    assert "money: give a price" in result.out
    for wrong in (("--response-tokens", "513"), ("--tail", "0.5"), ("--tail", "nan")):
        assert call_cli(*call, *wrong).code == 2, wrong


def test_unknown_device_is_refused_and_an_unknown_machine_is_a_note(config: Path) -> None:
    refused(
        *("plan", "-c", config, *SHAPES, "--device", "cray"),
        words=("--device cray", "h100-sxm", "calibrate"),
    )
    result = call_cli("plan", "-c", config, *SHAPES)
    assert result.code == 0
    assert "key-value cache" in result.out
    assert "Time of a step" not in result.out
    assert "no GPU here" in result.err
    assert "qwen3-distill calibrate" in result.err
    refused("plan", "-c", config, *SHAPES, "--suggest", words=("no GPU here", "calibrate"))


def test_calibration_of_this_cpu_is_used(config: Path, tmp_path: Path) -> None:
    result = call_cli("calibrate", "--device", "cpu", "--seconds", "0.1")
    assert (result.code, result.err) == (0, "")
    assert "a CPU" in result.out
    (file,) = (tmp_path / "cache/qwen3-distill/calibration").iterdir()
    assert str(file) in result.out
    planned = call_cli("plan", "-c", config, *SHAPES)
    assert planned.code == 0
    assert "measured by `qwen3-distill calibrate`" in planned.out
    file.write_text("{}")
    refused("plan", "-c", config, *SHAPES, words=(str(file), "schema", "calibrate"))


def test_calibration_as_json_is_only_that(config: Path) -> None:
    result = call_cli("calibrate", "--device", "cpu", "--seconds", "0.1", "--json")
    record = json.loads(result.out)
    assert record["kind"] == "cpu"
    assert record["fp8_tflops"] is None
    assert record["launch_us"] > 0


def test_interrupted_calibration_writes_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_module, "calibrate", interrupted)
    result = call_cli("calibrate", "--device", "cpu")
    assert (result.code, "nothing was written" in result.err) == (130, True)
    assert not (tmp_path / "cache").exists()


def test_suggestions_can_be_typed(config: Path) -> None:
    few = ("generation.max_sequences=32", "training.micro_batch_tokens=1024")
    call = ("plan", "-c", config, *SHAPES, "--device", "h200", *few)
    before = call_cli(*call, "--suggest")
    assert before.code == 0, before.err
    lines = before.out.splitlines()
    title = lines.index("The same optimization, other settings of speed and memory:")
    overrides = lines[title + 2].split()
    assert any(each.startswith("generation.max_sequences=") for each in overrides)
    after = call_cli(*call, *overrides)
    assert after.code == 0

    def rate(out: str) -> int:
        return int(re.search(r"([\d,]+) new tokens/s", out)[1].replace(",", ""))  # type: ignore[index]

    assert rate(after.out) > 1.2 * rate(before.out)
    assert "Another optimization" in before.out
    assert "    changes: " in before.out


def test_several_teachers_have_a_memory_plan_and_no_prediction(config: Path) -> None:
    values = yaml.safe_load(config.read_text())
    teacher = values["scoring"]
    tagged = {"kind": "several", "by": "task", "teachers": {"math": teacher, "code": teacher}}
    values |= {"scoring": tagged, "prompts": {"kind": "jsonl", "path": "rows.jsonl"}}
    config.write_text(yaml.safe_dump(values))
    result = call_cli("plan", "-c", config, *SHAPES, "--device", "h200")
    assert result.code == 0, result.err
    assert "scoring.teachers.math.memory_fraction=" in result.out
    assert "the time is predicted for one teacher only" in result.err
    assert "new tokens/s" not in result.out
    call = ("plan", "-c", config, *SHAPES, "--device", "h200", "--suggest")
    refused(*call, words=["one teacher only", "plan without --suggest"])


def test_suggestions_for_a_cluster_can_be_typed(config: Path) -> None:
    own = "{replicas: 1}"
    roles = f"cluster={{rollouts: {own}, teachers: {own}, learner: {{ranks: 2}}}}"
    call = ("plan", "-c", config, *SHAPES, "--device", "h200", roles)
    result = call_cli(*call, "--suggest")
    assert result.code == 0, result.err
    words = [shlex.split(line) for line in result.out.splitlines() if "cluster.rollouts=" in line]
    assert words
    assert call_cli(*call, *words[0]).code == 0


def test_config_that_does_not_fit_is_said_to_and_searched(config: Path) -> None:
    large = ("generation.max_sequences=1024", "training.micro_batch_tokens=20480")
    shapes = ("--shape-student", "4B", "--shape-teacher", "8B", "--device-memory-gib", "79")
    call = ("plan", "-c", config, *shapes, "--device", "h100", *large)
    result = call_cli(*call, "--suggest")
    assert result.code == 2
    assert "the config as it is does not fit: the engines need" in result.err
    assert "The config as it is, if it fitted:" in result.out
    lines = result.out.splitlines()
    title = lines.index("The same optimization, other settings of speed and memory:")
    overrides = lines[title + 2].split()
    assert overrides[0].startswith("generation.max_sequences="), lines[title:]
    assert call_cli(*call, *overrides).code == 0
    shapes = ("--shape-student", "4B", "--shape-teacher", "32B", "--device-memory-gib", "40")
    refused(
        *("plan", "-c", config, *shapes, "--device", "h100", "--suggest"),
        words=["the engines need", "--suggest found nothing that fits, either"],
    )
