"""Runs whose teacher has a context of its own, and students that are their own teachers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen3_distill.config import RunConfig
from qwen3_distill.data.rollout_files import read_rollouts, read_scored
from qwen3_distill.errors import CheckpointError, WeightVersionError
from qwen3_distill.modeling.loading import load_tokenizer
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.types import Prompt, Rollout, ScoredRollout
from tests.contract.reference import reference_model, token_logprobs
from tests.pipeline.builders import (
    FULL,
    TOP_K,
    Values,
    call_cli,
    raise_warning,
    refused,
    run_to_end,
    same_result,
    student_bytes,
    timeless,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import TinyModels

ROWS = [{"prompt": f"q{i}?", "answer": str(i), "hint": "abc"[i % 3] * (i + 1)} for i in range(5)]
CONTEXT: Values = {
    "system": "Know: {{ row.hint }}",
    "user": "{{ prompt }} It is {{ answer }}.",
    "compare_every_steps": 2,
}
EVERY_2 = {"kind": "every", "steps": 2}
EMA = {"kind": "ema", "decay": 0.5}
EVERYTHING_SAVED: Values = {"logging.rollouts_every_steps": 1, "logging.rollouts_per_save": 99}


def told(directory: Path, **changes: Any) -> Values:
    """Changes of a config whose teacher is told the answer of a row."""
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prompts = {"kind": "jsonl", "path": str(file), "answer_field": "answer"}
    return {"prompts": prompts, "scoring.context": CONTEXT, **EVERYTHING_SAVED, **changes}


def saved(config: RunConfig) -> list[ScoredRollout]:
    files = sorted((config.output_path / "rollouts").glob("step-*.parquet"))
    return [item for file in files for _, item in read_scored(file)]


def expected_context(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[int]:
    """Return the ids that the teacher should read, made anew; those before a piece follow."""
    row = ROWS[int(rollout.prompt.prompt_id.rpartition(":")[2])]
    text = (
        f"<|user|>Know: {row['hint']}<|end|><|user|>{row['prompt']} It is {row['answer']}.<|end|>"
        "<|assistant|>"
    )
    before = rollout.prompt.token_ids.size - rollout.continues_at
    return [
        *tokenizer(text, add_special_tokens=False)["input_ids"],
        *rollout.prompt.token_ids[before:].tolist(),
    ]


def check_scores(model: PreTrainedModel, student: Path, items: list[ScoredRollout]) -> None:
    """Compare contexts and scores with a plain forward pass of the teacher."""
    tokenizer = load_tokenizer(student, weights=False)
    assert items
    for item in items:
        rollout = item.rollout
        context = expected_context(tokenizer, rollout)
        assert rollout.prompt.teacher_ids is not None
        assert rollout.prompt.teacher_ids.tolist() == context
        read = Prompt(prompt_id="read", token_ids=np.array(context))
        expected = token_logprobs(model, replace(rollout, prompt=read))
        np.testing.assert_allclose(item.score.logprobs, expected, atol=2e-4)


# --- What the teacher reads ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="sequential"),
        pytest.param({"objective": dict(TOP_K)}, id="top_k"),
        pytest.param({"objective": dict(FULL)}, id="full"),
        pytest.param({"pipeline": {"kind": "offline", "collect_steps": 2}}, id="offline"),
        pytest.param({"pipeline": {"kind": "streaming", "max_staleness_steps": 3}}, id="streaming"),
    ],
)
def test_the_teacher_scores_every_response_behind_its_own_rows_context(
    tiny_models: TinyModels, tmp_path: Path, changes: Values
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", told(tmp_path, **changes))
    run_to_end(config)
    check_scores(reference_model(tiny_models.teacher), tiny_models.student, saved(config))
    metrics = timeless(config.output_path / "metrics.jsonl")
    compared = [r["step"] for r in metrics if "context/with_nats" in r]
    assert compared == [1, 2, 4]
    assert all(r["context/abs_difference_nats"] > 0.01 for r in metrics if r["step"] in compared)


def test_harvested_pieces_are_scored_behind_the_context_and_the_tokens_before_them(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    harvest = {"deadline_s": 1e-6, "min_tokens": 3, "full_length_fraction": 0.25}
    changes = told(
        tmp_path,
        pipeline={
            "kind": "streaming",
            "max_staleness_steps": 40,
            "max_in_flight": 6,
            "harvest": harvest,
        },
    )
    changes |= {"sampling.max_new_tokens": 24, "steps": 12}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    run_to_end(config)
    items = saved(config)
    assert any(item.rollout.continues_at for item in items)
    check_scores(reference_model(tiny_models.teacher), tiny_models.student, items)


def test_a_context_that_says_the_same_trains_the_same_student(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    same = {"user": "{{ prompt }}", "compare_every_steps": 3}
    changes = told(tmp_path)
    del changes["scoring.context"]
    for name, more in {"plain": {}, "told": {"scoring.context": same}}.items():
        run_to_end(tiny_config(tiny_models, tmp_path / name, changes | more))
    assert student_bytes(tmp_path / "plain") == student_bytes(tmp_path / "told")
    plain, told_apart = (
        [
            {key: value for key, value in record.items() if key.partition("/")[0] not in own}
            for record in timeless(tmp_path / name / "metrics.jsonl")
        ]
        for name, own in (("plain", ("cost",)), ("told", ("cost", "context")))
    )
    assert plain == told_apart


def test_streaming_without_staleness_is_the_sequential_run(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    alone = {"scoring.batch_tokens": 1}
    changes = told(tmp_path, **{"scoring.model": "student", "scoring.refresh": EMA}, **alone)
    for name in ("sequential", "streaming"):
        pipeline = {"kind": name} | ({"max_staleness_steps": 0} if name == "streaming" else {})
        config = tiny_config(tiny_models, tmp_path / name, changes | {"pipeline": pipeline})
        run_to_end(config)
    assert student_bytes(tmp_path / "sequential") == student_bytes(tmp_path / "streaming")


# --- The student as its own teacher ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("refresh", "changes_at"),
    [({"kind": "never"}, set()), (EVERY_2, {2}), (EMA, {1, 2, 3})],
    ids=["never", "every", "ema"],
)
def test_a_score_names_the_students_weights_of_its_step(
    tiny_models: TinyModels, tmp_path: Path, refresh: Values, changes_at: set[int]
) -> None:
    changes = told(tmp_path, **{"scoring.model": "student", "scoring.refresh": refresh})
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    run_to_end(config)
    by_step = [
        {item.score.teacher_id for _, item in read_scored(file)}
        for file in sorted((config.output_path / "rollouts").glob("step-*.parquet"))
    ]
    assert all(len(ids) == 1 for ids in by_step)
    found = {step for step in range(1, 4) if by_step[step] != by_step[step - 1]}
    assert found == changes_at
    if refresh == EVERY_2:  # the digest of the version that sampled step 2, by another way
        versions = saved(config)[-1].rollout.versions
        at_two = read_scored(config.output_path / "rollouts" / "step-000002.parquet")
        (sampled,) = {span.version.digest for _, i in at_two for span in i.rollout.versions}
        assert by_step[2] == by_step[3] == {f"student#{sampled}@float32"}
        assert versions[0].version.digest != sampled


@pytest.mark.parametrize("refresh", [EVERY_2 | {"steps": 3}, EMA], ids=["every", "ema"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_teacher_of_the_checkpoint(
    tiny_models: TinyModels, tmp_path: Path, refresh: Values, dtype: str
) -> None:
    changes = told(tmp_path, **{"scoring.model": "student", "scoring.refresh": refresh})
    changes |= {"scoring.dtype": dtype, "steps": 7, "checkpoint.every_steps": 2}
    run_to_end(tiny_config(tiny_models, tmp_path / "whole", changes))
    config = tiny_config(tiny_models, tmp_path / "cut", changes)

    def dying(parts: Parts) -> Parts:
        learner: Any = parts.learner
        update = learner.update

        async def dies(batch: Any) -> Any:
            if learner.version.step == 5:
                raise RuntimeError("made up")
            return await update(batch)

        learner.update = dies
        return parts

    with pytest.raises(RuntimeError, match="made up"):
        run(config, SilentReporter(), raise_warning, adapt=dying)
    run_to_end(config)
    assert same_result(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_without_the_teacher_is_not_gone_on_from(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = told(tmp_path, **{"scoring.model": "student", "scoring.refresh": EMA})
    folder = tmp_path / "run"
    run_to_end(tiny_config(tiny_models, folder, changes | {"checkpoint.keep_last": 1}))
    (folder / "checkpoints" / "step-000004" / "teacher.safetensors").unlink()
    more = tiny_config(tiny_models, folder, changes | {"steps": 5, "checkpoint.keep_last": 1})
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        run(more, SilentReporter(), lambda message: None)


def test_a_teacher_that_misses_a_step_ends_the_run(tiny_models: TinyModels, tmp_path: Path) -> None:
    changes = told(tmp_path, **{"scoring.model": "student", "scoring.refresh": EMA})

    def misses(parts: Parts) -> Parts:
        following: Any = parts.following
        follow = following.follow

        async def skips(version: Any, channel: Any) -> None:
            if version.step != 2:
                await follow(version, channel)

        following.follow = skips
        return parts

    with pytest.raises(WeightVersionError, match="expected step 2"):
        run(tiny_config(tiny_models, tmp_path / "run", changes), SilentReporter(), print, misses)


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture
def stages(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A folder with a config and the rollouts and scores that its stages made."""
    values = tiny_values(tiny_models, tmp_path / "run", told(tmp_path, steps=1))
    write_config(tmp_path / "config.yaml", values)
    stage(tmp_path, "generate", "--out", "rollouts.parquet")
    stage(tmp_path, "score", "--rollouts", "rollouts.parquet", "--out", "scored.parquet")
    return tmp_path


def stage(folder: Path, name: str, *options: str) -> None:
    result = call_cli(*command(folder, name, *options))
    assert result.code == 0, result


def command(folder: Path, name: str, *options: str) -> list[str | Path]:
    placed = [folder / each if each.endswith(".parquet") else each for each in options]
    return [name, "--config", folder / "config.yaml", *placed]


def test_the_stages_make_the_runs_step(tiny_models: TinyModels, stages: Path) -> None:
    run_to_end(tiny_config(tiny_models, stages / "run", told(stages, steps=1)))
    options = ("--scored", "scored.parquet", "--out", str(stages / "student"))
    stage(stages, "train", *options)
    trained = (stages / "student" / "model.safetensors").read_bytes()
    assert trained == student_bytes(stages / "run")


def test_scores_behind_another_context_are_not_trained_on(stages: Path) -> None:
    options = ("--scored", "scored.parquet", "--out", str(stages / "student"))
    other = 'scoring.context={user: "{{ row.hint }}"}'
    for change in (other, "scoring.context=null"):
        refused(
            *command(stages, "train", *options, change),
            words=["scored.parquet", "read another context than scoring.context"],
        )
    assert not (stages / "student").exists()


def test_rollouts_get_the_context_of_the_config_that_scores_them(
    tiny_models: TinyModels, stages: Path
) -> None:
    """Whatever context the file was sampled with: it is the config's that the teacher reads."""
    plain = tiny_values(tiny_models, stages / "other", told(stages, steps=1))
    del plain["scoring"]["context"]
    (stages / "plain").mkdir()
    write_config(stages / "plain" / "config.yaml", plain)
    stage(stages / "plain", "generate", "--out", "rollouts.parquet")
    without = read_rollouts(stages / "plain" / "rollouts.parquet")
    assert all(rollout.prompt.teacher_ids is None for _, rollout in without)
    shutil.copy(stages / "plain" / "rollouts.parquet", stages / "given.parquet")
    stage(stages, "score", "--rollouts", "given.parquet", "--out", "again.parquet")
    for (_, one), (_, other) in zip(
        read_scored(stages / "scored.parquet"), read_scored(stages / "again.parquet"), strict=True
    ):
        assert one.score.logprobs.tolist() == other.score.logprobs.tolist()
    shutil.copy(stages / "rollouts.parquet", stages / "plain" / "given.parquet")
    stage(stages / "plain", "score", "--rollouts", "given.parquet", "--out", "scored.parquet")
    for _, item in read_scored(stages / "plain" / "scored.parquet"):
        assert item.rollout.prompt.teacher_ids is None


def test_rollouts_of_other_prompts_have_no_context(stages: Path) -> None:
    (stages / "rows.jsonl").write_text(json.dumps(ROWS[0] | {"prompt": "another?"}) + "\n")
    score = ("--rollouts", "rollouts.parquet", "--out", "again.parquet")
    refused(*command(stages, "score", *score), words=["rollouts.parquet", "rows.jsonl:"])


def test_an_offline_run_scores_a_files_rollouts_again_behind_its_own_context(
    tiny_models: TinyModels, stages: Path
) -> None:
    changes = told(stages, **{"pipeline": {"kind": "offline"}})
    changes["rollouts"] = {"source": "file", "file": str(stages / "scored.parquet")}
    changes |= {"steps": 1}

    def scores(name: str, context: Values | None) -> list[list[float]]:
        config = tiny_config(tiny_models, stages / name, changes | {"scoring.context": context})
        run_to_end(config)
        items = saved(config)
        assert all((i.rollout.prompt.teacher_ids is None) == (context is None) for i in items)
        return [item.score.logprobs.tolist() for item in items]

    kept = [item.score.logprobs.tolist() for _, item in read_scored(stages / "scored.parquet")]
    assert scores("kept", CONTEXT) == kept
    assert scores("untold", None) != kept
    assert scores("other", {"user": "{{ row.hint }}"}) != kept


def test_a_swapped_context_in_a_file_is_seen(stages: Path) -> None:
    """The mutation: each rollout has the context of another row."""
    rows = read_scored(stages / "scored.parquet")
    contexts = [item.rollout.prompt.teacher_ids for _, item in rows]
    table = pq.read_table(stages / "scored.parquet")
    place = table.schema.names.index("teacher_prompt_ids")
    swapped = table.column(place).to_pylist()[::-1]
    assert swapped != [ids.tolist() for ids in contexts if ids is not None]
    column = pa.array(swapped, table.schema.types[place])
    changed = table.set_column(place, table.schema.field(place), column)
    pq.write_table(changed, stages / "x.parquet")
    options = ("--scored", "x.parquet", "--out", str(stages / "student"))
    refused(*command(stages, "train", *options), words=["read another context"])


# --- Before anything is computed ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({"user": "{{ row.hnt }}"}, ["rows.jsonl:0", "'hnt'", "did you mean 'hint'", "'prompt'"]),
        ({"user": "x" * 1100}, ["rows.jsonl:0", "context of 1024 tokens", "max_new_tokens=8"]),
        ({"user": "{{ prompt"}, ["scoring.context.user", "syntax error"]),
    ],
)
def test_a_context_that_cannot_be_is_refused_before_the_run(
    tiny_models: TinyModels, tmp_path: Path, context: Values, words: list[str]
) -> None:
    values = tiny_values(
        tiny_models, tmp_path / "run", told(tmp_path, **{"scoring.context": context})
    )
    file = write_config(tmp_path / "config.yaml", values)
    refused("run", "--config", file, words=words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    refused("config", "check", "--config", file, words=words)


def test_the_check_of_a_config_shows_what_the_teacher_reads(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    values = tiny_values(tiny_models, tmp_path / "run", told(tmp_path))
    checked = call_cli("config", "check", "--config", write_config(tmp_path / "c.yaml", values))
    shown = "  | <|user|>Know: a<|end|><|user|>q0? It is 0.<|end|><|assistant|>"
    assert checked.out.splitlines()[-3:-1] == ["the teacher reads instead:", shown]


@pytest.mark.parametrize("name", ["score", "train"])
def test_a_stage_by_itself_has_no_student_to_follow(stages: Path, name: str) -> None:
    options = {
        "score": ("--rollouts", "rollouts.parquet", "--out", "x.parquet"),
        "train": ("--scored", "scored.parquet", "--out", str(stages / "student")),
    }[name]
    follow = ("scoring.model=student", "scoring.refresh={kind: ema, decay: 0.9}")
    refused(*command(stages, name, *options, *follow), words=["refresh.kind=ema", "this stage"])
