"""A run that was killed, stopped or damaged ends with the same bits as an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    EmbeddedTraining,
    RunConfig,
    SequentialPipeline,
    SglangScoring,
    StreamingPipeline,
    UnslothTraining,
    VllmGeneration,
    VllmScoring,
)
from qwen3_distill.errors import CheckpointError, EngineStartError, RunFolderError
from qwen3_distill.pipeline.checkpoints import CheckpointStore
from qwen3_distill.pipeline.identity import RunIdentity
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.pipeline.run_folder import MAY_CHANGE
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.training.embedded.student import EmbeddedLearner
from qwen3_distill.types import Batch
from tests.pipeline.builders import (
    EVALUATION,
    LORA,
    call_cli,
    raise_warning,
    read_json,
    run_to_end,
    same_result,
    student_bytes,
    timeless,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import TinyModels, write_model

# --- Processes that are killed ------------------------------------------------------------------

NUM_STEPS = 40
LONG = {
    "steps": NUM_STEPS,
    "checkpoint.every_steps": 15,
    "evaluation": EVALUATION
    | {"every_steps": 15, "num_problems": 24, "sampling": {"max_new_tokens": 32}},
    "logging.tensorboard": True,
}
TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def uninterrupted(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a long undisturbed run."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_to_end(tiny_config(tiny_models, folder, LONG))
    return folder


class RunProcess:
    """The `run` command in its own process."""

    def __init__(self, models: TinyModels, directory: Path) -> None:
        self.folder = directory / "run"
        self.config = tiny_config(models, self.folder, LONG)
        file = write_config(directory / "run.yaml", tiny_values(models, self.folder, LONG))
        command = [sys.executable, "-m", "qwen3_distill.cli.main", "run", "--config", str(file)]
        self._stderr = directory / "stderr"
        with self._stderr.open("a") as stderr:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                # Sums may depend on the number of threads.
                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            )

    @property
    def num_steps(self) -> int:
        """Lines of the metrics so far."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def has_checkpoint(self, step: int) -> bool:
        return (self.folder / "checkpoints" / f"step-{step:06d}").exists()

    def signal_when(self, condition: Callable[["RunProcess"], bool], number: int) -> int:
        """Send a signal as soon as the condition holds; return the exit status."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition(self):
            assert self.process.poll() is None, f"ended early: {self._stderr.read_text()}"
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.001)
        self.process.send_signal(number)
        return self.process.wait(timeout=TIMEOUT_S)


@contextmanager
def started(models: TinyModels, directory: Path) -> Iterator[RunProcess]:
    running = RunProcess(models, directory)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(lambda run: run.num_steps >= 2, id="before-the-first-checkpoint"),
        pytest.param(lambda run: run.has_checkpoint(15), id="as-a-checkpoint-appears"),
        pytest.param(lambda run: run.num_steps >= 20, id="in-the-middle-of-later-steps"),
        pytest.param(lambda run: run.has_checkpoint(30), id="during-an-evaluation"),
    ],
)
def test_killed_run_ends_with_the_same_bits(
    moment: Callable[[RunProcess], bool],
    tiny_models: TinyModels,
    tmp_path: Path,
    uninterrupted: Path,
) -> None:
    with started(tiny_models, tmp_path) as killed:
        assert killed.signal_when(moment, signal.SIGKILL) == -signal.SIGKILL
        assert killed.num_steps < NUM_STEPS
    run_to_end(killed.config)
    assert same_result(killed.folder, uninterrupted)
    assert len(read_json(killed.folder / "manifest.json")["starts"]) == 2


def test_interrupted_run_saves_its_step_and_goes_on_when_started_again(
    tiny_models: TinyModels, tmp_path: Path, uninterrupted: Path
) -> None:
    with started(tiny_models, tmp_path) as stopped:
        assert stopped.signal_when(lambda run: run.num_steps >= 3, signal.SIGINT) == 130
        assert stopped.has_checkpoint(stopped.num_steps)
        assert 3 <= stopped.num_steps < NUM_STEPS
    with started(tiny_models, tmp_path) as resumed:
        assert resumed.process.wait(timeout=TIMEOUT_S) == 0
    assert same_result(resumed.folder, uninterrupted)


# --- Crashes and stops in this process ------------------------------------------------------------

SHORT = {"steps": 6, "checkpoint.every_steps": 2, "evaluation": EVALUATION}


class Crash(BaseException):
    """Ends a run like a kill: no handler catches it."""


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short undisturbed run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_to_end(tiny_config(tiny_models, folder, SHORT))
    return folder


@pytest.fixture
def short(tiny_models: TinyModels, run_dir: Path) -> RunConfig:
    return tiny_config(tiny_models, run_dir, SHORT)


@contextmanager
def before_step(step: int, action: Callable[[], None]) -> Iterator[None]:
    """Call a function at the beginning of a step's update."""
    update = EmbeddedLearner.update

    async def disturbed(self: EmbeddedLearner, batch: Batch) -> Any:
        if self.version.step == step:
            action()
        return await update(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddedLearner, "update", disturbed)
        yield


def raise_crash() -> None:
    raise Crash


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash_at(config: RunConfig, step: int, warn: Callable[[str], None] = raise_warning) -> Path:
    """Run until a crash in the given step; the folder with its checkpoints."""
    with before_step(step, raise_crash), pytest.raises(Crash):
        run_to_end(config, warn)
    return config.output_path / "checkpoints"


def interrupt_at(config: RunConfig, step: int) -> None:
    """Run until a Ctrl-C in the given step."""
    with before_step(step, interrupt):
        assert run(config, SilentReporter(), lambda message: None) is None


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_stop_in_any_step_saves_and_resumes(step: int, short: RunConfig, reference: Path) -> None:
    interrupt_at(short, step)
    assert (short.output_path / "checkpoints" / f"step-{step + 1:06d}").exists()
    assert len(timeless(short.output_path / "metrics.jsonl")) == step + 1
    assert not (short.output_path / "summary.json").exists()
    run_to_end(short)
    assert same_result(short.output_path, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_a_run_like_ctrl_c(number: int, short: RunConfig) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    try:
        with before_step(1, lambda: os.kill(os.getpid(), number)):
            assert run(short, SilentReporter(), lambda message: None) is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (short.output_path / "checkpoints" / "step-000002").exists()


def test_adapters_with_dropout_resume_bit_for_bit(tiny_models: TinyModels, tmp_path: Path) -> None:
    configs = [
        tiny_config(tiny_models, tmp_path / name, {"training.tuning": LORA}) for name in "ab"
    ]
    crash_at(configs[0], 3)
    for config in configs:
        run_to_end(config)
    assert same_result(tmp_path / "a", tmp_path / "b")


@contextmanager
def crash_in_sync(number: int, folder_name: str) -> Iterator[None]:
    """Crash instead of the ``number``-th fsync in or of a folder; a rename counts as one."""
    with pytest.MonkeyPatch.context() as patch:
        real_fsync, real_rename, seen = os.fsync, Path.rename, 0

        def count(path: str) -> None:
            nonlocal seen
            if folder_name in path:
                seen += 1
                if seen == number:
                    raise Crash

        def fsync(descriptor: int) -> None:
            count(os.readlink(f"/proc/self/fd/{descriptor}"))
            real_fsync(descriptor)

        def rename(self: Path, target: Path) -> Path:
            count(str(self))
            return real_rename(self, target)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(Path, "rename", rename)
        yield


# Four files, their folder, then the rename.
@pytest.mark.parametrize("number", range(1, 7))
def test_crash_while_saving_leaves_the_older_checkpoint(
    number: int, short: RunConfig, reference: Path
) -> None:
    with crash_in_sync(number, ".unfinished-000004"), pytest.raises(Crash):
        run_to_end(short)
    folder = short.output_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step-000002", ".unfinished-000004"}
    run_to_end(short)
    assert same_result(short.output_path, reference)
    assert {path.name for path in folder.iterdir()} == {"step-000004", "step-000006"}


def test_crash_between_files_leaves_the_older_checkpoint(
    short: RunConfig, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_save = torch.save

    def save(state: object, path: Path) -> None:
        if ".unfinished-000004" in str(path):
            raise Crash
        real_save(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Crash):
        run_to_end(short)
    monkeypatch.undo()
    run_to_end(short)
    assert same_result(short.output_path, reference)


def test_files_are_on_disk_before_the_rename_and_the_rename_before_old_ones_go(
    tiny_models: TinyModels, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_rename, real_rmtree = os.fsync, Path.rename, shutil.rmtree

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if "checkpoints" in path.parts:
            events.append(f"sync {path.name}")
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        if "checkpoints" in target.parts:
            events.append(f"rename to {target.name}")
        return real_rename(self, target)

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.exists() and "checkpoints" in path.parts:
            events.append(f"remove {path.name}")
        real_rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    changes = {"steps": 2, "checkpoint": {"every_steps": 1, "keep_last": 1}}
    run_to_end(tiny_config(tiny_models, run_dir, changes))
    second = events[events.index("sync checkpoints") + 1 :]
    names = ["cursor.json", "files.json", "optimizer.pt", "weights.safetensors"]
    assert sorted(second[:4]) == [f"sync {name}" for name in names]
    assert second[4:] == [
        "sync .unfinished-000002",
        "rename to step-000002",
        "sync checkpoints",
        "remove step-000001",
    ]


# --- Damaged checkpoints --------------------------------------------------------------------------


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "weights.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove_the_cursor(checkpoint: Path) -> None:
    (checkpoint / "cursor.json").unlink()


def garble_the_cursor(checkpoint: Path) -> None:
    (checkpoint / "cursor.json").write_text('{"step": 4}')


def remove_the_digests(checkpoint: Path) -> None:
    (checkpoint / "files.json").unlink()


def garble_the_digests(checkpoint: Path) -> None:
    (checkpoint / "files.json").write_text("[]")


def remove_the_weights(checkpoint: Path) -> None:
    (checkpoint / "weights.safetensors").unlink()


DAMAGES = [
    truncate,
    flip_a_byte,
    remove_the_cursor,
    garble_the_cursor,
    remove_the_digests,
    garble_the_digests,
    remove_the_weights,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_aloud(
    damage: Callable[[Path], None], short: RunConfig, reference: Path
) -> None:
    damage(crash_at(short, 5) / "step-000004")
    warnings: list[str] = []
    run_to_end(short, warnings.append)
    (warning,) = warnings
    assert "step 4" in warning
    assert "corrupt" in warning
    assert read_json(short.output_path / "manifest.json")["starts"][-1]["step"] == 2
    assert same_result(short.output_path, reference)


def test_run_without_a_readable_checkpoint_is_refused(short: RunConfig) -> None:
    folder = crash_at(short, 5)
    truncate(folder / "step-000002")
    remove_the_cursor(folder / "step-000004")
    result = call_cli("run", "--config", short.output_path / "config.json")
    assert result.code == CheckpointError.exit_code == 2
    assert "step 4 is corrupt" in result.err
    assert "step 2 is corrupt" in result.err
    assert "error: none of the checkpoints" in result.err
    assert len(timeless(short.output_path / "metrics.jsonl")) == 5


def test_leftover_of_a_crash_is_no_checkpoint_and_goes(short: RunConfig, reference: Path) -> None:
    folder = crash_at(short, 3)
    leftover = folder / ".unfinished-000003"
    shutil.copytree(folder / "step-000002", leftover)
    store = CheckpointStore(folder, keep_last=2, identity=RunIdentity.new("0"))
    assert store.steps() == [2]
    run_to_end(short)
    assert not leftover.exists()
    assert same_result(short.output_path, reference)


def test_damaged_checkpoint_does_not_push_out_newer_whole_ones(
    tiny_models: TinyModels, run_dir: Path, reference: Path
) -> None:
    config = tiny_config(tiny_models, run_dir, SHORT | {"checkpoint.keep_last": 1})
    folder = crash_at(config, 3)
    shutil.copytree(folder / "step-000002", folder / "step-000004")
    truncate(folder / "step-000004")
    interrupt_at(config, 2)  # falls back to step 2, then saves step 3
    assert (folder / "step-000003").exists()
    run_to_end(config, lambda message: None)
    assert same_result(run_dir, reference)


def test_records_of_lost_steps_are_taken_back(short: RunConfig) -> None:
    logs = [short.output_path / name for name in ("metrics.jsonl", "evaluations.jsonl")]
    truncate(crash_at(short, 5) / "step-000004")
    assert [timeless(log)[-1]["step"] for log in logs] == [5, 4]
    with before_step(2, raise_crash), pytest.raises(Crash):
        run_to_end(short, lambda message: None)
    assert [timeless(log)[-1]["step"] for log in logs] == [2, 2]


# --- Changed settings -----------------------------------------------------------------------------

OPERATION = {
    "logging.trace": False,
    "logging.rollouts_every_steps": 3,
    "checkpoint": {"every_steps": 3, "keep_last": 1},
    "planning": {"reserve_gib": 1.0},
    "generation": {"kind": "embedded", "device": "cpu", "hang_timeout_s": 60.0},
    "scoring.start_timeout_s": 60.0,
    "scoring.batch_tokens": 64,
    "training.max_restarts": 1,
    "training.micro_batch_tokens": 64,
}
FIXED = {
    "seed": 1,
    "steps": 5,
    "prompts_per_step": 3,
    "samples_per_prompt": 3,
    "prompts": {"kind": "task", "limit": 6},
    "sampling.max_new_tokens": 9,
    "generation.dtype": "bfloat16",
    "generation.max_sequences": 2,
    "scoring.dtype": "bfloat16",
    "scoring.own_process": True,
    "training.optimizer": {"learning_rate": 2e-3},
    "training.tuning": LORA,
    "objective.ratio_cap": 3.0,
    "replay": {"capacity_tokens": 100_000},
    "evaluation": EVALUATION | {"num_problems": 2},
    "pipeline": {"kind": "streaming"},
}
SECTIONS = {
    "pipeline": (SequentialPipeline, StreamingPipeline),
    "generation": (EmbeddedGeneration, VllmGeneration),
    "scoring": (EmbeddedScoring, SglangScoring, VllmScoring),
    "training": (EmbeddedTraining, UnslothTraining),
}


def test_operation_may_change_on_the_way_and_is_put_on_record(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    first = tiny_config(tiny_models, run_dir, SHORT)
    crash_at(first, 3)
    changed = tiny_config(tiny_models, run_dir, SHORT | OPERATION)
    warnings: list[str] = []
    run_to_end(changed, warnings.append)
    (warning,) = warnings
    assert "logging.trace: True -> False" in warning
    saved = read_json(run_dir / "config.json")
    assert saved["logging"]["trace"] is False
    assert saved["training"]["micro_batch_tokens"] == 64
    starts = read_json(run_dir / "manifest.json")["starts"]
    assert [len(start["changed"]) for start in starts] == [0, 10]
    assert "checkpoint.every_steps: 2 -> 3" in starts[1]["changed"]


def test_change_of_what_is_only_recorded_leaves_every_bit(
    tiny_models: TinyModels, run_dir: Path, reference: Path
) -> None:
    crash_at(tiny_config(tiny_models, run_dir, SHORT), 3)
    quiet = {"logging.trace": False, "logging.tensorboard": True, "checkpoint.every_steps": 4}
    run_to_end(tiny_config(tiny_models, run_dir, SHORT | quiet), lambda message: None)
    assert same_result(run_dir, reference)


@pytest.mark.parametrize("key", FIXED)
def test_what_the_student_learns_from_may_not_change(
    key: str, tiny_models: TinyModels, run_dir: Path
) -> None:
    crash_at(tiny_config(tiny_models, run_dir, SHORT), 3)
    before = (run_dir / "config.json").read_bytes()
    changed = tiny_config(tiny_models, run_dir, SHORT | {key: FIXED[key], "logging.trace": False})
    with pytest.raises(RunFolderError, match="made by another config") as refusal:
        run_to_end(changed)
    assert f"\n  {key}" in str(refusal.value)
    assert "logging" not in str(refusal.value)
    assert (run_dir / "config.json").read_bytes() == before


def test_start_that_fails_does_not_count_as_the_one_before(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    crash_at(tiny_config(tiny_models, run_dir, SHORT), 3)
    changed = tiny_config(tiny_models, run_dir, SHORT | {"logging.trace": False})

    def fail(parts: Parts) -> Parts:
        raise EngineStartError("no engine")

    with pytest.raises(EngineStartError):
        run(changed, SilentReporter(), lambda message: None, fail)
    assert read_json(run_dir / "config.json")["logging"]["trace"] is True
    run_to_end(changed, lambda message: None)
    starts = read_json(run_dir / "manifest.json")["starts"]
    assert starts[-1]["changed"] == ["logging.trace: True -> False"]


def test_settings_that_may_change_are_settings() -> None:
    for place in MAY_CHANGE:
        section, _, key = place.partition(".")
        models = SECTIONS[section] if key else (RunConfig,)
        assert any((key or section) in model.model_fields for model in models), place


# --- Changed models -------------------------------------------------------------------------------


def other_weights(model: Path) -> None:
    write_model(model, seed=99)


def other_limits(model: Path) -> None:
    values = read_json(model / "config.json")
    values["max_position_embeddings"] -= 1
    (model / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("role", "change", "words"),
    [
        ("student", other_weights, ["student.weights_digest: "]),
        ("student", other_limits, ["student.weights_digest: ", "student.context_length: "]),
        ("teacher", other_weights, ["teacher.id: teacher#"]),
    ],
)
def test_model_that_was_replaced_under_a_run_is_refused(
    role: str,
    change: Callable[[Path], None],
    words: list[str],
    tiny_models: TinyModels,
    run_dir: Path,
    tmp_path: Path,
) -> None:
    models = TinyModels(tmp_path / "m" / "student", tmp_path / "m" / "teacher")
    shutil.copytree(tiny_models.student, models.student)
    shutil.copytree(tiny_models.teacher, models.teacher)
    config = tiny_config(models, run_dir, SHORT)
    crash_at(config, 3)
    kept = shutil.copytree(getattr(models, role), tmp_path / "kept")
    change(getattr(models, role))
    before = timeless(run_dir / "metrics.jsonl")
    with pytest.raises(RunFolderError, match="begun with other files") as refusal:
        run_to_end(config, lambda message: None)
    assert [word for word in words if word not in str(refusal.value)] == []
    assert timeless(run_dir / "metrics.jsonl") == before
    shutil.rmtree(getattr(models, role))
    kept.rename(getattr(models, role))
    run_to_end(config, lambda message: None)


@pytest.mark.parametrize("which", ["prompts.path", "evaluation.prompts.path"])
def test_prompt_file_that_was_replaced_under_a_run_is_refused(
    which: str, tiny_models: TinyModels, run_dir: Path, tmp_path: Path
) -> None:
    files = {"prompts.path": tmp_path / "a.jsonl", "evaluation.prompts.path": tmp_path / "b.jsonl"}
    for first, file in zip((10, 20), files.values(), strict=True):  # the two share no problem
        numbers = range(first, first + 5)
        file.write_text("".join(f'{{"prompt": "{n}?", "answer": "{n}"}}\n' for n in numbers))
    prompts = [
        {"kind": "jsonl", "path": str(file), "answer_field": "answer"} for file in files.values()
    ]
    evaluation = EVALUATION | {"prompts": prompts[1], "verifier": {"kind": "math"}}
    config = tiny_config(
        tiny_models, run_dir, SHORT | {"prompts": prompts[0], "evaluation": evaluation}
    )
    crash_at(config, 3)
    kept = files[which].read_text()
    files[which].write_text(kept + '{"prompt": "5?", "answer": "5"}\n')
    with pytest.raises(RunFolderError, match=rf"other files.*\n  data\.{which}: \w+ -> \w+"):
        run_to_end(config)
    files[which].write_text(kept)
    run_to_end(config)


def test_dataset_directory_that_was_changed_under_a_run_is_refused(
    tiny_models: TinyModels, run_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"prompt": f"what is {number}?"} for number in range(6)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        tiny_models, run_dir, SHORT | {"prompts": {"kind": "hf", "path": str(folder)}}
    )
    crash_at(config, 3)
    kept = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(kept.replace("what", "When"))
    with pytest.raises(RunFolderError, match=r"other files.*\n  data\.prompts\.path: \w+"):
        run_to_end(config)
    (folder / "train.jsonl").write_text(kept)
    (folder / ".cache").write_text("hidden files are no content")
    run_to_end(config)


@pytest.mark.parametrize("which", ["verifier", "evaluation.verifier"])
def test_verifier_file_that_was_changed_under_a_run_is_refused(
    which: str, tiny_models: TinyModels, run_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def judge(row, response):\n    return 1.0\n")
    verifier = {"kind": "python", "function": f"{file}:judge"}
    changes = SHORT | {"evaluation": dict(EVALUATION), which: verifier}
    config = tiny_config(tiny_models, run_dir, changes)
    crash_at(config, 3)
    kept = file.read_text()
    file.write_text(kept.replace("1.0", "0.5"))
    with pytest.raises(RunFolderError, match=rf"other files.*\n  data\.{which}\.function: \w+"):
        run_to_end(config)
    file.write_text(kept)
    run_to_end(config)


def test_manifest_of_an_older_version_is_no_hindrance(short: RunConfig, reference: Path) -> None:
    crash_at(short, 3)
    manifest = short.output_path / "manifest.json"
    content = read_json(manifest)
    del content["student"]["weights_digest"], content["data"]
    manifest.write_text(json.dumps(content))
    run_to_end(short)
    assert same_result(short.output_path, reference)


# --- More steps -----------------------------------------------------------------------------------


def test_a_finished_run_goes_on_when_steps_are_raised(
    tiny_models: TinyModels, run_dir: Path, reference: Path
) -> None:
    """With a constant learning rate: to the bits of a run that was that long from the start."""
    run_to_end(tiny_config(tiny_models, run_dir, SHORT | {"steps": 3}))
    assert read_json(run_dir / "summary.json")["steps"] == 3
    warnings: list[str] = []
    reporter = run_to_end(tiny_config(tiny_models, run_dir, SHORT), warnings.append)
    assert f"steps: 3 -> {SHORT['steps']}" in warnings[0]
    assert "from step 3 on; the learning rate stays constant" in warnings[1]
    assert reporter.steps[0] == 4
    assert student_bytes(run_dir) == student_bytes(reference)
    assert timeless(run_dir / "ledger.jsonl") == timeless(reference / "ledger.jsonl")
    assert read_json(run_dir / "summary.json")["steps"] == SHORT["steps"]
    assert read_json(run_dir / "config.json")["steps"] == SHORT["steps"]
    again = run_to_end(tiny_config(tiny_models, run_dir, SHORT))
    assert again.steps == []


def test_the_meaning_of_a_cosine_is_said_when_steps_are_raised(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    schedule = {"kind": "warmup_cosine", "final_fraction": 0.0}
    cosine = {"training.optimizer": {"learning_rate": 1e-3, "schedule": schedule}, "steps": 3}
    run_to_end(tiny_config(tiny_models, run_dir, cosine))
    warnings: list[str] = []
    run_to_end(tiny_config(tiny_models, run_dir, cosine | {"steps": 7}), warnings.append)
    assert "warm-up and cosine of 7 steps: 0.0005 at the next step" in warnings[1]
    assert "not that of a run of 7 steps from the start" in warnings[1]
    rates = [record["optim/learning_rate"] for record in timeless(run_dir / "metrics.jsonl")]
    assert rates[2:4] == pytest.approx([0.0, 0.0005])


def test_a_killed_extension_goes_on(
    tiny_models: TinyModels, run_dir: Path, reference: Path
) -> None:
    run_to_end(tiny_config(tiny_models, run_dir, SHORT | {"steps": 3}))
    longer = tiny_config(tiny_models, run_dir, SHORT)
    crash_at(longer, 5, lambda message: None)
    assert not (run_dir / "summary.json").exists()
    run_to_end(longer)
    assert student_bytes(run_dir) == student_bytes(reference)


@pytest.mark.parametrize("finished", [True, False])
def test_steps_may_not_be_lowered(finished: bool, tiny_models: TinyModels, run_dir: Path) -> None:
    config = tiny_config(tiny_models, run_dir, SHORT)
    if finished:
        run_to_end(config)
    else:
        crash_at(config, 3)
    with pytest.raises(RunFolderError, match="steps may be raised, not lowered"):
        run_to_end(tiny_config(tiny_models, run_dir, SHORT | {"steps": 2}))
    assert read_json(run_dir / "config.json")["steps"] == SHORT["steps"]


def test_a_finished_run_without_checkpoints_is_not_begun_anew(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    run_to_end(tiny_config(tiny_models, run_dir, SHORT | {"steps": 2}))
    before = (run_dir / "metrics.jsonl").read_bytes()
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(RunFolderError, match="no checkpoint to go on from"):
        run_to_end(tiny_config(tiny_models, run_dir, SHORT))
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert (run_dir / "summary.json").exists()
