"""A run's folder, its repeatability and its order of events."""

import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.data.rollout_files import read_scored
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.pipeline import run as run_module
from qwen3_distill.pipeline.assembly.engines import engine_interpreters
from qwen3_distill.pipeline.manifest import engine_versions
from qwen3_distill.pipeline.requests import make_batch
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.views import SameView
from qwen3_distill.training.embedded.student import EmbeddedLearner
from qwen3_distill.types import (
    Batch,
    FinishReason,
    Prompt,
    Rollout,
    SamplingSpec,
    ScoredRollout,
    TeacherScore,
    VersionSpan,
    WeightVersion,
)
from tests.pipeline.builders import (
    EVALUATION,
    FULL,
    LORA,
    SAMPLED,
    TASK_REWARD,
    TOP_K,
    RecordingReporter,
    call_cli,
    read_json,
    run_to_end,
    student_bytes,
    timeless,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import TinyModels

STEP_KEYS = {
    "step",
    "wall_s",
    "loss/objective",
    "loss/reverse_kl_nats",
    "loss/entropy_nats",
    "health/learner_vs_engine_abs_nats",
    "health/learner_vs_engine_max_nats",
    "optim/grad_norm",
    "optim/learning_rate",
    "rollout/response_tokens",
    "rollout/truncated_fraction",
    "rollout/accuracy",
    "tokens/generated",
    "tokens/trained",
    "weights/lag_steps",
    "time/generate_s",
    "time/score_s",
    "time/train_s",
    "time/publish_s",
    "time/checkpoint_s",
    "time/evaluate_s",
    "time/step_s",
    "idle/generate_fraction",
    "idle/score_fraction",
    "idle/train_fraction",
    "idle/publish_fraction",
    "idle/all_fraction",
}
EVALUATION_KEYS = {
    "step",
    "model",
    "accuracy",
    "ci_low",
    "ci_high",
    "num_problems",
    "samples_per_problem",
    "mean_tokens",
    "truncated_fraction",
    "wall_s",
}


# --- The run folder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A complete run of six steps with everything on. Do not change its folder."""
    changes = {
        "steps": 6,
        "evaluation": EVALUATION | {"every_steps": 4},
        "verifier": {"kind": "task"},
        "checkpoint": {"every_steps": 1, "keep_last": 2},
        "logging.tensorboard": True,
    }
    config = tiny_config(tiny_models, tmp_path_factory.mktemp("finished") / "run", changes)
    run_to_end(config)
    return config


def test_folder_holds_exactly_what_is_promised(finished: RunConfig) -> None:
    assert {path.name for path in finished.output_path.iterdir()} == {
        ".lock",
        "checkpoints",
        "cost.jsonl",
        "config.json",
        "evaluations.jsonl",
        "ledger.jsonl",
        "manifest.json",
        "metrics.jsonl",
        "prompt.json",
        "report.html",
        "rollouts",
        "status.json",
        "student",
        "summary.json",
        "tensorboard",
        "trace.json",
    }


def test_saved_config_resolves_to_the_run_s_own(finished: RunConfig) -> None:
    assert load_config(finished.output_path / "config.json") == finished


def test_manifest_names_versions_models_code_and_machine(finished: RunConfig) -> None:
    manifest = read_json(finished.output_path / "manifest.json")
    (start,) = manifest["starts"]
    assert start["step"] == 0
    assert start["versions"]["torch"] == torch.__version__
    assert {"qwen3_distill", "python", "transformers", "peft"} <= start["versions"].keys()
    assert start["machine"]["torch_threads"] == torch.get_num_threads()
    assert {"cpu", "gpu", "memory_gib"} <= start["machine"].keys()
    assert start["code"] is None or len(start["code"]["commit"]) == 40
    assert manifest["student"]["tokenizer_digest"] == manifest["teacher"]["tokenizer_digest"]
    assert manifest["teacher"]["id"].startswith("teacher#")
    assert start["engines"] == {}  # none has an interpreter of its own


def test_versions_of_an_engine_are_those_of_its_own_interpreter(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    site = tmp_path / "vllm-0.1.2.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.1.2\n")
    changes = {
        "generation": {
            "kind": "vllm",
            "python": sys.executable,
            "environment": {"PYTHONPATH": str(tmp_path)},
        },
        "training": {"kind": "unsloth", "python": str(tmp_path / "no-python")},
    }
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    found = engine_versions(engine_interpreters(config))
    assert found["vllm"]["vllm"] == "0.1.2"
    assert found["vllm"]["python"] == platform.python_version()
    assert found.keys() == {"vllm"}


def test_metrics_have_one_line_per_step_with_the_promised_keys(finished: RunConfig) -> None:
    records = timeless(finished.output_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    timed = {key for key in STEP_KEYS if key == "wall_s" or key.startswith(("time/", "idle/"))}
    for record in records:
        assert STEP_KEYS - timed <= record.keys()
        assert record["tokens/generated"] == record["tokens/trained"] > 0
        assert record["weights/lag_steps"] == 0


def test_metrics_time_every_stage(finished: RunConfig) -> None:
    first = (finished.output_path / "metrics.jsonl").read_text().splitlines()[0]
    assert all(f'"{key}"' in first for key in STEP_KEYS)


def test_teacher_is_evaluated_once_and_the_student_first_regularly_and_last(
    finished: RunConfig,
) -> None:
    records = timeless(finished.output_path / "evaluations.jsonl")
    assert [(record["step"], record["model"]) for record in records] == [
        (0, "teacher"),
        (0, "student"),
        (4, "student"),
        (6, "student"),
    ]
    assert all(record.keys() == EVALUATION_KEYS - {"wall_s"} for record in records)
    assert all(record["num_problems"] == 3 for record in records)


def test_tensorboard_has_every_step(finished: RunConfig) -> None:
    events = EventAccumulator(str(finished.output_path / "tensorboard")).Reload()
    losses = events.Scalars("loss/objective")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    logged = [r["loss/objective"] for r in timeless(finished.output_path / "metrics.jsonl")]
    assert [event.value for event in losses] == pytest.approx(logged)


def test_saved_rollouts_are_readable_and_limited(finished: RunConfig) -> None:
    files = sorted((finished.output_path / "rollouts").iterdir())
    assert [file.name for file in files] == [
        f"step-{step:06d}.parquet" for step in (0, 2, 4, 5)
    ]  # every second and the last
    for file in files:
        rows = read_scored(file)
        assert len(rows) == finished.logging.rollouts_per_save
        assert {step for step, _ in rows} == {int(file.stem.removeprefix("step-"))}


def test_only_the_last_checkpoints_are_kept(finished: RunConfig) -> None:
    folder = finished.output_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000005", "step-000006"]
    cursor = read_json(folder / "step-000006" / "cursor.json")
    assert (cursor["step"], cursor["prompts_drawn"]) == (6, 12)


def test_student_directory_is_a_model_with_its_tokenizer(
    finished: RunConfig, tiny_models: TinyModels
) -> None:
    folder = finished.output_path / "student"
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(tiny_models.student)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("3+4=")["input_ids"]) == "3+4="
    changed = [
        not torch.equal(new, old)
        for new, old in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert all(changed)


def test_summary_adds_up(finished: RunConfig) -> None:
    summary = read_json(finished.output_path / "summary.json")
    metrics = timeless(finished.output_path / "metrics.jsonl")
    evaluations = timeless(finished.output_path / "evaluations.jsonl")
    assert summary["steps"] == 6
    assert summary["tokens"]["trained"] == sum(record["tokens/trained"] for record in metrics)
    assert summary["accuracy"].keys() == {"before", "after", "teacher"}
    assert summary["accuracy"]["after"]["value"] == evaluations[-1]["accuracy"]
    assert summary["wall_s"]["total"] == pytest.approx(
        sum(value for key, value in summary["wall_s"].items() if key != "total")
    )


def test_report_is_a_page_of_its_own(finished: RunConfig) -> None:
    page = (finished.output_path / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "task" in page
    assert 'src="http' not in page


def test_finished_run_says_so_and_trains_nothing(finished: RunConfig) -> None:
    before = {
        name: (finished.output_path / name).read_bytes()
        for name in ("metrics.jsonl", "evaluations.jsonl", "manifest.json", "summary.json")
    }
    reporter = run_to_end(finished)
    assert any("is complete" in text for text in reporter.stages)
    assert not reporter.steps
    result = call_cli("run", "--config", finished.output_path / "config.json")
    assert result.code == 0
    assert "is complete" in result.out
    assert before == {name: (finished.output_path / name).read_bytes() for name in before}


# --- Repeatability ------------------------------------------------------------------------------


def trained(models: TinyModels, folder: Path, changes: Mapping[str, Any] | None = None) -> bytes:
    run_to_end(tiny_config(models, folder, changes))
    return student_bytes(folder)


def test_same_seed_gives_the_same_student_bit_for_bit(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    assert trained(tiny_models, tmp_path / "a") == trained(tiny_models, tmp_path / "b")
    first, second = (timeless(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert first == second


def test_another_seed_gives_another_student(tiny_models: TinyModels, tmp_path: Path) -> None:
    one_prompt = {"prompts.limit": 1}  # whose order cannot make the difference
    first = trained(tiny_models, tmp_path / "a", {"seed": 1, **one_prompt})
    assert first != trained(tiny_models, tmp_path / "b", {"seed": 2, **one_prompt})


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"objective": SAMPLED | {"discount": 0.9}}, id="discounted"),
        pytest.param({"objective": SAMPLED | {"kl_baseline": {"kind": "top_k"}}}, id="baseline"),
        pytest.param(
            {"objective": SAMPLED | {"kl_baseline": {"kind": "full"}}}, id="full-baseline"
        ),
        pytest.param({"objective": TOP_K}, id="top_k"),
        pytest.param({"objective": TOP_K | {"tail": "renormalize"}}, id="top_k-renormalize"),
        pytest.param({"objective": FULL | {"divergence": "forward_kl"}}, id="full-forward"),
        pytest.param({"objective": FULL | {"divergence": "jsd", "beta": 0.5}}, id="full-jsd"),
        pytest.param({"training.tuning": LORA}, id="lora"),
    ],
)
def test_every_kind_trains_the_student(
    changes: dict[str, Any], tiny_models: TinyModels, run_dir: Path
) -> None:
    weights = trained(tiny_models, run_dir, {"steps": 2, **changes})
    assert weights != (tiny_models.student / "model.safetensors").read_bytes()
    assert len(timeless(run_dir / "metrics.jsonl")) == 2


@pytest.mark.parametrize("tuning", [{"kind": "full"}, LORA], ids=["full", "lora-with-dropout"])
def test_evaluations_leave_the_training_stream_undisturbed(
    tuning: dict[str, Any], tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = {"training.tuning": tuning}
    without = trained(tiny_models, tmp_path / "none", base)
    for cadence in (1, 3):
        evaluation = EVALUATION | {"every_steps": cadence}
        folder = tmp_path / f"every-{cadence}"
        assert trained(tiny_models, folder, {**base, "evaluation": evaluation}) == without


def parity_check(task: ChainTask, problem: object, response_text: str) -> bool:
    """A check that about half of random answers pass."""
    return len(response_text) % 2 == 0


def test_an_evaluation_s_result_does_not_depend_on_the_ones_before(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChainTask, "check", parity_check)
    results: list[dict[tuple[int, str], dict[str, Any]]] = []
    for cadence in (1, 2):
        folder = tmp_path / f"every-{cadence}"
        trained(tiny_models, folder, {"evaluation": EVALUATION | {"every_steps": cadence}})
        records = timeless(folder / "evaluations.jsonl")
        results.append({(record["step"], record["model"]): record for record in records})
    often, rarely = results
    assert {step for step, _ in often} > {step for step, _ in rarely} == {0, 2, 4}
    assert {key: often[key] for key in rarely} == rarely
    assert {record["accuracy"] for record in often.values()} - {0.0, 1.0}


# --- The order of events --------------------------------------------------------------------------


def record_calls(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, events: list[str], label: str
) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        events.append(label)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)


def test_handshake_then_weights_then_rollouts_and_new_weights_after_every_step(
    tiny_models: TinyModels, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    record_calls(monkeypatch, SameView, "check", events, "handshake")
    record_calls(monkeypatch, run_module, "build_parts", events, "build")
    record_calls(monkeypatch, EmbeddedLearner, "publish", events, "publish")
    record_calls(monkeypatch, EmbeddedRolloutEngine, "load", events, "load")
    record_calls(monkeypatch, EmbeddedRolloutEngine, "generate", events, "generate")
    record_calls(monkeypatch, EmbeddedTeacher, "score", events, "score")
    record_calls(monkeypatch, EmbeddedLearner, "update", events, "update")
    run_to_end(tiny_config(tiny_models, run_dir, {"steps": 2}))
    step = ["generate", "score", "update", "publish", "load"]
    assert events == ["handshake", "build", "publish", "load", *step, *step]


def test_rollouts_of_a_step_come_from_the_weights_of_the_update_before(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    changes = {
        "checkpoint": {"every_steps": 1, "keep_last": 9},
        "logging.rollouts_every_steps": 1,
    }
    run_to_end(tiny_config(tiny_models, run_dir, changes))
    digests: list[str] = []
    for step in range(1, 4):
        cursor = read_json(run_dir / "checkpoints" / f"step-{step:06d}" / "cursor.json")
        version = WeightVersion(**cursor["weight_version"])
        rows = read_scored(run_dir / "rollouts" / f"step-{step:06d}.parquet")
        used = {span.version for _, item in rows for span in item.rollout.versions}
        assert used == {version}
        assert version.step == step
        digests.append(version.digest)
    assert len(set(digests)) == len(digests)


def test_an_epoch_draws_every_prompt_once(tiny_models: TinyModels, run_dir: Path) -> None:
    changes = {
        "prompts.limit": 6,
        "prompts_per_step": 2,
        "steps": 3,
        "logging": {"rollouts_every_steps": 1, "tensorboard": False},
    }
    run_to_end(tiny_config(tiny_models, run_dir, changes))
    drawn = [
        item.rollout.prompt.prompt_id
        for file in sorted((run_dir / "rollouts").iterdir())
        for _, item in read_scored(file)
    ]
    assert sorted(drawn) == sorted(f"train-0-{index}" for index in range(6) for _ in range(2))


# --- The task reward ------------------------------------------------------------------------------


def scored(rollout_id: str, prompt_id: str = "p") -> ScoredRollout:
    prompt = Prompt(prompt_id=prompt_id, token_ids=np.array([1], dtype=np.int32))
    rollout = Rollout(
        rollout_id=rollout_id,
        prompt=prompt,
        sampling=SamplingSpec(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1, seed=0),
        response_ids=np.array([2], dtype=np.int32),
        behavior_logprobs=np.array([-1.0], dtype=np.float32),
        versions=(VersionSpan(start=0, stop=1, version=WeightVersion(step=0, digest="0")),),
        finish_reason=FinishReason.LENGTH,
    )
    score = TeacherScore(teacher_id="t", logprobs=np.array([-1.0], dtype=np.float32))
    return ScoredRollout(rollout=rollout, score=score)


def rewarded(correct_by_id: Mapping[str, float], weight: float) -> list[float]:
    batch = make_batch(
        [scored(rollout_id) for rollout_id in correct_by_id],
        task_reward_weight=weight,
        is_correct=lambda rollout: correct_by_id[rollout.rollout_id],
    )
    return batch.task_advantages.tolist()


def test_a_task_reward_without_a_checker_is_an_error_and_not_a_batch_without_reward() -> None:
    with pytest.raises(ValueError, match="checks rollouts"):
        make_batch([], task_reward_weight=0.5, is_correct=None)


def test_rewards_are_centred_within_a_prompt_s_samples_and_weighted() -> None:
    correct = {"s/0/a": True, "s/0/b": False, "s/0/c": False, "s/0/d": False, "s/1/a": True}
    expected = [0.75, -0.25, -0.25, -0.25, 0.0]
    assert rewarded(correct, weight=2.0) == [2 * value for value in expected]


def test_rewards_between_0_and_1_are_centred_too() -> None:
    rewards = {"s/0/a": 0.25, "s/0/b": 0.75, "s/1/a": True, "s/1/b": 0.5}
    assert rewarded(rewards, weight=2.0) == [-0.5, 0.5, 0.5, -0.5]


def test_one_prompt_drawn_twice_makes_two_groups() -> None:
    # As one group of four with a mean of 1/2 the first two would get +1/2 and the others -1/2.
    correct = {"s/0/a": True, "s/0/b": True, "s/1/a": False, "s/1/b": False}
    assert rewarded(correct, weight=1.0) == [0.0] * 4


def test_batch_without_a_reward_is_uniform() -> None:
    batch = make_batch([scored("s/0/a")], task_reward_weight=0.0, is_correct=lambda rollout: True)
    assert batch.task_advantages.tolist() == [0.0]
    assert batch.importance_weights.tolist() == [1.0]


def test_task_reward_reaches_the_learner_and_sums_to_zero_per_group(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChainTask, "check", parity_check)
    without = trained(tiny_models, tmp_path / "without")
    batches: list[Batch] = []
    update = EmbeddedLearner.update

    def recorded(self: EmbeddedLearner, batch: Batch) -> Any:
        batches.append(batch)
        return update(self, batch)

    monkeypatch.setattr(EmbeddedLearner, "update", recorded)
    assert trained(tiny_models, tmp_path / "with", TASK_REWARD) != without
    advantages = np.stack([batch.task_advantages.reshape(2, 2) for batch in batches])
    assert np.abs(advantages).max() == pytest.approx(0.25)  # one of two right, weight 1/2
    assert np.allclose(advantages.sum(axis=-1), 0)


# --- Through the command line ---------------------------------------------------------------------


def test_command_runs_reports_and_writes_the_same_as_the_function(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "run.yaml", tiny_values(tiny_models, tmp_path / "cli"))
    result = call_cli("run", "--config", file, "steps=2")
    assert (result.code, result.err) == (0, "")
    assert "report.html" in result.out
    assert student_bytes(tmp_path / "cli") == trained(tiny_models, tmp_path / "api", {"steps": 2})


def test_report_can_be_written_again(finished: RunConfig, tmp_path: Path) -> None:
    target = tmp_path / "again.html"
    result = call_cli("report", finished.output_path, "--out", target)
    assert (result.code, result.err) == (0, "")
    assert target.stat().st_size > 1000


def test_eval_measures_a_directory_like_the_run_did(finished: RunConfig, tmp_path: Path) -> None:
    config, out = finished.output_path / "config.json", tmp_path / "result.json"
    student = str(finished.output_path / "student")
    result = call_cli("eval", "--config", config, "--model", student, "--out", out)
    assert result.code == 0
    last = timeless(finished.output_path / "evaluations.jsonl")[-1]
    assert read_json(out) | {"step": 6, "model": "student"} == last


def test_reporter_hears_of_every_step(tiny_models: TinyModels, run_dir: Path) -> None:
    reporter: RecordingReporter = run_to_end(tiny_config(tiny_models, run_dir))
    assert reporter.steps == [1, 2, 3, 4]


# --- A second temperature -----------------------------------------------------------------------


def test_a_second_temperature_adds_records_and_changes_none(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    def run_with(name: str, **more: Any) -> tuple[list[Any], dict[str, Any], str]:
        changes = {"steps": 2, "evaluation": EVALUATION | more}
        config = tiny_config(tiny_models, tmp_path / name, changes)
        run_to_end(config)
        folder = config.output_path
        page = (folder / "report.html").read_text()
        return timeless(folder / "evaluations.jsonl"), read_json(folder / "summary.json"), page

    plain, plain_summary, plain_page = run_with("plain")
    both, summary, page = run_with("both", second_temperature=0.0)
    names = [(record["step"], record["model"]) for record in both]
    assert names == [
        (0, "teacher"),
        (0, "teacher@0"),
        (0, "student"),
        (0, "student@0"),
        (2, "student"),
        (2, "student@0"),
    ]
    assert [record for record in both if "@" not in record["model"]] == plain
    assert summary["accuracy"] == plain_summary["accuracy"]
    second = summary["second_accuracy"]
    assert second["temperature"] == 0
    assert second["after"]["samples_per_problem"] == 1
    assert "second_accuracy" not in plain_summary
    assert "greedy" in page
    assert "With greedy answers it" not in plain_page
