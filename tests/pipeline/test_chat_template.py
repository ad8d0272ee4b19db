"""The work of the chat template is checked and shown before a run, and kept for the report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.pipeline.run import run
from tests.pipeline.builders import (
    EVALUATION,
    RecordingReporter,
    call_cli,
    read_json,
    run_to_end,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import CHAT_TEMPLATE, TinyModels, byte_tokenizer

THINKS = CHAT_TEMPLATE + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}"
)
PAD_ID = 256


def models_with(
    source: TinyModels, folder: Path, *, template: str | None = CHAT_TEMPLATE, eos: Any = None
) -> TinyModels:
    """Copy both models with another chat template, and other eos ids in the generation config."""
    copy = TinyModels(student=folder / "student", teacher=folder / "teacher")
    for old, new in ((source.student, copy.student), (source.teacher, copy.teacher)):
        shutil.copytree(old, new)
        (new / "chat_template.jinja").unlink(missing_ok=True)
        byte_tokenizer(template).save_pretrained(new)
        if eos is not None:
            file = new / "generation_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": eos}))
    return copy


def config_file(models: TinyModels, tmp_path: Path, **changes: Any) -> Path:
    values = tiny_values(models, tmp_path / "run", changes)
    return write_config(tmp_path / "c.yaml", values)


# --- Arguments ------------------------------------------------------------------------------------

COMMANDS = (["run"], ["config", "check"], ["generate"], ["eval"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{enable_thinking: no}", ["'no' (str)", "write enable_thinking: false, without quotes"]),
        ("{enable_thinkin: false}", ["does not read enable_thinkin", "did you mean enable_think"]),
    ],
)
def test_arguments_without_effect_are_refused_by_every_command(
    tiny_models: TinyModels, tmp_path: Path, command: list[str], arguments: str, words: list[str]
) -> None:
    models = models_with(tiny_models, tmp_path, template=THINKS)
    file = config_file(models, tmp_path, evaluation=dict(EVALUATION))
    result = call_cli(*command, "--config", file, f"student.template_arguments={arguments}")
    assert result.code == 2
    assert [word for word in words if word not in result.err] == []
    assert not (tmp_path / "run" / "prompt.json").exists()
    assert not (tmp_path / "run" / "offline").exists()


def test_an_argument_that_changes_nothing_is_noted(tiny_models: TinyModels, tmp_path: Path) -> None:
    models = models_with(tiny_models, tmp_path, template=THINKS)
    file = config_file(models, tmp_path)
    key = "student.template_arguments"
    idle = call_cli("config", "check", "--config", file, f"{key}={{enable_thinking: true}}")
    assert idle.code == 0
    assert "enable_thinking=True changes nothing in the first prompt" in idle.err
    assert "thinking: on" in idle.out
    works = call_cli("config", "check", "--config", file, f"{key}={{enable_thinking: false}}")
    assert (works.code, works.err) == (0, "")
    assert "thinking: off" in works.out


# --- What the template leaves out -----------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("limit", [5, None], ids=["a few prompts", "endless prompts"])
def test_a_template_that_renders_no_prompt_is_refused_by_every_command(
    tiny_models: TinyModels, tmp_path: Path, command: list[str], limit: int | None
) -> None:
    models = models_with(tiny_models, tmp_path, template="hello")
    prompts = {"kind": "task", "limit": limit}
    file = config_file(models, tmp_path, evaluation=dict(EVALUATION), prompts=prompts)
    result = call_cli(*command, "--config", file)
    assert result.code == 2
    assert "the student's chat template leaves out message 0 of role 'user'" in result.err
    assert not (tmp_path / "run" / "prompt.json").exists()


# --- The end of a turn ----------------------------------------------------------------------------


def test_an_end_of_turn_that_ends_no_rollout_is_noted_at_the_start_and_during_the_run(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    models = models_with(tiny_models, tmp_path, eos=PAD_ID)
    file = config_file(models, tmp_path, steps=1)
    words = [
        *("the student", "the teacher", "ends an assistant's turn with <|end|> (257)"),
        *("only <|pad|> (256) does", "eos_token_id to [256, 257] in generation_config.json"),
    ]
    for command in (
        ["config", "check"],
        ["run"],
        ["generate", "--out", str(tmp_path / "g.parquet")],
    ):
        result = call_cli(*command, "--config", file)
        assert result.code == 0
        said = result.err + result.out
        assert [word for word in words if word not in said] == []
        assert said.count("ends an assistant's turn with <|end|>") == 1  # one note for both
        cut = "rollouts of step 1 were cut at sampling.max_new_tokens=8"
        assert (cut in said) == (command == ["run"])


@pytest.mark.parametrize("eos", [257, [256, 257]])
def test_an_end_of_turn_that_ends_rollouts_is_not_noted(
    tiny_models: TinyModels, tmp_path: Path, eos: Any
) -> None:
    models = models_with(tiny_models, tmp_path, eos=eos)
    result = call_cli("config", "check", "--config", config_file(models, tmp_path))
    assert (result.code, result.err) == (0, "")


def test_a_template_that_ends_no_turn_is_noted(tiny_models: TinyModels, tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("<|end|>", "")
    models = models_with(tiny_models, tmp_path, template=template)
    result = call_cli("config", "check", "--config", config_file(models, tmp_path))
    assert result.code == 0
    assert "writes nothing after an assistant's turn" in result.err


def test_a_model_without_a_chat_template_is_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    models = models_with(tiny_models, tmp_path, template=None)
    for command in (["config", "check"], ["run"], ["generate"]):
        result = call_cli(*command, "--config", config_file(models, tmp_path))
        assert result.code == 2
        assert "no chat template" in result.err
        assert "put chat_template.jinja into its directory" in result.err


# --- Rollouts that were all cut -------------------------------------------------------------------


class _Notes(RecordingReporter):
    def note(self, text: str) -> None:
        self.stages.append(f"note: {text}")


def notes_of(models: TinyModels, folder: Path, changes: dict[str, Any]) -> list[str]:
    reporter = _Notes()
    assert run(tiny_config(models, folder, changes), reporter, lambda message: None)
    return [line for line in reporter.stages if line.startswith("note:")]


def test_steps_of_cut_rollouts_are_said_once_and_then_rarely(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    models = models_with(tiny_models, tmp_path, eos=PAD_ID)
    changes = {"steps": 10, "sampling.max_new_tokens": 1, "samples_per_prompt": 1}
    notes = notes_of(models, tmp_path / "run", changes)
    assert [("step 1 " in note, "(10 steps so far)" in note) for note in notes] == [
        (True, False),
        (False, True),
    ]


def test_an_evaluation_of_cut_answers_says_so(tiny_models: TinyModels, tmp_path: Path) -> None:
    models = models_with(tiny_models, tmp_path, eos=PAD_ID)
    sampling = {"max_new_tokens": 1}
    changes = {"steps": 1, "evaluation": EVALUATION | {"sampling": sampling, "teacher": True}}
    notes = "\n".join(notes_of(models, tmp_path / "run", changes))
    assert "all answers of this evaluation (teacher) were cut" in notes
    assert notes.count("all answers of this evaluation (student)") == 2


def test_steps_in_which_a_rollout_ended_are_not(tiny_models: TinyModels, tmp_path: Path) -> None:
    models = models_with(tiny_models, tmp_path, eos=list(range(257)))  # any token may end it
    changes = {"steps": 2, "sampling.max_new_tokens": 8}
    assert notes_of(models, tmp_path / "run", changes) == []


# --- The record -----------------------------------------------------------------------------------


def test_the_prompt_is_kept_in_the_run_folder_and_shown_in_the_report(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", {"steps": 1})
    run_to_end(config)
    record = read_json(config.output_path / "prompt.json")
    assert record["prompt_id"] == "train-0-0"
    assert record["pieces"][0] == ["<|user|>", 258]
    assert record["pieces"][-1] == ["<|assistant|>", 259]
    assert record["end_of_turn"]["token"] == {"token_id": 257, "text": "<|end|>"}
    assert record["end_tokens"] == [{"token_id": 257, "text": "<|end|>"}]
    checked = call_cli("config", "check", "--config", config.output_path / "config.json")
    assert f"tokens: {record['num_tokens']}" in checked.out
    assert "  | <|user|>" in checked.out
    page = (config.output_path / "report.html").read_text()
    assert "First prompt" in page
    assert "&lt;|assistant|&gt; (259) x 1" in page
