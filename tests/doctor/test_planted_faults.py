"""Each planted fault makes its line of the doctor's table fail, and no other line."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_distill.doctor import real_pass
from qwen3_distill.pipeline.finding import Status
from qwen3_distill.pipeline.parts import Parts
from tests.doctor import faulty
from tests.doctor.worlds import World, by_name, good_rows, make_world, with_status

CONTEXT = 1024


@dataclass(frozen=True)
class Planted:
    """A fault and the one line that it must fail."""

    fault: str
    line: str
    plant: Callable[[World, pytest.MonkeyPatch], None]


def _tokenizer(world: World, patch: pytest.MonkeyPatch) -> None:
    file = world.teacher / "tokenizer.json"
    values = json.loads(file.read_text())
    vocab = values["model"]["vocab"]
    one, other = (next(word for word, id_ in vocab.items() if id_ == wanted) for wanted in (40, 41))
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(values))


def _vocabulary(world: World, patch: pytest.MonkeyPatch) -> None:
    world.edit_json(world.teacher / "config.json", vocab_size=272)
    file = world.teacher / "model.safetensors"
    weights = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = 272 - len(weights[name])
        weights[name] = torch.cat([weights[name], weights[name][:rows]])
    save_file(weights, file, metadata={"format": "pt"})


def _chat_template(world: World, patch: pytest.MonkeyPatch) -> None:
    file = world.teacher / "tokenizer_config.json"
    template = json.loads(file.read_text())["chat_template"]
    world.edit_json(file, chat_template="{# other #}" + template)


def _other_stop(world: World, patch: pytest.MonkeyPatch) -> None:
    world.edit_json(world.teacher / "generation_config.json", eos_token_id=[257, 256])


def _unended_turn(world: World, patch: pytest.MonkeyPatch) -> None:
    for model in (world.student, world.teacher):
        world.edit_json(model / "generation_config.json", eos_token_id=[256])


def _random_teacher(world: World, patch: pytest.MonkeyPatch) -> None:
    file = world.teacher / "model.safetensors"
    weights = load_file(file)
    for tensor in weights.values():
        if tensor.ndim == 2:
            tensor.normal_(std=0.02)
    save_file(weights, file, metadata={"format": "pt"})


def _engine(make: Callable[[object], object]) -> Callable[[World, pytest.MonkeyPatch], None]:
    return _replacing("engine", make)


def _teacher(make: Callable[[object], object]) -> Callable[[World, pytest.MonkeyPatch], None]:
    return _replacing("teacher", make)


def _replacing(
    part: str, make: Callable[[object], object]
) -> Callable[[World, pytest.MonkeyPatch], None]:
    def adapt(parts: Parts) -> Parts:
        return replace(parts, **{part: make(getattr(parts, part))})  # type: ignore[arg-type]

    def plant(world: World, patch: pytest.MonkeyPatch) -> None:
        world.adapt = adapt

    return plant


def _left_process(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(real_pass, "END_PATIENCE_S", 0.5)
    _teacher(faulty.LeavesProcess)(world, patch)


def _too_long(world: World, patch: pytest.MonkeyPatch) -> None:
    world.write_rows([*good_rows(), {"prompt": "3+" * CONTEXT, "answer": "3"}])


def _over_engine_limit(world: World, patch: pytest.MonkeyPatch) -> None:
    fake_engine(world, versions={"vllm": "0.26.0"})
    world.changes["generation.max_model_tokens"] = 90


def _words_as_answer(world: World, patch: pytest.MonkeyPatch) -> None:
    world.write_rows([*good_rows(), {"prompt": "3+4=", "answer": "a few"}])


def _full_disk(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def fake_engine(world: World, *, versions: dict[str, str]) -> None:
    """Name an interpreter for vLLM that says which packages are installed, and no more."""
    python = world.folder / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps({'python': '3.11.0', **versions})}'\n")
    python.chmod(0o755)
    world.changes["generation"] = {"kind": "vllm", "python": str(python), "dtype": "float32"}


def _old_engine(world: World, patch: pytest.MonkeyPatch) -> None:
    fake_engine(world, versions={"vllm": "0.6.1"})


def _no_interpreter(world: World, patch: pytest.MonkeyPatch) -> None:
    world.changes["generation"] = {"kind": "vllm", "python": str(world.folder / "none")}


def _little_memory(world: World, patch: pytest.MonkeyPatch) -> None:
    fake_engine(world, versions={"vllm": "0.26.0"})
    world.changes["planning"] = {"device_memory_gib": 0.5}


def _small_shared_memory(world: World, patch: pytest.MonkeyPatch) -> None:
    fake_engine(world, versions={"vllm": "0.26.0"})
    free = {True: 64, False: 2**50}
    patch.setattr(
        shutil,
        "disk_usage",
        lambda path: SimpleNamespace(free=free[Path(path) == Path("/dev/shm")]),
    )


def _no_gpu(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    world.changes["training.device"] = "cuda"


def _fp8_without_gpu(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    fake_engine(world, versions={"vllm": "0.26.0"})
    world.changes["generation.quantization"] = "fp8"


def _no_rows(world: World, patch: pytest.MonkeyPatch) -> None:
    world.rows.unlink()


def _no_weights(world: World, patch: pytest.MonkeyPatch) -> None:
    (world.teacher / "model.safetensors").unlink()


def _no_student(world: World, patch: pytest.MonkeyPatch) -> None:
    (world.student / "config.json").write_text("{")


def _anothers_folder(world: World, patch: pytest.MonkeyPatch) -> None:
    (world.folder / "run").mkdir()
    (world.folder / "run" / "thesis.tex").write_text("years of work")


PLANTED = (
    Planted("a teacher with another tokenizer", "tokenizer", _tokenizer),
    Planted("a teacher with more output rows", "vocabulary", _vocabulary),
    Planted("a teacher with another chat template", "chat template", _chat_template),
    Planted("a teacher that stops at another token", "end-of-sequence ids", _other_stop),
    Planted("a template whose end of a turn ends no rollout", "end of a turn", _unended_turn),
    Planted("a teacher with new random weights", "teacher has its weights", _random_teacher),
    Planted(
        "logprobs of another temperature",
        "learner against engine",
        _engine(faulty.OtherTemperature),
    ),
    Planted(
        "weights that are not brought into use", "rollouts after a step", _engine(faulty.Stale)
    ),
    Planted(
        "other weights than were pushed", "weights in the engine", _engine(faulty.OtherWeights)
    ),
    Planted("a rollout cut before its limit", "rollouts", _engine(faulty.NeverStops)),
    Planted(
        "a step that never arrives",
        "weights after a step",
        _replacing("learner", faulty.OtherStep),
    ),
    Planted(
        "scores that depend on the batch",
        "scores alone and in a batch",
        _teacher(faulty.BatchDependent),
    ),
    Planted("a rollout without a score", "scores", _teacher(faulty.Forgetful)),
    Planted("an engine that leaves a process", "engines end", _left_process),
    Planted("a teacher without candidates", "teacher has its weights", _teacher(faulty.Plain)),
    Planted("a prompt over the context", "prompt and answer lengths", _too_long),
    Planted("a prompt over an engine's limit", "prompt and answer lengths", _over_engine_limit),
    Planted("a reference that is no number", "reference answers", _words_as_answer),
    Planted("too little disk", "disk for the run", _full_disk),
    Planted("an engine of an old version", "engine versions", _old_engine),
    Planted("an interpreter that does not exist", "generation interpreter", _no_interpreter),
    Planted("engines that do not fit", "memory plan", _little_memory),
    Planted("a small /dev/shm", "shared memory", _small_shared_memory),
    Planted("cuda where there is none", "GPU", _no_gpu),
    Planted("FP8 without a GPU", "FP8 on this GPU", _fp8_without_gpu),
    Planted("prompts that are not there", "training prompts", _no_rows),
    Planted("a teacher without weights", "teacher files", _no_weights),
    Planted("a damaged student", "student files", _no_student),
    Planted("a run folder with another's files", "run folder", _anothers_folder),
)


@pytest.fixture(autouse=True)
def _processes_end() -> Iterator[None]:
    yield
    while faulty.LEFT:
        process = faulty.LEFT.pop()
        process.kill()
        process.wait()


def test_everything_passes_where_nothing_is_planted(tmp_path: Path) -> None:
    diagnosis = make_world(tmp_path).diagnose()
    assert with_status(diagnosis, Status.FAIL, Status.WARN) == []
    record = diagnosis.record()
    assert record["checks"] >= 20
    assert (record["failed"], record["warned"]) == (0, 0)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.fault)
def test_a_planted_fault_fails_its_line_and_no_other(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    planted.plant(world, monkeypatch)
    diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL) == [planted.line]
    assert with_status(diagnosis, Status.WARN) == []
    verdict = by_name(diagnosis)[planted.line].verdict
    assert verdict.found
    assert verdict.change
    assert not (world.folder / "run" / "student").exists()
