"""A user's mistake ends in one message: what is wrong, where, and what was expected."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from qwen3_distill.data.rollout_files import read_scored
from qwen3_distill.errors import ConfigError
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from tests.pipeline.builders import (
    EVALUATION,
    FULL,
    LORA,
    SAMPLED,
    TASK_REWARD,
    TOP_K,
    RecordingReporter,
    call_cli,
    raise_warning,
    read_json,
    refused,
    run_to_end,
    same_result,
    timeless,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import CONTEXT_LENGTH, EOS_ID, TinyModels, byte_tokenizer, write_model

FILE_PROMPTS = {"kind": "jsonl", "path": "none.jsonl"}
MATH = {"kind": "math"}

# --- The config -----------------------------------------------------------------------------------


def refused_run(
    models: TinyModels, tmp_path: Path, changes: dict[str, Any], words: list[str], code: int = 2
) -> str:
    """Run a config with changes, assert that it is refused, and return the message."""
    config = write_config(tmp_path / "c.yaml", tiny_values(models, tmp_path / "run", changes))
    return refused("run", "--config", config, words=words, code=code)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"step": 3}, ["step:", "unknown key", "`steps`"], id="unknown"),
        pytest.param(
            {"training.optimizer.learningrate": 1e-3},
            ["training.optimizer.learningrate: unknown key", "`learning_rate`"],
            id="unknown-nested",
        ),
        pytest.param(
            {"objective": SAMPLED | {"kl_baseline": {"kind": "top_k", "kk": 3}}},
            ["objective.kl_baseline.kk: unknown key", "`k`"],
            id="unknown-inside-unions",
        ),
        pytest.param(
            {"objective": SAMPLED | {"temprature_zzz": 1}},
            ["objective.temprature_zzz: unknown key", "known keys here", "ratio_cap"],
            id="unknown-without-a-neighbour",
        ),
        pytest.param({"steps": "3"}, ["steps: ", "integer", "'3'", "str"], id="type"),
        pytest.param({"steps": 0}, ["steps: ", "greater than or equal to 1", "0"], id="range"),
        pytest.param(
            {"objective": TOP_K | {"k": 2.5}}, ["objective.k: ", "integer", "2.5"], id="type-nested"
        ),
        pytest.param(
            {"objective": {"kind": "topk"}},
            ["objective.kind: 'topk'", "sampled_reverse_kl", "did you mean top_k"],
            id="kind",
        ),
        pytest.param({"objective": {}}, ["objective: ", "`kind`"], id="no-kind"),
        pytest.param({"objective": "full"}, ["objective: ", "'full'"], id="not-a-section"),
        pytest.param(
            {"logging": {"trackers": [{"kind": "wandb", "projct": "x"}]}},
            ["logging.trackers.0.projct", "`project`", "logging.trackers.0.project: missing"],
            id="inside-a-list",
        ),
    ],
)
def test_wrong_keys_and_values_are_named_with_what_was_expected(
    changes: dict[str, Any], words: list[str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    refused_run(tiny_models, tmp_path, changes, words)
    assert not (tmp_path / "run").exists()


def test_missing_key_is_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    values = tiny_values(tiny_models, tmp_path / "run")
    del values["steps"], values["student"]["model"]
    config = write_config(tmp_path / "c.yaml", values)
    message = refused("run", "--config", config, words=["steps: missing", "student.model: missing"])
    assert str(config) in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"objective": FULL | {"divergence": "jsd"}}, ["beta", "jsd"], id="no-beta"),
        pytest.param({"objective": FULL | {"beta": 0.5}}, ["beta=0.5", "reverse_kl"], id="beta"),
        pytest.param(
            {"objective": TOP_K | {"k": 1, "tail": "renormalize"}},
            ["k=1", "gradient is zero", "tail=bin"],
            id="renormalized-top-1",
        ),
        pytest.param({"sampling.top_p": 0.9}, ["top_p=0.9", "no gradient", "top_p=1"], id="top_p"),
        pytest.param({"sampling.top_k": 5}, ["top_k=5", "top_k=0"], id="top_k"),
        pytest.param(
            {"sampling.temperature": 0.7, "objective": SAMPLED | {"ratio_cap": None}},
            ["ratio_cap=null", "temperature=0.7", "biased"],
            id="temperature-without-ratio",
        ),
        pytest.param(
            {"objective": SAMPLED | {"discount": 0.5, "kl_baseline": {"kind": "full"}}},
            ["discount=0.5", "kl_baseline.kind=full", "cancel"],
            id="discounted-baseline",
        ),
        pytest.param(
            {"sampling.temperature": 0.7, "objective": SAMPLED | {"discount": 0.5}},
            ["temperature=0.7", "discount=0.5", "biased"],
            id="tempered-discount",
        ),
        pytest.param(
            {"prompts": {"kind": "task", "split": "eval"}, "evaluation": EVALUATION},
            ["prompts.split", "'eval'", "held out"],
            id="evaluation-on-training-problems",
        ),
        pytest.param(
            TASK_REWARD | {"verifier": None}, ["task_reward_weight", "`verifier`"], id="no-verifier"
        ),
        pytest.param(
            TASK_REWARD | {"samples_per_prompt": 1},
            ["task_reward_weight", "samples_per_prompt=1", "2 or more"],
            id="no-group",
        ),
        pytest.param(
            {"prompts": FILE_PROMPTS, "verifier": {"kind": "task"}},
            ["verifier: ", "prompts of kind `task`"],
            id="task-verifier",
        ),
        pytest.param({"verifier": MATH}, ["verifier: ", "answer_field"], id="math-verifier"),
        pytest.param(
            {"prompts": FILE_PROMPTS, "verifier": MATH},
            ["verifier: ", "reference answer", "set answer_field"],
            id="no-references",
        ),
        pytest.param(
            {"prompts": FILE_PROMPTS, "verifier": {"kind": "exact"}},
            ["verifier: ", "the exact verifier", "set answer_field"],
            id="exact-without-references",
        ),
        pytest.param(
            {"verifier": {"kind": "choice"}},
            ["verifier: ", "a choice verifier", "answer_field"],
            id="choice-verifier",
        ),
        pytest.param(
            {"verifier": {"kind": "regex", "pattern": "a("}},
            ["verifier", "no regular expression", "correct it"],
            id="regex",
        ),
        pytest.param(
            {"verifier": {"kind": "python", "function": "f"}},
            ["verifier", "path/to/file.py:name"],
            id="python-function",
        ),
        pytest.param(
            {"evaluation": EVALUATION | {"verifier": MATH}},
            ["evaluation: ", "answer_field"],
            id="evaluation-math-verifier",
        ),
        pytest.param(
            {"generation": {"kind": "vllm"}, "training.tuning": LORA | {"rank": 513}},
            ["tuning.rank=513", "vLLM's limit of 512", "adapters=merge"],
            id="lora-rank",
        ),
        pytest.param(
            {
                "generation": {"kind": "vllm", "engine_arguments": {"max_lora_rank": 8}},
                "training.tuning": LORA | {"rank": 9},
            },
            ["tuning.rank=9", "vLLM's limit of 8"],
            id="lora-rank-of-the-engine",
        ),
        pytest.param(
            {"evaluation": EVALUATION | {"prompts": FILE_PROMPTS}},
            ["evaluation: ", "prompts of kind `task`"],
            id="evaluation-task-verifier",
        ),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(
    changes: dict[str, Any], words: list[str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    refused_run(tiny_models, tmp_path, changes, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("steps: [1", ["not valid YAML", "line"], id="syntax"),
        pytest.param("- 1\n- 2", ["expected a mapping", "list"], id="list"),
        pytest.param("", ["expected a mapping"], id="empty"),
        pytest.param("steps: 2020-01-01", ["steps", "integer", "'2020-01-01'"], id="date"),
        pytest.param("steps: !!python/object:os.system {}", ["not valid YAML"], id="object"),
    ],
)
def test_file_that_is_no_config_is_refused(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    refused("run", "--config", file, words=["broken.yaml"] + [w for w in words if w != "steps"])


def test_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused("run", "--config", tmp_path / "no.yaml", words=["no.yaml", "does not exist"])
    refused("run", "--config", tmp_path, words=[str(tmp_path), "cannot be read"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", ["'steps'", "key.sub=value"]),
        ("=3", ["'=3'", "key.sub=value"]),
        ("steps.more=3", ["'steps.more=3'", "steps is 4", "not a section"]),
        ("stepps=3", ["stepps: unknown key", "`steps`"]),
        ("steps=[", ["override 'steps=['", "not valid YAML"]),
        ("logging.trackers.0.kind=wandb", ["logging.trackers"]),
    ],
)
def test_wrong_overrides_are_refused(
    override: str, words: list[str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, tmp_path / "run"))
    refused("run", "--config", config, override, words=words)


def test_unknown_option_is_refused() -> None:
    result = call_cli("run", "--confg", "x.yaml")
    assert result.code == 2
    assert "--confg" in result.err


def test_refusal_of_a_real_process_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwen3_distill.cli.main", "run", "--config", "no.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: config file no.yaml does not exist")
    assert done.stderr.count("\n") == 1


# --- Models ---------------------------------------------------------------------------------------


def copy_of(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "changed"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def not_qwen3(model: Path) -> None:
    edit_json(model / "config.json", model_type="llama")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def torn_weights(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def garbled_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("who", ["student.model", "scoring.model"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["does not exist"]),
        (no_config, ["config.json"]),
        (garbled_config, ["config.json", "JSON"]),
        (not_qwen3, ["model_type", "'llama'", "qwen3"]),
        (no_weights, ["weights are missing"]),
        (torn_weights, ["cannot be loaded"]),
        (no_tokenizer, ["tokenizer"]),
    ],
)
def test_unusable_model_is_refused_and_leaves_the_folder_free(
    who: str,
    damage: Callable[[Path], None],
    words: list[str],
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    model = copy_of(tiny_models.student, tmp_path)
    damage(model)
    refused_run(tiny_models, tmp_path, {who: str(model)}, ["changed", *words])
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {".lock", "config.json"}


def test_corrected_config_may_use_the_folder_of_a_start_that_failed(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    refused_run(tiny_models, tmp_path, {"scoring.model": "tescher"}, ["tescher", "not exist"])
    config = tiny_config(tiny_models, tmp_path / "run", {"steps": 1})
    run_to_end(config)
    assert read_json(tmp_path / "run" / "config.json")["scoring"]["model"] == config.teacher.model


def other_template(model: Path) -> None:
    byte_tokenizer("{{ messages[0].content }}").save_pretrained(model)


def other_tokenizer(model: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(model)


def other_eos(model: Path) -> None:
    edit_json(model / "generation_config.json", eos_token_id=[EOS_ID, 0])


def other_vocabulary(model: Path) -> None:
    shutil.rmtree(model)
    write_model(model, seed=1, vocab_size=272)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_template, ["chat_template_digest", "copy one chat template"]),
        (other_tokenizer, ["tokenizer_digest", "student's tokenizer"]),
        (other_eos, ["eos_ids", "[257]", "[0, 257]", "generation_config.json"]),
        (other_vocabulary, ["vocab_size", "260", "272"]),
    ],
)
def test_teacher_that_does_not_match_is_refused_before_anything_is_sampled(
    change: Callable[[Path], None], words: list[str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    teacher = copy_of(tiny_models.teacher, tmp_path)
    change(teacher)
    words = ["do not match", str(tiny_models.student), str(teacher), *words]
    message = refused_run(tiny_models, tmp_path, {"scoring.model": str(teacher)}, words)
    named = ["chat_template_digest", "tokenizer_digest", "eos_ids", "vocab_size"]
    assert [name for name in named if f"{name}:" in message] == [words[3]]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("section", ["training", "generation", "scoring"])
def test_cuda_without_a_device_is_refused(
    section: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    words = ["device=cuda", "no CUDA device", "device=auto or cpu"]
    refused_run(tiny_models, tmp_path, {f"{section}.device": "cuda"}, words)


def test_adapters_on_unknown_layers_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    tuning = {"kind": "lora", "target_modules": ["q_proj", "wq"]}
    refused_run(tiny_models, tmp_path, {"training.tuning": tuning}, ["target_modules", "wq"])


# --- Prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("", ["no rows", "at least one prompt"], id="empty"),
        pytest.param('{"prompt": "a"}\n{"prompt"\n', ["line 2", "not valid JSON"], id="malformed"),
        pytest.param('{"prompt": "a"}\n[1]\n', ["line 2", "expected an object"], id="no-object"),
        pytest.param('{"promt": "a"}\n', ["line 1", "no field 'prompt'", "'promt'"], id="field"),
        pytest.param('{"prompt": 7}\n', ["line 1", "type int", "string"], id="type"),
        pytest.param(
            json.dumps({"prompt": "x" * CONTEXT_LENGTH}) + "\n",
            ["prompts.jsonl:0", "max_new_tokens=8", f"context of {CONTEXT_LENGTH}"],
            id="too-long",
        ),
    ],
)
def test_unusable_prompts_are_named_by_file_and_line(
    content: str, words: list[str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    prompts = {"kind": "jsonl", "path": str(file)}
    refused_run(tiny_models, tmp_path, {"prompts": prompts}, ["prompts.jsonl", *words])
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()
    assert not (tmp_path / "run" / "student").exists()


def test_missing_prompt_file_is_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    words = ["none.jsonl", "does not exist", "prompts.path"]
    refused_run(tiny_models, tmp_path, {"prompts": FILE_PROMPTS}, words)


@pytest.mark.parametrize("where", ["verifier", "evaluation"])
def test_a_function_that_cannot_be_used_is_named_before_anything_starts(
    tiny_models: TinyModels, tmp_path: Path, where: str
) -> None:
    (tmp_path / "rewards.py").write_text("def reward(row): return 1")
    verifier = {"kind": "python", "function": f"{tmp_path}/rewards.py:reward"}
    evaluation = EVALUATION | {"verifier": verifier}
    changes = {"verifier": verifier} if where == "verifier" else {"evaluation": evaluation}
    words = ["rewards.py:reward cannot be used", "a row and a response", "correct the file"]
    refused_run(tiny_models, tmp_path, changes, words)


def test_missing_held_out_problems_are_named_before_anything_starts(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    prompts = FILE_PROMPTS | {"answer_field": "answer"}
    changes = {"evaluation": EVALUATION | {"prompts": prompts, "verifier": MATH}}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    reporter = RecordingReporter()
    with pytest.raises(ConfigError, match=r"none\.jsonl does not exist"):
        run(config, reporter, raise_warning)
    assert reporter.stages == []


# --- The run folder -------------------------------------------------------------------------------


def test_folder_that_cannot_be_made_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "run")
    words = [folder, "cannot be written", "output_dir"]
    refused_run(tiny_models, tmp_path, {"output_dir": folder}, words)


def test_folder_of_another_config_is_refused_with_the_differing_keys(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path / "run", {"steps": 1}))
    before = (tmp_path / "run" / "config.json").read_bytes()
    changes = {"steps": 1, "seed": 5, "sampling.max_new_tokens": 9}
    words = ["another config", "seed: 0 -> 5", "sampling.max_new_tokens: 8 -> 9", "output_dir"]
    message = refused_run(tiny_models, tmp_path, changes, words)
    assert "training" not in message
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    many = {"steps": 1, "objective": TOP_K, "seed": 5}
    refused_run(tiny_models, tmp_path, many, ["objective.kind: ", "and 4 more"])


def test_moved_folder_is_accepted(tiny_models: TinyModels, tmp_path: Path) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path / "run", {"steps": 1}))
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = tiny_config(tiny_models, tmp_path / "moved", {"steps": 1})
    assert any("complete" in text for text in run_to_end(moved).stages)


def test_folder_in_use_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused_run(tiny_models, tmp_path, {}, [str(tmp_path / "run"), "in use", "output_dir"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_corrupt_saved_config_is_refused(
    content: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path / "run", {"steps": 1}))
    saved = tmp_path / "run" / "config.json"
    saved.write_bytes(content.encode("latin-1"))
    refused_run(tiny_models, tmp_path, {"steps": 1}, [str(saved), "restore"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["cannot be read", "line 1"]),
        ("{", ["cannot be read", "line 1"]),
        ("\xff", ["cannot be read", "utf-8"]),
        ("[]", ["expected an object", "`starts`"]),
        ("{}", ["expected an object", "`starts`"]),
        ('{"starts": null}', ["expected an object", "`starts`"]),
    ],
)
def test_damaged_manifest_is_refused_until_it_is_removed(
    content: str,
    words: list[str],
    tiny_models: TinyModels,
    tmp_path: Path,
    full_disk: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full_disk("summary.json")
    refused_run(tiny_models, tmp_path, {}, ["summary.json"])
    monkeypatch.undo()
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_bytes(content.encode("latin-1"))
    refused_run(
        tiny_models, tmp_path, {}, [str(manifest), "restore the file, or remove it", *words]
    )
    manifest.unlink()
    run_to_end(tiny_config(tiny_models, tmp_path / "run"))
    assert len(read_json(manifest)["starts"]) == 1


def test_report_of_no_run_folder_is_refused(tmp_path: Path) -> None:
    refused("report", tmp_path, words=[str(tmp_path), "not a run folder"])


# --- Failures on the way --------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes every write to paths with some text in them fail from now on."""

    def fill(text: str) -> None:
        real_write, real_write_text, real_save = os.write, Path.write_text, torch.save

        def check(path: object) -> None:
            if text in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        def write(descriptor: int, data: bytes) -> int:
            check(os.readlink(f"/proc/self/fd/{descriptor}"))
            return real_write(descriptor, data)

        def write_text(self: Path, *args: Any, **kwargs: Any) -> int:
            check(self)
            return real_write_text(self, *args, **kwargs)

        def save(state: object, path: Path) -> None:
            check(path)
            real_save(state, path)

        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(torch, "save", save)

    return fill


def test_metrics_on_a_full_disk_end_the_run(
    tiny_models: TinyModels, tmp_path: Path, full_disk: Callable[[str], None]
) -> None:
    full_disk("metrics.jsonl")
    refused_run(tiny_models, tmp_path, {}, ["metrics.jsonl", "No space left"])


@pytest.mark.parametrize("place", [".unfinished-000004", "summary.json", "report.html"])
def test_run_goes_on_after_a_full_disk(
    place: str,
    tiny_models: TinyModels,
    tmp_path: Path,
    full_disk: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_to_end(tiny_config(tiny_models, tmp_path / "reference"))
    full_disk(place)
    refused_run(tiny_models, tmp_path, {}, ["No space left", "free space", place])
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "step-000002" in saved
    assert not any(name.startswith(".unfinished") for name in saved)  # the disk has it back
    monkeypatch.undo()
    config = tiny_config(tiny_models, tmp_path / "run")
    run_to_end(config)
    assert same_result(tmp_path / "run", tmp_path / "reference")


# The file size limit makes safetensors and PyTorch fail in their own ways, with their own errors.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from qwen3_distill.cli.main import main
main()
"""


def test_model_files_that_cannot_be_written_end_in_one_message(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, tmp_path / "run"))
    command = [sys.executable, "-c", LIMITED, "65536", "run", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "checkpoints" in done.stderr
    assert "free space" in done.stderr
    assert "Traceback" not in done.stderr


def test_batch_without_a_finite_gradient_is_saved_and_named(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_batch = Parts.make_batch

    def poisoned(self: Parts, scored: Any) -> Any:
        batch = make_batch(self, scored)
        if scored[0].rollout.oldest_version.step == 2:
            # No batch can be made with NaN; the record is opened to have one in the gradient.
            object.__setattr__(batch, "task_advantages", batch.task_advantages + float("nan"))
        return batch

    monkeypatch.setattr(Parts, "make_batch", poisoned)
    words = ["step 2", "not stepped", "failed-step-000002.parquet", "learning_rate"]
    message = refused_run(tiny_models, tmp_path, {}, words, code=3)
    saved = tmp_path / "run" / "failed-step-000002.parquet"
    assert str(saved) in message
    assert [step for step, _ in read_scored(saved)] == [2] * 4
    assert [record["step"] for record in timeless(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    monkeypatch.undo()
    run_to_end(tiny_config(tiny_models, tmp_path / "run"))


def test_teacher_scores_that_are_not_finite_are_refused(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_chunk = EmbeddedTeacher._chunk_scores
    monkeypatch.setattr(
        EmbeddedTeacher,
        "_chunk_scores",
        lambda self, *inputs: tuple(part * float("nan") for part in real_chunk(self, *inputs)),
    )
    refused_run(tiny_models, tmp_path, {}, ["teacher#", "not finite"])
