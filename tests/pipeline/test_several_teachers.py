"""A run with a teacher for every tag, on tiny models: who scores what, and what is written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_distill.data.rollout_files import read_scored, read_training
from qwen3_distill.errors import ConfigError, EngineError
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.scoring.by_tag import TeachersByTag
from qwen3_distill.types import ScoredRollout, ScoreFailure, ScoreResult, ScoringJob
from tests.contract.reference import largest_gap, reference_model, token_logprobs
from tests.pipeline.builders import (
    call_cli,
    raise_warning,
    read_json,
    refused,
    run_to_end,
    student_bytes,
    tiny_config,
    write_config,
)
from tests.pipeline.builders import tiny_values as single_values
from tests.tiny_models import TinyModels, write_model

HARVEST = {"deadline_s": 1e-4, "min_tokens": 1}
ROWS = [
    {"prompt": f"{tag} question {number}", "answer": "4", "task": {"name": tag}}
    for number in range(3)
    for tag in ("math", "math", "code")  # not in turns: a route by position would be wrong
]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher, whose scores differ from the first one's."""
    return write_model(tmp_path_factory.mktemp("second") / "coder", seed=7, hidden_size=64)


@pytest.fixture
def several(tmp_path: Path, second: Path, tiny_models: TinyModels) -> dict[str, Any]:
    """Changes of `tiny_values`: rows of two tags, and a teacher for each."""
    file = tmp_path / "rows.jsonl"
    write_rows(file, ROWS)
    held_out = tmp_path / "held_out.jsonl"
    write_rows(held_out, [row | {"prompt": f"new {row['prompt']}"} for row in ROWS])
    embedded = {"kind": "embedded", "device": "cpu"}
    prompts = {"kind": "jsonl", "path": str(file), "answer_field": "answer"}
    return {
        "prompts": prompts,
        "scoring": {
            "kind": "several",
            "by": "task.name",
            "teachers": {
                "math": {**embedded, "model": str(tiny_models.teacher)},
                "code": {**embedded, "model": str(second)},
            },
        },
        "verifier": {"kind": "exact"},
        "evaluation": {
            "prompts": prompts | {"path": str(held_out)},
            "verifier": {"kind": "exact"},
            "every_steps": 4,
            "num_problems": 6,
            "sampling": {"max_new_tokens": 4},
        },
        "prompts_per_step": 3,
        "logging": {"tensorboard": False, "rollouts_every_steps": 1, "rollouts_per_save": 100},
    }


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def saved(folder: Path) -> list[ScoredRollout]:
    return [
        item
        for path in sorted((folder / "rollouts").glob("*.parquet"))
        for _, item in read_scored(path)
    ]


def assert_scored_by_own_teacher(
    items: Sequence[ScoredRollout], models: TinyModels, second: Path
) -> None:
    """Every score is that of the tag's model, and not that of the other."""
    references = {"math": reference_model(models.teacher), "code": reference_model(second)}
    tags = set()
    for item in items:
        prompt = item.rollout.prompt
        row = ROWS[int(prompt.prompt_id.rpartition(":")[2])]
        tag = row["task"]["name"]  # of the file, not of what the run made of it
        tags.add(tag)
        other = "code" if tag == "math" else "math"
        assert prompt.task_data["teacher"] == tag
        assert (
            largest_gap(item.score.logprobs, token_logprobs(references[tag], item.rollout)) < 1e-4
        )
        assert (
            largest_gap(item.score.logprobs, token_logprobs(references[other], item.rollout)) > 0.1
        )
    assert tags == {"math", "code"}


@pytest.mark.parametrize(
    "pipeline",
    [
        {"kind": "sequential"},
        {"kind": "streaming"},
        {
            "kind": "streaming",
            "max_staleness_steps": 2,
            "harvest": {"deadline_s": 1e-4, "min_tokens": 1},
        },
        {"kind": "offline", "collect_steps": 2},
    ],
    ids=lambda pipeline: "+".join(pipeline),
)
def test_every_rollout_is_scored_by_the_teacher_of_its_rows_tag(
    tiny_models: TinyModels,
    tmp_path: Path,
    several: dict[str, Any],
    second: Path,
    pipeline: dict[str, Any],
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", several | {"pipeline": pipeline})
    run_to_end(config)
    items = saved(tmp_path / "run")
    assert_scored_by_own_teacher(items, tiny_models, second)
    steps = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    keys = {key for step in steps for key in step}
    for tag in ("math", "code"):
        assert f"by_tag/{tag}_sampled_kl_nats" in keys
        assert f"by_tag/{tag}_accuracy" in keys
    for step in steps:
        assert sum(step.get(f"by_tag/{tag}_share", 0) for tag in ("math", "code")) == pytest.approx(
            1
        )


def test_the_run_folder_tells_tags_and_teachers_apart(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any], second: Path
) -> None:
    folder = tmp_path / "run"
    run_to_end(tiny_config(tiny_models, folder, several))
    items = saved(folder)
    manifest = read_json(folder / "manifest.json")
    ids = {tag: record["id"] for tag, record in manifest["teachers"].items()}
    assert ids["math"] != ids["code"]
    assert manifest["teacher"]["id"] == f"code={ids['code']} math={ids['math']}"
    assert {
        i.score.teacher_id for i in items if i.rollout.prompt.task_data["teacher"] == "code"
    } == {ids["code"]}
    ledger = read_jsonl(folder / "ledger.jsonl")
    for line in ledger:
        assert len(line["tags"].split()) == len(line["trained"].split())
    evaluations = read_jsonl(folder / "evaluations.jsonl")
    assert {record["model"] for record in evaluations} == {"student", "teacher"}
    for record in evaluations:
        assert record["num_problems/math"] + record["num_problems/code"] == record["num_problems"]
    cost = [line["work"] for line in read_jsonl(folder / "cost.jsonl")]
    scored = {tag: sum(work.get(f"by_tag/{tag}_scored_tokens", 0) for work in cost) for tag in ids}
    assert min(scored.values()) > 0
    assert sum(scored.values()) == sum(work.get("tokens/scored", 0) for work in cost)
    page = (folder / "report.html").read_text()
    assert "By tag" in page
    assert ">math<" in page


def test_a_stopped_run_continues_as_if_it_had_not_stopped(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any]
) -> None:
    weighted = several | {"scoring": several["scoring"] | {"weights": {"math": 1.0, "code": 2.0}}}
    whole = tiny_config(tiny_models, tmp_path / "whole", weighted)
    run_to_end(whole)
    run_to_end(tiny_config(tiny_models, tmp_path / "parts", weighted | {"steps": 2}))
    run_to_end(tiny_config(tiny_models, tmp_path / "parts", weighted), lambda text: None)
    whole_ledger = read_jsonl(tmp_path / "whole" / "ledger.jsonl")
    assert whole_ledger == read_jsonl(tmp_path / "parts" / "ledger.jsonl")
    assert student_bytes(tmp_path / "whole") == student_bytes(tmp_path / "parts")
    tags = [tag for line in whole_ledger for tag in line["tags"].split()]
    assert tags.count("code") == 2 * tags.count("math")


def swapped(parts: Parts) -> Parts:
    """Exchange the models behind the tags."""
    teacher = parts.teacher
    assert isinstance(teacher, TeachersByTag)
    teachers = dict(zip(teacher.teachers, reversed(teacher.teachers.values()), strict=True))
    return replace(parts, teacher=TeachersByTag(teachers))


class ByPosition(TeachersByTag):
    """A fault: jobs take turns between the teachers, whatever their tags."""

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        tags = list(self.teachers)
        turned = [replace(job, tag=tags[i % len(tags)]) for i, job in enumerate(jobs)]
        results = await super().score(turned)
        for job, result in zip(jobs, results, strict=True):
            self._require_own_teacher(job, result)
        return results


class Crossed(TeachersByTag):
    """A fault: the answers of two jobs are exchanged."""

    def __init__(self, teachers: Any) -> None:
        super().__init__(teachers)
        first, other = list(self.teachers.values())
        for one, answers in ((first, other.score), (other, first.score)):
            one.score = answers  # type: ignore[method-assign]


def routed_by(router: type[TeachersByTag]) -> Callable[[Parts], Parts]:
    def adapt(parts: Parts) -> Parts:
        assert isinstance(parts.teacher, TeachersByTag)
        return replace(parts, teacher=router(parts.teacher.teachers))

    return adapt


@pytest.mark.parametrize("router", [ByPosition, Crossed])
def test_a_wrong_route_ends_the_run(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any], router: type[TeachersByTag]
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", several | {"evaluation.teacher": False})
    with pytest.raises(EngineError, match=r"has the tag '.*', whose teacher is"):
        run(config, SilentReporter(), raise_warning, routed_by(router))


class Silent(TeachersByTag):
    """A router whose teacher of the tag `code` gives no score, with nearly all allowed to drop."""

    @property
    def max_dropped_fraction(self) -> float:
        return 0.99

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        return [
            ScoreFailure(rollout_id=job.rollout_id, reason="told to") if job.tag == "code" else one
            for job, one in zip(jobs, await super().score(jobs), strict=True)
        ]


@pytest.mark.parametrize(
    "pipeline",
    [{"kind": "sequential"}, {"kind": "streaming", "max_staleness_steps": 0}],
    ids=["sequential", "streaming"],
)
def test_a_teacher_that_gives_no_score_ends_the_run_whatever_the_others_give(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any], pipeline: dict[str, Any]
) -> None:
    changes = {"evaluation.teacher": False, "pipeline": pipeline, "prompts_per_step": 6}
    config = tiny_config(tiny_models, tmp_path / "run", several | changes)
    with pytest.raises(EngineError, match=r"(\d+) of \1 rollouts got no score from coder"):
        run(config, SilentReporter(), raise_warning, routed_by(Silent))


def test_exchanged_models_are_seen_by_the_check_of_scores(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any], second: Path
) -> None:
    """A control of `assert_scored_by_own_teacher`."""
    config = tiny_config(tiny_models, tmp_path / "run", several | {"evaluation.teacher": False})
    assert run(config, SilentReporter(), raise_warning, swapped)
    with pytest.raises(AssertionError):
        assert_scored_by_own_teacher(saved(tmp_path / "run"), tiny_models, second)


@pytest.mark.parametrize(
    ("where", "value"), [("prompts", "physics"), ("prompts", None), ("evaluation", "physics")]
)
def test_a_tag_without_a_teacher_is_refused_before_anything_is_written(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any], where: str, value: Any
) -> None:
    file = tmp_path / "bad.jsonl"
    rows = [*ROWS, {"prompt": "x", "answer": "4", "task": {"name": value}}]
    write_rows(file, rows)
    key = "prompts.path" if where == "prompts" else "evaluation.prompts"
    bad = str(file) if where == "prompts" else several["prompts"] | {"path": str(file)}
    values = single_values(tiny_models, tmp_path / "run", several | {key: bad})
    config = write_config(tmp_path / "config.yaml", values)
    words = ["line 10", repr(value), "code, math", "scoring.teachers"]
    refused("run", "--config", config, words=words)
    refused("config", "check", "--config", config, words=words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_row_without_the_field_is_refused(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any]
) -> None:
    values = single_values(
        tiny_models, tmp_path / "run", several | {"scoring.by": "tag", "evaluation": None}
    )
    refused(
        "run",
        "--config",
        write_config(tmp_path / "config.yaml", values),
        words=["has no field 'tag'", "Change scoring.by"],
    )


def test_the_stages_keep_tags_in_their_files(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any], second: Path
) -> None:
    config = write_config(
        tmp_path / "config.yaml", single_values(tiny_models, tmp_path / "run", several)
    )
    rollouts, scored = tmp_path / "r.parquet", tmp_path / "s.parquet"
    command = ("--config", config)
    assert call_cli("generate", *command, "--num-steps", "2", "--out", rollouts).code == 0
    assert call_cli("score", *command, "--rollouts", rollouts, "--out", scored).code == 0
    assert_scored_by_own_teacher([item for _, item in read_scored(scored)], tiny_models, second)
    out = tmp_path / "student"
    assert call_cli("train", *command, "--scored", scored, "--out", out).code == 0
    exchanged = dict(several["scoring"]["teachers"])
    exchanged["math"], exchanged["code"] = exchanged["code"], exchanged["math"]
    other = single_values(tiny_models, tmp_path / "run", several | {"scoring.teachers": exchanged})
    words = ["was scored by", "but the config's teacher is"]
    other_config = write_config(tmp_path / "other.yaml", other)
    refused(
        "train", "--config", other_config, "--scored", scored, "--out", tmp_path / "t", words=words
    )


def test_a_file_of_rollouts_without_tags_is_refused(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any]
) -> None:
    plain = {key: value for key, value in several.items() if key != "scoring"}
    one = write_config(tmp_path / "one.yaml", single_values(tiny_models, tmp_path / "a", plain))
    rollouts = tmp_path / "r.parquet"
    assert call_cli("generate", "--config", one, "--num-steps", "1", "--out", rollouts).code == 0
    config = write_config(
        tmp_path / "config.yaml", single_values(tiny_models, tmp_path / "b", several)
    )
    command = ("score", "--config", config, "--rollouts", rollouts, "--out", tmp_path / "s.parquet")
    refused(*command, words=["has no tag", "code, math"])
    offline = {
        "pipeline": {"kind": "offline"},
        "rollouts": {"source": "file", "file": str(rollouts)},
    }
    with pytest.raises(ConfigError, match="has no tag, expected one of math, code"):
        run_to_end(tiny_config(tiny_models, tmp_path / "c", several | offline))


def test_every_teacher_samples_its_own_tags_answers(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any], second: Path
) -> None:
    changes = {"rollouts": {"source": "teacher"}, "objective": {"kind": "sft"}}
    folder = tmp_path / "run"
    run_to_end(tiny_config(tiny_models, folder, several | changes))
    ids = {t: r["id"] for t, r in read_json(folder / "manifest.json")["teachers"].items()}
    references = {"math": reference_model(tiny_models.teacher), "code": reference_model(second)}
    found = set()
    for path in (folder / "rollouts").glob("*.parquet"):
        for _, item in read_training(path):
            tag = item.rollout.prompt.task_data["teacher"]
            found.add(tag)
            assert item.rollout.teacher_id == ids[tag]
            expected = token_logprobs(references[tag], item.rollout)
            assert largest_gap(item.rollout.behavior_logprobs, expected) < 1e-4
    assert found == {"math", "code"}


def test_an_ensemble_trains_on_the_mean_of_its_members(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any], second: Path
) -> None:
    embedded = {"kind": "embedded", "device": "cpu"}
    members = [{**embedded, "model": str(tiny_models.teacher)}, {**embedded, "model": str(second)}]
    ensemble = {"kind": "ensemble", "members": members, "weights": [1.0, 3.0]}
    changes = {
        "scoring.teachers.code": ensemble,
        "evaluation": None,
        "objective": {"kind": "top_k", "k": 4},
    }
    run_to_end(tiny_config(tiny_models, tmp_path / "run", several | changes))
    models = [reference_model(tiny_models.teacher), reference_model(second)]
    codes = [i for i in saved(tmp_path / "run") if i.rollout.prompt.task_data["teacher"] == "code"]
    assert codes
    for item in codes:
        one, other = (token_logprobs(model, item.rollout) for model in models)
        mean = np.log(0.25 * np.exp(one) + 0.75 * np.exp(other))
        assert largest_gap(item.score.logprobs, mean) < 1e-4


def test_the_doctor_has_a_line_for_each_teacher(
    tiny_models: TinyModels, tmp_path: Path, several: dict[str, Any]
) -> None:
    values = single_values(tiny_models, tmp_path / "run", several)
    config = write_config(tmp_path / "config.yaml", values)
    result = call_cli("doctor", "--config", config, "--json")
    report = json.loads(result.out)
    checks = {line["check"]: line for line in report["findings"]}
    for name in ("teacher files", "tokenizer", "chat template"):
        assert checks[f"{name} (math)"]["status"] == checks[f"{name} (code)"]["status"] == "pass"
    assert "from math" in checks["scores"]["found"]
