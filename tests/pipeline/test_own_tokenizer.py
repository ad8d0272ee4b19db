"""Runs with a teacher that has a tokenizer and a chat template of its own, on tiny models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_distill.data.rollout_files import read_training
from qwen3_distill.errors import DataError, HandshakeError
from qwen3_distill.modeling.loading import load_tokenizer
from qwen3_distill.pipeline.assembly.views import build_view
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.scoring import aligned_view
from qwen3_distill.scoring.aligned_view import AlignedView
from qwen3_distill.types import (
    AlignedRollout,
    Prompt,
    Rollout,
    ScoredRollout,
    ScoringJob,
    TeacherScore,
    UnalignedRollout,
)
from tests.own_tokenizers import TEACHER_SPECIAL, as_fast, byte_level, rollout_of
from tests.pipeline.builders import (
    call_cli,
    run_to_end,
    student_bytes,
    timeless,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import EOS_ID, TinyModels, byte_tokenizer, write_model

OWN = {"scoring.tokenizer": "own"}
MERGES = [(bytes([a]), bytes([b])) for a in range(48, 58) for b in range(48, 58)]
"""Every pair of digits."""
TEMPLATE = (
    "<s>{% for message in messages %}"
    "{{ '<|user|>Question: ' if message.role == 'user' else '<|assistant|>' }}"
    "{{ message.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def pair(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """The tiny student, and a teacher whose tokenizer merges digits and names other tokens."""
    directory = tmp_path_factory.mktemp("other") / "teacher"
    tokenizer = byte_level(MERGES, special=TEACHER_SPECIAL)
    end = tokenizer.token_to_id("<|eot|>")
    size = tokenizer.get_vocab_size()
    write_model(directory, seed=5, vocab_size=size, eos_token_id=end, pad_token_id=None)
    as_fast(tokenizer, eos="<|eot|>", chat_template=TEMPLATE).save_pretrained(directory)
    return TinyModels(student=tiny_models.student, teacher=directory)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "metrics.jsonl")


@pytest.mark.parametrize("kind", ["sequential", "streaming"])
def test_a_run_trains_on_spans(pair: TinyModels, tmp_path: Path, kind: str) -> None:
    pipeline = {"kind": kind} | ({"max_staleness_steps": 2} if kind == "streaming" else {})
    changes = {**OWN, "pipeline": pipeline, "sampling.max_new_tokens": 24}
    folder = tmp_path / "run"
    run_to_end(tiny_config(pair, folder, changes))
    for step in steps_of(folder):
        assert np.isfinite(step["loss/reverse_kl_nats"])
        assert step["score/tokens_per_span"] >= 1
        assert step["tokens/unaligned"] > 0  # the student samples special tokens at random
        assert step["tokens/trained"] + step["tokens/unaligned"] <= step["tokens/generated"]
    saved = sorted((folder / "rollouts").glob("*.parquet"))
    assert saved
    items = [item for file in saved for _, item in read_training(file, vocab_size=None)]
    assert items
    assert not any(isinstance(item, ScoredRollout) for item in items)
    facts = dict(json.loads((folder / "prompt.json").read_text())["facts"][-2:])
    assert "special token, and the teacher's" in facts
    assert "special token, and the teacher&#39;s" in (folder / "report.html").read_text()


def test_the_same_teacher_gives_the_same_run_bit_for_bit(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    for name, changes in (("same", {}), ("own", OWN)):
        run_to_end(tiny_config(tiny_models, tmp_path / name, changes))
    same, own = (timeless(tmp_path / name / "metrics.jsonl") for name in ("same", "own"))
    for before, after in zip(same, own, strict=True):
        of_spans = {"tokens/unaligned": 0, "score/tokens_per_span": 1}
        assert after == before | of_spans
    assert student_bytes(tmp_path / "same") == student_bytes(tmp_path / "own")


def test_without_the_key_another_tokenizer_is_refused_and_the_key_named(
    pair: TinyModels, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(pair, tmp_path / "run"))
    result = call_cli("run", "--config", config)
    assert result.code == 2
    assert "scoring.tokenizer=own" in result.err


def test_config_check_lists_the_mapping(pair: TinyModels, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(pair, tmp_path / "run", OWN))
    result = call_cli("config", "check", "--config", config)
    assert result.code == 0, result.err
    eot = load_tokenizer(pair.teacher).convert_tokens_to_ids("<|eot|>")
    assert f"<|end|> (257) -> <|eot|> ({eot})" in result.out
    assert "no counterpart, what follows is dropped: <|pad|>" in result.out


def test_config_check_refuses_a_name_that_is_no_token(pair: TinyModels, tmp_path: Path) -> None:
    changes = {**OWN, "scoring.special_tokens": {"<|end|>": "<nope>"}}
    config = write_config(tmp_path / "c.yaml", tiny_values(pair, tmp_path / "run", changes))
    result = call_cli("config", "check", "--config", config)
    assert result.code == 2
    assert "'<nope>', which is no added token of the teacher" in result.err
    assert not (tmp_path / "run").exists()


def test_a_context_that_the_teachers_prompts_do_not_fit_is_refused(
    pair: TinyModels, tmp_path: Path
) -> None:
    changes = {**OWN, "sampling.max_new_tokens": 1000, "prompts": {"kind": "task", "limit": 5}}
    config = write_config(tmp_path / "c.yaml", tiny_values(pair, tmp_path / "run", changes))
    result = call_cli("config", "check", "--config", config)
    assert result.code == 2
    assert "the teacher's context is 1024" in result.err


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            TEMPLATE.replace("messages %}", "messages if message.role == 'user' %}", 1),
            "the teacher's chat template leaves out message 0 of role 'system'",
        ),
        ("{{ raise_exception('no system here') }}", "no system here"),
    ],
)
@pytest.mark.parametrize("command", [("run",), ("config", "check")])
def test_a_template_that_does_not_render_the_prompts_is_refused_before_the_run(
    pair: TinyModels, tmp_path: Path, template: str, reason: str, command: tuple[str, ...]
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(pair.teacher, teacher)
    (teacher / "chat_template.jinja").write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1?"}) + "\n" for n in range(3)))
    prompts = {"kind": "jsonl", "path": str(rows), "prompt_field": "prompt", "system": "Be brief."}
    changes = {**OWN, "scoring.model": str(teacher), "prompts": prompts}
    config = write_config(tmp_path / "c.yaml", tiny_values(pair, tmp_path / "run", changes))
    result = call_cli(*command, "--config", config)
    assert result.code == 2, result.out
    assert reason in result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("command", ["score", "train"])
def test_offline_stages_refuse_it(pair: TinyModels, tmp_path: Path, command: str) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(pair, tmp_path / "run", OWN))
    options = {"score": "--rollouts", "train": "--scored"}
    out = tmp_path / "out"
    result = call_cli(command, "--config", config, options[command], "x.parquet", "--out", out)
    assert result.code == 2
    assert f"scoring.tokenizer=own with the command `{command}`" in result.err
    assert not out.exists()


def test_the_doctor_takes_a_step_on_spans(pair: TinyModels, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        tiny_values(pair, tmp_path / "run", {**OWN, "sampling.max_new_tokens": 16}),
    )
    result = call_cli("doctor", "--config", config)
    assert "special tokens" in result.out
    assert "<|end|> (257) -> <|eot|>" in result.out
    lines = [line.strip() for line in result.out.splitlines()]
    failed = [line for line in lines if line.startswith("fail")]
    assert [line.split("  ")[1] for line in failed] == ["teacher has its weights"]  # it is random
    assert any(line.startswith("pass  learner against engine") for line in lines)
    assert any(line.startswith("pass  rollouts after a step") for line in lines)


# --- The view -------------------------------------------------------------------------------------


def view_of(pair: TinyModels, tmp_path: Path, **changes: Any) -> AlignedView:
    given = {f"scoring.{key}": value for key, value in changes.items()}
    view = build_view(tiny_config(pair, tmp_path / "run", {**OWN, **given}))
    assert isinstance(view, AlignedView)
    return view


def with_messages(text: str, **changes: Any) -> Rollout:
    """A rollout of the tiny student: a token a byte, and its end of turn."""
    rollout = rollout_of([*byte_tokenizer()(text)["input_ids"], EOS_ID])
    prompt = Prompt(prompt_id="p", token_ids=np.array([1, 2]), messages=(("user", "6 x 7?"),))
    return replace(rollout, **({"prompt": prompt} | changes))


def test_a_job_is_the_teachers_prompt_and_its_tokens_of_the_answer(
    pair: TinyModels, tmp_path: Path
) -> None:
    view, tokenizer = view_of(pair, tmp_path), load_tokenizer(pair.teacher)
    rollout = with_messages("it is 42")
    job = view.job(rollout)
    assert isinstance(job, ScoringJob)
    text = tokenizer.decode(job.token_ids.tolist())
    assert text == "<s><|user|>Question: 6 x 7?<|eot|><|assistant|>it is 42<|eot|>"
    assert tokenizer.decode(job.token_ids[job.scored_indices].tolist()) == "it is 42<|eot|>"
    logprobs = -np.arange(1, job.num_scored + 1, dtype=np.float32)
    item = view.scored(rollout, TeacherScore(teacher_id="t", logprobs=logprobs))
    assert isinstance(item, AlignedRollout)
    assert item.score.span_tokens.tolist() == [1] * 6 + [2, 1]  # the pair of digits is one token
    assert item.score.logprobs.tolist() == (-np.arange(1, 9)).tolist()
    again = view.scored(rollout, TeacherScore(teacher_id="t", logprobs=logprobs))
    assert item.score.logprobs.tolist() == again.score.logprobs.tolist()  # pyright: ignore


def test_several_tokens_of_the_teacher_in_a_span_are_summed(
    tiny_models: TinyModels, pair: TinyModels, tmp_path: Path
) -> None:
    swapped = TinyModels(student=pair.teacher, teacher=tiny_models.student)
    view, tokenizer = view_of(swapped, tmp_path), load_tokenizer(pair.teacher)
    ids = tokenizer("a42b", add_special_tokens=False)["input_ids"]
    rollout = replace(rollout_of(ids), prompt=with_messages("").prompt)
    job = view.job(rollout)
    assert isinstance(job, ScoringJob)
    item = view.scored(
        rollout, TeacherScore(teacher_id="t", logprobs=np.array([-1.0, -2.0, -4.0, -8.0]))
    )
    assert isinstance(item, AlignedRollout)
    assert item.score.span_tokens.tolist() == [1, 1, 1]
    assert item.score.logprobs.tolist() == [-1.0, -6.0, -8.0]


def test_what_cannot_be_scored_is_said(pair: TinyModels, tmp_path: Path) -> None:
    view = view_of(pair, tmp_path)
    pad = with_messages("", response_ids=np.array([256]))
    assert isinstance(view.job(pad), UnalignedRollout)
    long = rollout_of(list(b"a" * 1020))
    long = replace(long, prompt=pad.prompt)
    job = view.job(long)
    assert isinstance(job, UnalignedRollout)
    assert "the teacher's context is 1024" in job.reason
    with pytest.raises(DataError, match="a piece of an answer"):
        view.job(replace(long, continues_at=3))
    with pytest.raises(DataError, match="needs the messages"):
        view.job(rollout_of([65]))


def test_jobs_of_many_rollouts_are_in_their_order(
    pair: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligned_view, "_TOGETHER", 2)  # and a rest
    view = view_of(pair, tmp_path)
    pad = with_messages("", response_ids=np.array([256]))
    rollouts = [with_messages("it is 42"), pad, with_messages("42"), pad, with_messages("no")]
    rollouts = [replace(one, rollout_id=str(number)) for number, one in enumerate(rollouts)]
    jobs = view.jobs(rollouts)
    assert [job.rollout_id for job in jobs] == list("01234")
    for rollout, job in zip(rollouts, jobs, strict=True):
        alone = view.job(rollout)
        assert isinstance(job, ScoringJob) == isinstance(alone, ScoringJob)
        if isinstance(job, ScoringJob) and isinstance(alone, ScoringJob):
            assert job.token_ids.tolist() == alone.token_ids.tolist()
            assert job.scored == alone.scored


def test_a_servers_longest_sequence_is_the_teachers_context(
    pair: TinyModels, tmp_path: Path
) -> None:
    served = {"kind": "vllm", "model": str(pair.teacher), "tokenizer": "own"}
    for stated, expected in ((None, 1024), (64, 64), (4096, 1024)):
        scoring = served | {"max_model_tokens": stated}
        view = build_view(tiny_config(pair, tmp_path / "run", {"scoring": scoring}))
        assert isinstance(view, AlignedView)
        assert view.context_length == expected
    short = tiny_config(pair, tmp_path / "run", {"scoring": served | {"max_model_tokens": 24}})
    job = build_view(short).job(with_messages("a" * 20))
    assert isinstance(job, UnalignedRollout)
    assert "the teacher's context is 24" in job.reason


def test_special_tokens_of_the_same_tokenizer_are_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    with pytest.raises(HandshakeError, match="have the same tokenizer"):
        view_of(tiny_models, tmp_path, special_tokens={"<|end|>": "<|end|>"})
