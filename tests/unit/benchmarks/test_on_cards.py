"""The parts of benchmarks/on_cards.sh name benchmarks, options and settings that exist."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_distill.config.load import load_config
from qwen3_distill.data.template_arguments import check_template_arguments
from scripts.make_shape_model import CHAT_TEMPLATE

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "benchmarks" / "on_cards.sh"
PARTS = re.findall(r"^  ([a-z_]+)\)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
NO_BENCHMARK = ("memory", "contract", "together", "queue")
RECORDER = """#!{python}
import json, sys, time
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "--sleeps" in sys.argv:
    time.sleep(60)
sys.exit("--fails" in sys.argv)
"""


def run_part(part: str, folder: Path, *more: str) -> tuple[int, list[list[str]]]:
    """Run a part with an interpreter that only notes what it is asked for."""
    log, recorder = folder / "log", folder / "python"
    recorder.write_text(RECORDER.format(python=sys.executable, log=str(log)), encoding="utf-8")
    recorder.chmod(0o755)
    engines = {"VLLM_PYTHONPATH": "site/vllm", "SGLANG_PYTHON": "/sglang/python"}
    if part in ("profile", "decode"):  # they run where the engine is
        engines["UNSLOTH_PYTHON" if part == "profile" else "VLLM_PYTHON"] = str(recorder)
    environment = os.environ | engines | {"GPU_PYTHON": str(recorder), "OUT": str(folder / "out")}
    ended = subprocess.run(["bash", str(SCRIPT), part, *more], env=environment, check=False)
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return ended.returncode, [json.loads(line) for line in lines]


def test_the_heading_names_every_part_and_no_other() -> None:
    heading = SCRIPT.read_text(encoding="utf-8").partition("set -euo")[0]
    lines = re.findall(r"^#   (?:one card|two cards|either) +(.*)$", heading, re.MULTILINE)
    named = re.sub(r"\(.*?\)", "", ", ".join(lines)).split(",")
    assert sorted(name.split()[0] for name in named) == sorted(PARTS)


@pytest.mark.parametrize("part", [part for part in PARTS if part not in NO_BENCHMARK])
def test_a_part_asks_for_what_there_is(part: str, tmp_path: Path) -> None:
    status, commands = run_part(part, tmp_path)
    assert (status, bool(commands)) == (0, True)
    for command in commands:
        names = command[1].split(".") if command[0] == "-m" else [command[0]]
        file = ROOT.joinpath(*names).with_suffix(".py")
        source = file.read_text(encoding="utf-8")
        for option in (word.partition("=")[0] for word in command if word.startswith("--")):
            assert f'"{option}"' in source, f"{file.name} has no {option}"
        if "--config" in command:
            own = [word for word in command if re.match(r"[a-z_.]+=", word)]
            config = load_config(ROOT / command[command.index("--config") + 1], own)
            assert config.student.model == "models/random-4B"
            check_template_arguments(CHAT_TEMPLATE, config.student.template_arguments)
            generation, teacher = config.generation.model_dump(), config.teacher.model_dump()
            assert generation["environment"]["PYTHONPATH"] == "site/vllm"
            assert teacher["python"] == "/sglang/python"


def test_steps_have_a_folder_of_their_own_or_the_one_that_is_named(tmp_path: Path) -> None:
    for more, expected in (
        ([], r"runs/steps-\d{8}T\d{6}$"),
        (["output_dir=runs/mine"], "runs/mine$"),
    ):
        folder = tmp_path / str(len(more))
        folder.mkdir()
        _, [command] = run_part("steps", folder, *more)
        folders = [word for word in command if word.startswith("output_dir=")]
        assert re.match(f"output_dir={expected}", folders[-1])


def test_models_of_other_shapes_are_made(tmp_path: Path) -> None:
    status, commands = run_part("models", tmp_path, "0.6B", "32B-FP8")
    assert status == 0
    (plain, fp8) = (command[command.index("--shape") + 1 :] for command in commands)
    assert plain == ["0.6B", "models/random-0.6B", "--device", "cuda"]
    assert fp8 == ["32B", "models/random-32B-FP8", "--device", "cuda", "--fp8"]


def test_a_contract_suite_gets_its_engine(tmp_path: Path) -> None:
    status, commands = run_part("contract", tmp_path, "sglang")
    assert status == 0
    assert "sglang=/sglang/python" in commands[-1]
    _, commands = run_part("contract", tmp_path, "vllm")
    assert "vllm:PYTHONPATH=site/vllm" in commands[-1]


def test_a_queue_goes_on_after_a_part_that_fails_or_takes_too_long(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = ["60:topk --fails", "4:topk --sleeps", "60:cold --k 2"]
    status, commands = run_part("queue", tmp_path, *parts)
    assert status == 1
    assert [command[1] for command in commands] == ["benchmarks.speed.topk_profile"] * 2 + [
        "benchmarks.speed.start"
    ] * 2
    assert commands[-1][-4:-2] == ["--k", "2"]
    assert (
        "not done: topk --fails (status 1)\nerror: not done: topk --sleeps (status 124)"
        in capfd.readouterr().err
    )
    assert run_part("queue", tmp_path, "60:topk")[0] == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_queue_and_its_part(sent: signal.Signals, tmp_path: Path) -> None:
    log, recorder = tmp_path / "log", tmp_path / "python"
    recorder.write_text(RECORDER.format(python=sys.executable, log=str(log)), encoding="utf-8")
    recorder.chmod(0o755)
    environment = os.environ | {"GPU_PYTHON": str(recorder), "OUT": str(tmp_path / "out")}
    # No shell can trap what it was told to ignore, as it may be where tests run in the background.
    command = ["env", "--default-signal=INT", "bash", str(SCRIPT), "queue"]
    command += ["60:topk --sleeps", "60:topk"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as queue:
        try:
            while not log.exists() or not log.read_text(encoding="utf-8"):
                assert queue.poll() is None
                time.sleep(0.05)
            queue.send_signal(sent)
            _, said = queue.communicate(timeout=30)
        finally:
            queue.kill()
    assert queue.returncode == 130
    assert "KeyboardInterrupt" in said
    assert len(log.read_text(encoding="utf-8").splitlines()) == 1


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    assert run_part("nope", tmp_path) == (2, [])
