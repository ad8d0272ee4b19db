"""A trained student is read as the same model by both generations of transformers."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib.student_readers import TEXT, Reading, logits_here, read_with
from qwen3_distill.config import (
    EmbeddedTraining,
    FullTuning,
    LoraTuning,
    OptimizerConfig,
    SampledReverseKL,
)
from qwen3_distill.training.embedded.student import EmbeddedLearner, build_embedded_learner
from qwen3_distill.training.settings import LearnerSettings
from tests.engines import INSTALLED
from tests.tiny_models import CHAT_TEMPLATE, EOS_ID, write_model
from tests.unit.training.test_learner import batch_of

THETA = 1_000_000.0
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
PLAIN = {"rope_type": "default"}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<|pad|>",
    "eos_token": "<|end|>",
    "additional_special_tokens": ["<|user|>", "<|assistant|>"],
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


@dataclass(frozen=True)
class Case:
    """A source: in one generation's spelling, tied or not, with a rotary embedding."""

    old_spelling: bool
    tied: bool
    rope: dict[str, Any]
    lora: bool


CASES = [
    Case(old_spelling=True, tied=True, rope=PLAIN, lora=False),
    Case(old_spelling=True, tied=False, rope=YARN, lora=True),
    Case(old_spelling=False, tied=False, rope=PLAIN, lora=True),
    Case(old_spelling=False, tied=True, rope=YARN, lora=False),
]


def write_source(directory: Path, case: Case) -> Path:
    rope = {**case.rope, "rope_theta": THETA}
    write_model(directory, seed=3, tie_word_embeddings=case.tied, rope_parameters=rope)
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    if case.old_spelling:
        file = directory / "config.json"
        config = json.loads(file.read_text())
        for key in ("rope_parameters", "dtype", "layer_types"):
            del config[key]
        scaling = None if case.rope == PLAIN else case.rope
        config |= {"rope_theta": THETA, "rope_scaling": scaling, "torch_dtype": "float32"}
        file.write_text(json.dumps(config))
    return directory


def trained(source: Path, *, lora: bool) -> EmbeddedLearner:
    """A learner after one large step, so that the student is another model than its source."""
    settings = LearnerSettings(
        model_dir=source,
        training=EmbeddedTraining(
            kind="embedded",
            device="cpu",
            tuning=LoraTuning(kind="lora", rank=4, alpha=8) if lora else FullTuning(kind="full"),
            optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
        objective=SampledReverseKL(kind="sampled_reverse_kl"),
        total_steps=1,
        seed=0,
    )
    learner = build_embedded_learner(settings)
    asyncio.run(learner.update(batch_of(4)))
    return learner


@dataclass(frozen=True)
class Saved:
    """Saved students, one of each case, and what their learners compute."""

    directories: list[Path]
    learners: list[EmbeddedLearner]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("students")
    students, learners = list[Path](), list[EmbeddedLearner]()
    for number, case in enumerate(CASES):
        source = write_source(folder / f"source-{number}", case)
        learners.append(trained(source, lora=case.lora))
        students.append(folder / f"student-{number}")
        asyncio.run(learners[-1].save_student(students[-1]))
    return Saved(students, learners)


def test_the_saved_student_computes_what_its_learner_computes(saved: Saved) -> None:
    for directory, learner in zip(saved.directories, saved.learners, strict=True):
        ids, logits_TV = logits_here(directory)
        core: Any = learner.student.core
        with torch.no_grad():
            expected_TV = core.eval()(torch.tensor([ids])).logits[0]
        assert len(ids) == len(TEXT.encode())
        assert (logits_TV - expected_TV).abs().max() < 1e-4


def check_reading(directory: Path, reading: Reading) -> None:
    ids, logits_TV = logits_here(directory)
    assert reading.facts == {
        "ids": ids,
        "chat": f"<|user|>{TEXT}<|end|>",
        "dtype": "float32",
        "rope_theta": THETA,
        "eos_token_id": EOS_ID,
        "missing": [],
    }
    assert (reading.logits_TV - logits_TV).abs().max() < 1e-4


@pytest.mark.transformers4
def test_transformers_4_reads_the_same_student(saved: Saved) -> None:
    readings = read_with(INSTALLED.python["transformers4"], saved.directories)
    for directory, reading in zip(saved.directories, readings, strict=True):
        assert reading.transformers.startswith("4.57.")
        check_reading(directory, reading)


@pytest.mark.transformers4
def test_transformers_4_would_read_another_model_from_one_spelling(saved: Saved) -> None:
    """The comparison sees the fault: without the older names the base is 10,000."""
    directory = saved.directories[0]
    file = directory / "config.json"
    whole = file.read_text()
    config = json.loads(whole)
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        del config[key]
    try:
        file.write_text(json.dumps(config))
        (reading,) = read_with(INSTALLED.python["transformers4"], [directory])
    finally:
        file.write_text(whole)
    assert reading.facts["rope_theta"] == 10_000.0
    assert (reading.logits_TV - logits_here(directory)[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("vllm", marks=pytest.mark.vllm),
        pytest.param("sglang", marks=pytest.mark.sglang),
    ],
)
def test_the_engines_own_transformers_reads_the_same_student(saved: Saved, engine: str) -> None:
    readings = read_with(INSTALLED.python[engine], saved.directories)
    for directory, reading in zip(saved.directories, readings, strict=True):
        check_reading(directory, reading)
