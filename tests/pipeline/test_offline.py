"""The offline stages, through files, equal one pipeline step bit for bit."""

import asyncio
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import dump_config
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.data.rollout_files import (
    read_rollouts,
    read_scored,
    write_rollouts,
    write_scored,
)
from qwen3_distill.doctor import precision
from qwen3_distill.errors import EngineError, NonFiniteError, RunFolderError
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.pipeline import offline as module
from qwen3_distill.pipeline import step as pipeline_step
from qwen3_distill.training.embedded.student import EmbeddedLearner
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.types import Rollout
from tests.pipeline.builders import (
    FULL,
    SAMPLED,
    TASK_REWARD,
    TOP_K,
    call_cli,
    refused,
    run_to_end,
    student_bytes,
    tiny_config,
    write_config,
)
from tests.tiny_models import TinyModels, write_model

EVALUATION = (
    "evaluation={prompts: {kind: task, split: eval}, verifier: {kind: task}, num_problems: 2}"
)


class Offline:
    """The three commands over one config, with their files in one folder."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config_file = write_config(folder / "config.yaml", dump_config(config))
        self.rollouts = folder / "rollouts.parquet"
        self.scored = folder / "scored.parquet"
        self.student = folder / "student"

    def generate(self, *options: str) -> None:
        command = ("generate", "--config", self.config_file, "--out", self.rollouts, *options)
        assert call_cli(*command).code == 0

    def score(self) -> None:
        files = ("--rollouts", self.rollouts, "--out", self.scored)
        assert call_cli("score", "--config", self.config_file, *files).code == 0

    def train(self) -> str:
        result = call_cli(*self.train_command)
        assert result.code == 0
        return result.out

    @property
    def train_command(self) -> tuple[str | Path, ...]:
        files = ("--scored", self.scored, "--out", self.student)
        return ("train", "--config", self.config_file, *files)

    @property
    def trained(self) -> bytes:
        return (self.student / "model.safetensors").read_bytes()


def offline(models: TinyModels, folder: Path, changes: dict[str, Any] | None = None) -> Offline:
    config = tiny_config(models, folder / "run", {"steps": 1, **(changes or {})})
    return Offline(config, folder)


def verdict(task: ChainTask, problem: object, response_text: str) -> bool:
    return len(response_text) % 2 == 0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"objective": SAMPLED}, id="sampled"),
        pytest.param({"objective": TOP_K}, id="top_k"),
        pytest.param({"objective": FULL}, id="full"),
        pytest.param(TASK_REWARD, id="task-reward"),
    ],
)
def test_generate_score_train_equal_one_pipeline_step(
    changes: dict[str, Any],
    tiny_models: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ChainTask, "check", verdict)
    changes = {"steps": 1, "logging.rollouts_per_save": 99, **changes}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    run_to_end(config)
    stages = Offline(config, tmp_path / "offline")
    stages.generate()
    stages.score()
    stages.train()
    online = read_scored(tmp_path / "run" / "rollouts" / "step-000000.parquet")
    assert [answer(item.rollout) for _, item in read_scored(stages.scored)] == [
        answer(item.rollout) for _, item in online
    ]
    assert stages.trained == student_bytes(tmp_path / "run")


def answer(rollout: Rollout) -> tuple[str, list[int], list[float]]:
    return (
        rollout.rollout_id,
        rollout.response_ids.tolist(),
        rollout.behavior_logprobs.tolist(),
    )


def test_two_steps_take_two_prompts_each_and_two_updates(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    stages = offline(tiny_models, tmp_path, {"steps": 2})
    stages.generate("--step", "1", "--num-steps", "2")
    rows = read_rollouts(stages.rollouts)
    assert [step for step, _ in rows] == [1] * 4 + [2] * 4
    # The student of the directory samples them all: offline, nothing was trained in between.
    assert {span.version.step for _, rollout in rows for span in rollout.versions} == {0}
    prompts = [rollout.prompt.prompt_id for _, rollout in rows]
    assert len(set(prompts[:4])) == len(set(prompts[4:])) == 2
    stages.score()
    assert "student after 2 steps" in stages.train()
    assert stages.trained != (tiny_models.student / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def ready(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Offline:
    """Rollouts and their scores."""
    stages = offline(tiny_models, tmp_path_factory.mktemp("ready"))
    stages.generate()
    stages.score()
    return stages


def test_scores_of_another_teacher_are_refused(ready: Offline, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other-teacher", seed=7)
    words = ["was scored by teacher#", "the config's teacher is other-teacher#"]
    refused(*ready.train_command, f"scoring.model={other}", words=words)
    assert not ready.student.exists()


def test_rollouts_of_other_weights_are_refused_unless_asked_for(
    ready: Offline, tiny_models: TinyModels, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other-student", seed=7)
    config = (f"student.model={other}",)
    ((_, item), *_) = read_scored(ready.scored)
    digest = item.rollout.versions[0].version.digest
    words = ["4 of 4 rollouts", "other weights", digest, str(other), "--off-policy"]
    message = refused(*ready.train_command, *config, words=words)
    assert "the student has" in message
    no_ratio = "objective={kind: sampled_reverse_kl, ratio_cap: null}"
    message = refused(*ready.train_command, *config, no_ratio, words=["other weights", digest])
    assert "--off-policy" not in message
    refused(*ready.train_command, "--off-policy", no_ratio, words=["--off-policy", "ratio_cap"])
    assert not ready.student.exists()
    out = ("--out", tmp_path / "student")
    command = ("train", "--config", ready.config_file, "--scored", ready.scored, *out)
    assert call_cli(*command, *config, "--off-policy").code == 0


@pytest.mark.parametrize(
    "change", ["training.dtype=bfloat16", "training.tuning={kind: lora, rank: 2, alpha: 4.0}"]
)
def test_the_same_student_trained_in_another_way_is_accepted(
    change: str, ready: Offline, tmp_path: Path
) -> None:
    command = ("train", "--config", ready.config_file, "--scored", ready.scored)
    assert call_cli(*command, "--out", tmp_path / "out", change).code == 0


def test_rollouts_of_a_runs_later_steps_are_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", {"steps": 3})
    run_to_end(config)
    stages = Offline(config, tmp_path / "offline")
    rollouts = tmp_path / "run" / "rollouts"
    command = ("train", "--config", stages.config_file, "--out", stages.student, "--scored")
    refused(*command, rollouts / "step-000002.parquet", words=["other weights", "3 of 3"])
    assert call_cli(*command, rollouts / "step-000000.parquet").code == 0


def test_scores_without_what_the_objective_needs_are_refused(ready: Offline) -> None:
    refused(*ready.train_command, "objective={kind: top_k, k: 4}", words=["top"])
    assert not ready.student.exists()


def test_directory_with_something_in_it_is_refused(ready: Offline, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("work")
    command = ("train", "--config", ready.config_file, "--scored", ready.scored)
    refused(*command, "--out", tmp_path, words=[str(tmp_path), "not empty"])
    refused(*command, "--out", tmp_path / "precious", words=["precious", "is a file"])
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("stage", ["generate", "score", "train", "eval", "audit-teacher"])
def test_what_could_not_be_written_is_refused_before_the_work(
    ready: Offline, tmp_path: Path, stage: str
) -> None:
    (tmp_path / "file").write_text("work")
    inputs = {
        "score": ("--rollouts", ready.rollouts),
        "train": ("--scored", ready.scored),
        "eval": (EVALUATION,),
        "audit-teacher": ("--rollouts", ready.rollouts, "--num", "2"),
    }
    command = (stage, "--config", ready.config_file, *inputs.get(stage, ()), "--out")
    result = call_cli(*command, tmp_path / "file" / "out")
    assert result.code == 2
    assert re.search(r"file/out\S* could not be written", result.err)
    assert not result.out
    assert call_cli(*command, tmp_path / "new" / "out.parquet").code == 0
    assert (tmp_path / "new" / "out.parquet").exists()


def test_empty_files_are_refused(ready: Offline, tmp_path: Path) -> None:
    empty, out = tmp_path / "empty.parquet", tmp_path / "out"
    write_rollouts(empty, [], str)
    score = ("score", "--config", ready.config_file, "--rollouts", empty, "--out", out)
    refused(*score, words=[str(empty), "no rollouts"])
    train = ("train", "--config", ready.config_file, "--scored", empty, "--out", out)
    refused(*train, words=[str(empty), "scored rollouts"])
    assert not out.exists()


def test_missing_file_is_refused(ready: Offline, tmp_path: Path) -> None:
    command = ("score", "--config", ready.config_file, f"output_dir={tmp_path / 'run'}")
    refused(*command, "--rollouts", tmp_path / "no.parquet", words=["no.parquet", "not exist"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_finished_steps_of_a_stage_that_is_broken_off_are_kept(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    files = offline(tiny_models, tmp_path)
    files.generate("--num-steps", "3")
    files.score()
    whole = {"generate": files.rollouts, "score": files.scored}[stage]
    expected = {"generate": read_rollouts, "score": read_scored}[stage](whole)
    whole.unlink()
    real, calls = getattr(pipeline_step, stage), 0

    async def breaks_in_the_third(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise EngineError("broken off by hand")
        return await real(*arguments, **settings)

    monkeypatch.setattr(pipeline_step, stage, breaks_in_the_third)
    options = ("--num-steps", "3") if stage == "generate" else ("--rollouts", files.rollouts)
    command = (stage, "--config", files.config_file, "--out", whole, *options)
    result = call_cli(*command)
    assert result.code == 3
    part = whole.with_name(f"{whole.stem}-partial.parquet")
    assert f"8 rollouts of finished steps are in {part}" in " ".join(result.out.split())
    assert not whole.exists()
    kept = {"generate": read_rollouts, "score": read_scored}[stage](part)
    assert [step for step, _ in kept] == [step for step, _ in expected][:8]


# --- Signals, and what is kept -------------------------------------------------------------------

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def signals_heard() -> Iterator[None]:
    """Also by tests under nohup, which ignores SIGHUP, and in the background of a script, where a
    shell ignores Ctrl-C."""
    heard = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def disturb(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, action: Callable[[], None]
) -> None:
    """Call a function at the beginning of a coroutine's n-th call."""
    real, calls = getattr(owner, name), 0

    async def disturbed(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return await real(*arguments, **settings)

    monkeypatch.setattr(owner, name, disturbed)


@pytest.fixture(scope="module")
def three_steps(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Offline:
    """Rollouts of three steps and their scores; the student after two of them."""
    files = offline(tiny_models, tmp_path_factory.mktemp("three"), {"steps": 3})
    files.generate("--num-steps", "3")
    files.score()
    two = files.scored.with_name("two.parquet")
    write_scored(two, read_scored(files.scored)[:8], str)
    command = ("train", "--config", files.config_file, "--scored", two, "--out", files.student)
    assert call_cli(*command).code == 0
    return files


def train_into(out: Path, files: Offline, *overrides: str) -> Any:
    scored = ("--scored", files.scored, "--out", out)
    return call_cli("train", "--config", files.config_file, *scored, *overrides)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", STOPS)
def test_train_that_is_stopped_finishes_its_step_and_keeps_the_student(
    number: int, three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("student-partial", "student-partial-2"):
        with monkeypatch.context() as patch:
            disturb(patch, EmbeddedLearner, "update", 2, lambda: send(number))
            result = train_into(tmp_path / "student", three_steps)
        assert result.code == 130, result
        assert "stopping after this step" in result.out
        assert f"student after 2 finished steps is in {tmp_path / name}" in result.out
        assert weights(tmp_path / name) == three_steps.trained
    assert not (tmp_path / "student").exists()
    assert train_into(tmp_path / "student", three_steps).code == 0


def test_learner_in_its_own_process_is_stopped_the_same_way(
    three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, HostedLearner, "update", 2, lambda: send(signal.SIGINT))
    result = train_into(tmp_path / "student", three_steps, "training.own_process=true")
    assert result.code == 130, result
    assert "student after 2 finished steps" in result.out
    assert (tmp_path / "student-partial" / "model.safetensors").exists()


def test_train_that_is_stopped_in_its_last_step_is_complete(
    three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, EmbeddedLearner, "update", 3, lambda: send(signal.SIGINT))
    assert train_into(tmp_path / "student", three_steps).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_second_signal_stops_train_at_once(
    three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, EmbeddedLearner, "update", 2, lambda: send(signal.SIGINT, signal.SIGTERM))
    assert train_into(tmp_path / "student", three_steps).code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [2, 3])
def test_failing_step_of_train_leaves_the_student_of_those_before(
    failing: int, three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise NonFiniteError("by hand")

    disturb(monkeypatch, EmbeddedLearner, "update", failing, fail)
    result = train_into(tmp_path / "student", three_steps)
    assert (result.code, result.err) == (3, "error: by hand\n")
    assert f"student after {failing - 1} finished steps" in result.out
    kept = weights(tmp_path / "student-partial")
    assert (kept == three_steps.trained) == (failing == 3)


def stage_of(stage: str, files: Offline, out: Path) -> tuple[str | Path, ...]:
    inputs = {"generate": ("--num-steps", "3"), "score": ("--rollouts", files.rollouts)}[stage]
    return (stage, "--config", files.config_file, "--out", out, *inputs)


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("stage", ["generate", "score"])
def test_signal_leaves_the_finished_steps_of_a_stage(
    stage: str, number: int, three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"generate": "write_rollouts", "score": "write_scored"}[stage]
    real = getattr(module, name)

    def write(*arguments: Any) -> None:
        send(*STOPS)  # has no effect any more
        real(*arguments)

    monkeypatch.setattr(module, name, write)
    disturb(monkeypatch, pipeline_step, stage, 3, lambda: send(number))
    result = call_cli(*stage_of(stage, three_steps, tmp_path / "out.parquet"))
    assert result.code == 130, result
    assert [path.name for path in tmp_path.iterdir()] == ["out-partial.parquet"]
    assert len(read_rollouts(tmp_path / "out-partial.parquet")) == 8


def test_signal_while_the_whole_file_is_written_does_not_lose_it(
    three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> None:
        send(*STOPS)
        write_rollouts(*arguments)

    monkeypatch.setattr(module, "write_rollouts", write)
    assert call_cli(*stage_of("generate", three_steps, tmp_path / "out.parquet")).code == 0
    assert len(read_rollouts(tmp_path / "out.parquet")) == 12


def test_closed_terminal_means_nothing_under_nohup(
    three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    disturb(monkeypatch, pipeline_step, "generate", 2, lambda: send(signal.SIGHUP))
    assert call_cli(*stage_of("generate", three_steps, tmp_path / "out.parquet")).code == 0
    disturb(monkeypatch, EmbeddedLearner, "update", 2, lambda: send(signal.SIGHUP))
    assert train_into(tmp_path / "student", three_steps).code == 0


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("stage", ["eval", "audit-teacher"])
def test_signal_closes_the_engine(
    stage: str, number: int, ready: Offline, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    close = EmbeddedRolloutEngine.close

    async def note(self: EmbeddedRolloutEngine) -> None:
        await close(self)
        closed.append(True)

    async def endless(*arguments: Any, **settings: Any) -> None:
        send(number)
        await asyncio.sleep(60)

    monkeypatch.setattr(EmbeddedRolloutEngine, "close", note)
    monkeypatch.setattr(module, "evaluate", endless)
    monkeypatch.setattr(precision.pipeline_step, "generate", endless)
    settings = (EVALUATION,) if stage == "eval" else ()
    assert call_cli(stage, "--config", ready.config_file, *settings).code == 130
    assert closed == [True]


# --- What cannot be written, or asked for --------------------------------------------------------


def no_space(path: Path, *_: Any) -> None:
    raise RunFolderError(f"cannot write {path}: No space left on device")


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_rows_that_cannot_be_written_in_the_end_are_put_elsewhere(
    stage: str, three_steps: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"generate": "write_rollouts", "score": "write_scored"}[stage]
    real = getattr(module, name)
    full, spare = tmp_path / "full", tmp_path / "spare"
    spare.mkdir()

    def write(path: Path, *others: Any) -> None:
        (no_space if path.parent == full else real)(path, *others)

    monkeypatch.setattr(module, name, write)
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    for file in ("out-partial.parquet", "out-partial-2.parquet"):
        result = call_cli(*stage_of(stage, three_steps, full / "out.parquet"))
        assert result.code == 2
        assert result.err.startswith(f"error: cannot write {full / 'out.parquet'}: No space")
        assert f"12 rollouts are in {spare / file}" in result.out
        assert len(read_rollouts(spare / file)) == 12
    monkeypatch.setattr(module, name, no_space)
    refused(*stage_of(stage, three_steps, full / "out.parquet"), words=["No space left"])


def test_accuracy_is_said_though_it_cannot_be_written(
    ready: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "write_json_atomic", no_space)
    command = ("eval", "--config", ready.config_file, EVALUATION, "--out", tmp_path / "out.json")
    result = call_cli(*command)
    assert result.code == 2
    assert re.search(r"student: \S+% \[.*\] on 2 problems", result.out)


def test_evaluation_tells_how_far_it_is(ready: Offline) -> None:
    evaluation = EVALUATION.replace("num_problems: 2", "num_problems: 25")
    result = call_cli("eval", "--config", ready.config_file, evaluation)
    assert result.code == 0
    progress = re.findall(r"(\d+) of 25 answers, [\d.,]+ a second, \d+:\d\d left\n", result.out)
    assert [int(done) for done in progress] == [3, 5, 8, 10, 13, 15, 18, 20, 23]


def test_train_refuses_replay(ready: Offline) -> None:
    replay = "replay={capacity_tokens: 1000}"
    refused(*ready.train_command, replay, words=["trains once on each", "replay=null"])


@pytest.mark.parametrize("size", ["inf", "nan", "0", "-1", "1e308"])
def test_memory_that_no_device_has_is_refused(ready: Offline, size: str) -> None:
    result = call_cli("plan", "--config", ready.config_file, f"--device-memory-gib={size}")
    assert result.code == 2
    assert "--device-memory-gib" in result.err


@pytest.mark.parametrize("option", ["--step", "--num-steps"])
def test_steps_beyond_a_file_s_numbers_are_refused(ready: Offline, option: str) -> None:
    result = call_cli("generate", "--config", ready.config_file, option, "1" + 20 * "0")
    assert result.code == 2
    assert option in result.err
