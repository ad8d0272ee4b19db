"""The arms beside on-policy distillation: who samples, with and without a teacher, offline."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.data.rollout_files import read_rollouts, read_training, write_rollouts
from qwen3_distill.errors import DataError, EngineError, RunFolderError
from qwen3_distill.pipeline.collected import EpochSchedule
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.requests import is_teachers
from qwen3_distill.pipeline.run import run
from qwen3_distill.pipeline.verification import BackgroundVerifier
from qwen3_distill.ports import Sampler
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.scoring.sampling import TeacherSampler
from qwen3_distill.training.batching import collate
from qwen3_distill.types import Batch, FinishReason, Rollout, RolloutRequest
from tests.contract.builders import make_prompt, make_request, make_spec, synthetic_rollout
from tests.pipeline.builders import (
    FULL,
    TOP_K,
    Values,
    call_cli,
    raise_warning,
    read_json,
    refused,
    run_to_end,
    same_result,
    student_bytes,
    timeless,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import EOS_ID, TinyModels

TEACHER: Values = {"rollouts": {"source": "teacher"}}
SFT: Values = {"objective": {"kind": "sft"}, **TEACHER}
SOFT: Values = {"objective": TOP_K | {"divergence": "forward_kl"}, **TEACHER}
GRPO: Values = {"objective": {"kind": "grpo"}, "verifier": {"kind": "task"}, "scoring": None}
OFFLINE: Values = {"pipeline": {"kind": "offline", "collect_steps": 2}}
STREAMING: Values = {"pipeline": {"kind": "streaming", "max_staleness_steps": 0}}


def mixture(share: float, objective: Values = TOP_K) -> Values:
    return {
        "objective": objective,
        "rollouts": {"source": "mixture", "teacher_share": share},
        "verifier": {"kind": "task"},
    }


ARMS: dict[str, Values] = {
    "sft": SFT,
    "soft-labels": SOFT,
    "grpo": GRPO,
    "mixture": mixture(0.5),
    "offline": {"objective": TOP_K, **OFFLINE},
    "offline-full": {"objective": FULL, **OFFLINE},
    "offline-sft": SFT | OFFLINE,
}
each_arm = pytest.mark.parametrize("arm", ARMS)


class Crash(Exception):
    """Stands for a process that dies."""


def crash_after(calls: int, part: str, method: str) -> Callable[[Parts], Parts]:
    """An ``adapt`` for `run` that lets a part's method succeed so often and then raise."""

    def adapt(parts: Parts) -> Parts:
        target: Any = getattr(parts, part)
        works = getattr(target, method)
        left = calls

        async def counted(*arguments: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return await works(*arguments)

        setattr(target, method, counted)
        return parts

    return adapt


def crashed(config: RunConfig, adapt: Callable[[Parts], Parts]) -> None:
    with pytest.raises(Crash):
        run(config, SilentReporter(), raise_warning, adapt)


def rewarded(parts: Parts) -> Parts:
    """An ``adapt``: answers with an even first token are correct, so that rewards differ."""
    return replace(
        parts,
        verifier=BackgroundVerifier(lambda rollout: float(rollout.response_ids[0] % 2 == 0)),
    )


# --- Resumed, and the same in both loops ---------------------------------------------------------


@each_arm
def test_evaluations_at_chosen_steps_measure_the_students_weights_then(
    arm: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Where the student does not sample, nothing else would bring its weights to the engine."""
    evaluation = {
        "prompts": {"kind": "task", "split": "eval"},
        "verifier": {"kind": "task"},
        "sampling": {"max_new_tokens": 8},
        "at_steps": [1, 3],
        "every_steps": 1000,
        "num_problems": 2,
        "teacher": False,
    }
    config = tiny_config(tiny_models, tmp_path / "run", {"evaluation": evaluation} | ARMS[arm])
    assert run(config, SilentReporter(), raise_warning, rewarded)
    lines = read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert [line["step"] for line in lines if line["model"] == "student"] == [1, 3, 4]


@each_arm
def test_a_run_that_died_ends_with_the_same_bits(
    tiny_models: TinyModels, tmp_path: Path, arm: str
) -> None:
    whole, broken = (tiny_config(tiny_models, tmp_path / name, ARMS[arm]) for name in "ab")
    assert run(whole, SilentReporter(), raise_warning, rewarded)
    crash = crash_after(3, "learner", "update")
    crashed(broken, lambda parts: crash(rewarded(parts)))  # after the checkpoint of step 2
    assert run(broken, SilentReporter(), raise_warning, rewarded)
    assert same_result(whole.output_path, broken.output_path)
    norms = [record["optim/grad_norm"] for record in timeless(whole.output_path / "metrics.jsonl")]
    assert max(norms) > 0


@pytest.mark.parametrize("arm", ["sft", "mixture", "grpo"])
def test_both_loops_make_the_same_student(
    tiny_models: TinyModels, tmp_path: Path, arm: str
) -> None:
    one = tiny_config(tiny_models, tmp_path / "sequential", ARMS[arm])
    other = tiny_config(tiny_models, tmp_path / "streaming", ARMS[arm] | STREAMING)
    for config in (one, other):
        assert run(config, SilentReporter(), raise_warning, rewarded)
    assert student_bytes(one.output_path) == student_bytes(other.output_path)


# --- Who samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "source"), [(0.0, "student"), (1.0, "teacher")])
def test_a_mixture_at_its_ends_is_one_model_alone(
    tiny_models: TinyModels, tmp_path: Path, share: float, source: str
) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path / "mixed", mixture(share)))
    alone = mixture(share) | {"rollouts": {"source": source}}
    run_to_end(tiny_config(tiny_models, tmp_path / "alone", alone))
    assert student_bytes(tmp_path / "mixed") == student_bytes(tmp_path / "alone")
    records = timeless(tmp_path / "mixed" / "metrics.jsonl")
    assert [record["rollout/teacher_share"] for record in records] == [share] * 4


def test_a_prompt_is_answered_by_one_model_and_the_share_is_kept(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", mixture(0.3))
    flags = [is_teachers(config, number) for number in range(4000)]
    assert flags[::2] == flags[1::2]  # both samples of a prompt
    assert 0.25 < sum(flags) / len(flags) < 0.35
    other = config.model_copy(update={"seed": 1})
    assert flags != [is_teachers(other, number) for number in range(4000)]


def test_saved_rollouts_and_metrics_say_who_sampled(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = mixture(0.5) | {"steps": 8, "logging.rollouts_every_steps": 1}
    changes |= {"rollouts": {**mixture(0.5)["rollouts"], "teacher_temperature": 0.5}}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    run_to_end(config)
    files = sorted((config.output_path / "rollouts").glob("*.parquet"))
    rollouts = [rollout for file in files for _, rollout in read_rollouts(file)]
    by_teacher = [r for r in rollouts if r.sampled_by == "teacher"]
    assert 0 < len(by_teacher) < len(rollouts)
    manifest = read_json(config.output_path / "manifest.json")
    assert {r.teacher_id for r in by_teacher} == {manifest["teacher"]["id"]}
    assert {r.sampling.temperature for r in by_teacher} == {0.5}
    assert {r.sampling.temperature for r in rollouts if r.teacher_id is None} == {1.0}
    keys = {key for record in timeless(config.output_path / "metrics.jsonl") for key in record}
    assert {"rollout/accuracy_student", "rollout/accuracy_teacher"} <= keys
    assert {"loss/reverse_kl_nats", "loss/forward_kl_nats"} <= keys
    report = (config.output_path / "report.html").read_text()
    assert "sampled by the teacher" in report


class OtherWeights:
    """A `Sampler` whose rollouts come from some other weights: injects the fault."""

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        yield synthetic_rollout(3, 4, 0)


class NamedTeacher:
    teacher_id = "teacher#abc@float32"


def test_samples_of_other_weights_than_the_scoring_teachers_are_refused() -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Sampler]:
        yield OtherWeights()

    named: Any = NamedTeacher()
    sampler = TeacherSampler(named, opened)
    request = make_request("r", make_prompt(3), make_spec())

    async def sample() -> None:
        await sampler.start()
        _ = [rollout async for rollout in sampler.generate([request])]

    with pytest.raises(EngineError, match="but the teacher that scores is teacher#abc@float32"):
        asyncio.run(sample())


# --- Without a teacher ---------------------------------------------------------------------------


def test_no_teacher_is_built_where_none_is_needed(tiny_models: TinyModels, tmp_path: Path) -> None:
    seen: list[Parts] = []

    def look(parts: Parts) -> Parts:
        seen.append(parts)
        return rewarded(parts)

    config = tiny_config(tiny_models, tmp_path / "run", GRPO)
    assert run(config, SilentReporter(), raise_warning, look)
    assert (seen[0].teacher, seen[0].scorer, seen[0].teacher_rollouts) == (None, None, None)
    assert "teacher" not in read_json(config.output_path / "manifest.json")
    assert "not scored" not in (config.output_path / "report.html").read_text()


def test_an_evaluation_may_open_the_teacher_that_training_does_not_need(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    evaluation = {
        "prompts": {"kind": "task", "split": "eval"},
        "verifier": {"kind": "task"},
        "num_problems": 2,
        "sampling": {"max_new_tokens": 4},
    }
    changes = {key: value for key, value in GRPO.items() if key != "scoring"}
    config = tiny_config(tiny_models, tmp_path / "run", changes | {"evaluation": evaluation})
    run_to_end(config)
    models = [record["model"] for record in timeless(config.output_path / "evaluations.jsonl")]
    assert models == ["teacher", "student", "student"]


# --- Offline --------------------------------------------------------------------------------------


def test_the_first_offline_step_is_that_of_the_loop(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    one = {"objective": TOP_K, "steps": 1}
    run_to_end(tiny_config(tiny_models, tmp_path / "loop", one))
    run_to_end(tiny_config(tiny_models, tmp_path / "offline", one | OFFLINE))
    assert student_bytes(tmp_path / "loop") == student_bytes(tmp_path / "offline")


def test_a_collection_that_was_interrupted_goes_on(tiny_models: TinyModels, tmp_path: Path) -> None:
    changes = ARMS["offline"] | {"pipeline": {"kind": "offline", "collect_steps": 3}}
    whole, broken = (tiny_config(tiny_models, tmp_path / name, changes) for name in "ab")
    run_to_end(whole)
    crashed(broken, crash_after(2, "teacher", "score"))
    assert len(list((broken.output_path / "collected").iterdir())) == 2
    run_to_end(broken)
    assert same_result(whole.output_path, broken.output_path)


def test_a_collection_that_is_gone_is_not_sampled_from_a_later_student(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", ARMS["offline"])
    crashed(config, crash_after(3, "learner", "update"))
    (config.output_path / "collected" / "step-000001.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"step-000001\.parquet is gone"):
        run(config, SilentReporter(), raise_warning)


@pytest.mark.parametrize(("rollouts", "size"), [(8, 4), (10, 4), (3, 4)])
def test_every_epoch_takes_every_rollout_once(rollouts: int, size: int) -> None:
    schedule = EpochSchedule(num_rollouts=rollouts, batch_size=size, seed=0)
    per_epoch = schedule.steps_per_epoch
    epochs = [
        [schedule.batch(epoch * per_epoch + step) for step in range(per_epoch)]
        for epoch in range(3)
    ]
    orders = [[i for _, batch in steps for i in batch] for steps in epochs]
    assert orders[0] == list(range(rollouts))
    assert all(sorted(order) == orders[0] for order in orders)
    assert {epoch for epoch, _ in epochs[2]} == {2}
    if rollouts > 3:
        assert orders[0] != orders[1] != orders[2]


def test_staleness_is_reported_as_it_is(tiny_models: TinyModels, tmp_path: Path) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path / "run", ARMS["offline"]))
    records = timeless(tmp_path / "run" / "metrics.jsonl")
    assert [record["weights/lag_steps"] for record in records] == [0, 1, 2, 3]
    assert [record["offline/epoch"] for record in records] == [0, 0, 1, 1]
    assert [record["tokens/generated"] > 0 for record in records] == [True, True, False, False]


# --- Files of rollouts ----------------------------------------------------------------------------


@pytest.fixture
def answers(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """Two steps of the teacher's answers, as `generate` records them."""
    file = write_config(tmp_path / "t.yaml", tiny_values(tiny_models, tmp_path / "t", SFT))
    out = tmp_path / "answers.parquet"
    result = call_cli("generate", "--config", file, "--out", out, "--num-steps", "2")
    assert result.code == 0, result
    return out


def of_file(path: Path, **changes: Any) -> Values:
    return {
        "objective": {"kind": "sft"},
        "rollouts": {"source": "file", "file": str(path)},
        "pipeline": {"kind": "offline"},
        "scoring": None,
        **changes,
    }


def test_recorded_answers_train_as_sampled_ones(
    tiny_models: TinyModels, tmp_path: Path, answers: Path
) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path / "sampled", ARMS["offline-sft"]))
    run_to_end(tiny_config(tiny_models, tmp_path / "file", of_file(answers)))
    assert student_bytes(tmp_path / "sampled") == student_bytes(tmp_path / "file")


def test_recorded_answers_are_scored_where_the_objective_needs_it(
    tiny_models: TinyModels, tmp_path: Path, answers: Path
) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path / "sampled", SOFT | OFFLINE))
    soft = of_file(answers, objective=SOFT["objective"])
    del soft["scoring"]
    run_to_end(tiny_config(tiny_models, tmp_path / "file", soft))
    assert student_bytes(tmp_path / "sampled") == student_bytes(tmp_path / "file")
    kept = read_training(tmp_path / "file" / "collected" / "step-000000.parquet")
    assert len(kept) == 4


def test_files_that_cannot_be_trained_on_are_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    mine, empty, foreign = (tmp_path / name for name in ("mine", "empty", "foreign"))
    rollout = synthetic_rollout(3, 4, 0)
    taught = replace(rollout, versions=(), teacher_id="t")
    strange = replace(taught, response_ids=rollout.response_ids + 10**6)
    for path, rows in ((mine, [rollout]), (empty, []), (foreign, [strange])):
        write_rollouts(path, [(0, row) for row in rows], str)
    cases = [
        (mine, ["was sampled by the student", "expected gradient of zero"]),
        (empty, ["has no rollouts to train on"]),
        (foreign, ["the file is of another model"]),
        (tmp_path / "nowhere", ["does not exist"]),
    ]
    for path, words in cases:
        values = tiny_values(tiny_models, tmp_path / f"run-{path.name}", of_file(path))
        file = write_config(tmp_path / "c.yaml", values)
        refused("run", "--config", file, words=words)


def test_another_file_of_rollouts_is_no_resume(
    tiny_models: TinyModels, tmp_path: Path, answers: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", of_file(answers))
    crashed(config, crash_after(3, "learner", "update"))
    write_rollouts(answers, read_rollouts(answers)[:4], str)
    with pytest.raises(RunFolderError, match=r"data\.rollouts\.file"):
        run(config, SilentReporter(), raise_warning)


def test_a_ratio_needs_rollouts_of_this_student(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_rollouts(path, [(0, synthetic_rollout(3, 4, 0))], str)
    changes = of_file(path, objective={"kind": "sampled_reverse_kl"})
    del changes["scoring"]
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    with pytest.raises(DataError, match="were sampled by other weights"):
        run(config, SilentReporter(), raise_warning)


# --- The shipped configs --------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
SHIPPED = ("lab-sft", "lab-soft-labels", "lab-grpo", "lab-offline", "lab-mixture")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_config_of_an_arm_runs_on_the_lab_pair(name: str, tmp_path: Path) -> None:
    config = load_config(
        ROOT / "configs" / f"{name}.yaml",
        [f"output_dir={tmp_path / name}", "steps=2", "prompts_per_step=4", "evaluation=null"]
        + (["pipeline.collect_steps=1"] if name == "lab-offline" else []),
    )
    with _in_directory(ROOT):
        run_to_end(config)
    records = timeless(tmp_path / name / "metrics.jsonl")
    assert len(records) == 2
    assert max(record["optim/grad_norm"] for record in records) > 0


@contextmanager
def _in_directory(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_the_end_of_the_teachers_answers_is_trained_on(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    answer = synthetic_rollout(3, 5, 0)
    ids = np.append(answer.response_ids[:-1], EOS_ID)
    ended = replace(
        answer, response_ids=ids, versions=(), teacher_id="t", finish_reason=FinishReason.STOP
    )
    write_rollouts(tmp_path / "r.parquet", [(0, ended)], str)
    ((_, read),) = read_training(tmp_path / "r.parquet")
    micro = collate(Batch.uniform([read]), [0])
    assert micro.target_N.tolist() == ids.tolist()
    assert micro.target_N.tolist()[-1] == EOS_ID
    assert bool(micro.behavior_logprob_N.isnan().all())
    assert bool(micro.teacher_logprob_N.isnan().all())
