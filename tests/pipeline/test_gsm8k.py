"""Word problems through the whole pipeline: template, reference answers, math verifier."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwen3_distill.config import RunConfig
from qwen3_distill.data.rollout_files import read_scored
from tests.pipeline.builders import run_to_end, timeless, tiny_config
from tests.tiny_models import TinyModels, write_model

SAMPLE = Path(__file__).parents[1] / "data" / "gsm8k_sample.jsonl"
SUFFIX = "\nEnd with \\boxed{}."
PROMPTS = {
    "kind": "jsonl",
    "path": str(SAMPLE),
    "prompt_field": "question",
    "answer_field": "answer",
    "suffix": SUFFIX,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("gsm8k")
    models = TinyModels(
        student=write_model(folder / "student", seed=0, max_position_embeddings=1024),
        teacher=write_model(folder / "teacher", seed=1, max_position_embeddings=1024),
    )
    changes = {
        "steps": 2,
        "prompts": PROMPTS,
        "verifier": {"kind": "math"},
        "evaluation": {
            "prompts": PROMPTS | {"limit": 4},
            "verifier": {"kind": "math"},
            "num_problems": 10,
            "sampling": {"max_new_tokens": 4},
        },
        "logging": {"tensorboard": False, "rollouts_every_steps": 1},
    }
    config = tiny_config(models, folder / "run", changes)
    warned: list[str] = []
    run_to_end(config, warned.append)
    assert len(warned) == 1  # it trains on the problems that it is evaluated on
    assert "4 of 4 held-out problems are also training prompts" in warned[0]
    return config


def test_prompts_are_the_questions_in_the_student_s_template(finished: RunConfig) -> None:
    lines = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    answers = {line["question"]: line["answer"] for line in lines}
    tokenizer = AutoTokenizer.from_pretrained(finished.student.model)
    rows = [
        item.rollout
        for file in sorted((finished.output_path / "rollouts").iterdir())
        for _, item in read_scored(file)
    ]
    assert len(rows) == 2 * finished.rollouts_per_step
    for rollout in rows:
        text = tokenizer.decode(rollout.prompt.token_ids)
        question = text.removeprefix("<|user|>").removesuffix(SUFFIX + "<|end|><|assistant|>")
        assert rollout.prompt.task_data == {"answer": answers[question]}


def test_random_answers_are_judged_wrong(finished: RunConfig) -> None:
    records = timeless(finished.output_path / "metrics.jsonl")
    assert [record["rollout/accuracy"] for record in records] == [0.0, 0.0]


def test_evaluation_covers_the_problems_there_are(finished: RunConfig) -> None:
    records = timeless(finished.output_path / "evaluations.jsonl")
    assert [(record["model"], record["step"]) for record in records] == [
        ("teacher", 0),
        ("student", 0),
        ("student", 2),
    ]
    assert {record["num_problems"] for record in records} == {4}
