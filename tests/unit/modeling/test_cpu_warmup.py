"""No process shares its first call of a vector function between threads."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen3_distill.modeling import cpu_warmup
from qwen3_distill.modeling.cpu_warmup import SERIAL_ELEMENTS, settle_vector_math
from tests.tiny_models import TinyModels

ROOT = Path(__file__).parents[3]
SPLIT_FROM = 2048
"""Elements from which PyTorch may split a vector function between threads."""
COMPUTES = {"AutoModelForCausalLM", "FastLanguageModel", "Qwen3ForCausalLM", "Qwen3DecoderLayer"}


@pytest.mark.parametrize("kind", ["engine", "teacher", "learner", "known answer"])
def test_first_vector_math_of_a_process_is_serial(kind: str, tiny_models: TinyModels) -> None:
    command = [sys.executable, "-m", "tests.first_math", kind]
    done = subprocess.run(
        [*command, str(tiny_models.student), str(tiny_models.teacher)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    first = json.loads(done.stdout.splitlines()[-1])
    assert {"cos", "sin", "silu", "rsqrt", "pow"} <= first.keys()
    assert {name: size for name, size in first.items() if size >= SPLIT_FROM} == {}
    assert first["cos"] == first["sin"] == SERIAL_ELEMENTS


def test_threads_and_random_state_stay() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    settle_vector_math.cache_clear()
    settle_vector_math()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_functions_run_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(cpu_warmup, "_FUNCTIONS", (lambda values: called.append(values.numel()),))
    settle_vector_math.cache_clear()
    settle_vector_math()
    settle_vector_math()
    assert called == [SERIAL_ELEMENTS] * 3  # one per data type


def functions_that_load(tree: ast.Module) -> dict[str, set[str]]:
    """Map each function that makes a model to the names it uses."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    names = {
        function.name: {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        | {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
        for function in functions
    }
    return {name: used for name, used in names.items() if used & COMPUTES}


def test_every_function_that_makes_a_model_settles_first() -> None:
    found = {
        f"{file.name}:{name}": used
        for file in (ROOT / "src" / "qwen3_distill").rglob("*.py")
        for name, used in functions_that_load(ast.parse(file.read_text("utf-8"))).items()
    }
    assert {"loading.py:load_model", "student.py:_load"} <= found.keys()
    assert [name for name, used in found.items() if "settle_vector_math" not in used] == []


def test_a_function_that_does_not_settle_is_found() -> None:
    tree = ast.parse("def load():\n    return AutoModelForCausalLM.from_pretrained('x')")
    assert "settle_vector_math" not in functions_that_load(tree)["load"]
