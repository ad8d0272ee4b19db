"""Only `pipeline.assembly` asks which engine the config names; the rest uses the ports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PIPELINE = Path(__file__).parents[2] / "src" / "qwen3_distill" / "pipeline"
ADAPTERS = tuple(f"qwen3_distill.{room}" for room in ("generation", "scoring", "training"))
CHANNELS = tuple(f"qwen3_distill.weights.{name}" for name in ("directory", "ipc", "memory"))
SECTIONS = ("Generation", "Scoring", "Training")
"""How the names of the config's engine sections end."""


def questions(source: str) -> list[str]:
    """The expressions of a module that ask which kind of engine or channel there is."""
    tree = ast.parse(source)
    asked = _adapter_classes(tree)
    return [
        ast.unparse(question)
        for node in ast.walk(tree)
        for question in _questions_in(node)
        if _compares_kind(question) or asked & _names(question)
    ]


def _adapter_classes(tree: ast.Module) -> set[str]:
    """Names that the module imports for a class of an adapter or of an engine's section."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.".startswith(tuple(f"{room}." for room in (*ADAPTERS, *CHANNELS)))
        or (f"{node.module}.".startswith("qwen3_distill.config.") and alias.name.endswith(SECTIONS))
    }


def _questions_in(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Compare | ast.MatchClass):
        yield node
    elif isinstance(node, ast.Match):
        yield node.subject
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "type"):
        yield node


def _compares_kind(node: ast.AST) -> bool:
    """Whether a comparison or a matched subject is an attribute named ``kind``."""
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node]
    return any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides)


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_no_file_outside_of_assembly_asks() -> None:
    files = [file for file in sorted(PIPELINE.rglob("*.py")) if file.parent.name != "assembly"]
    assert len(files) > 10
    assert {file.name: found for file in files if (found := questions(file.read_text()))} == {}


def test_assembly_asks() -> None:
    """The guard sees the questions where they are."""
    for name in ("engines", "teachers", "channel"):
        assert questions((PIPELINE / "assembly" / f"{name}.py").read_text()), name


@pytest.mark.parametrize(
    "question",
    [
        "config.scoring.kind == 'sglang'",
        "'vllm' != generation.kind",
        "config.training.kind in ('embedded',)",
        "isinstance(config.scoring, SglangScoring)",
        "isinstance(teacher, str | Teacher)",
        "isinstance(channel, IpcChannel)",
        "type(teacher) is Teacher",
    ],
)
def test_each_form_of_the_question_is_seen(question: str) -> None:
    imports = (
        "from qwen3_distill.config import SglangScoring\n"
        "from qwen3_distill.scoring.sglang.teacher import SglangTeacher as Teacher\n"
        "from qwen3_distill.weights.ipc import IpcChannel\n"
    )
    assert questions(f"{imports}answer = {question}")


def test_a_match_by_class_or_kind_is_seen() -> None:
    match = "match {}:\n    case {}:\n        pass\n"
    imported = "from qwen3_distill.config.engines import VllmGeneration\n"
    assert questions(imported + match.format("generation", "VllmGeneration()"))
    assert questions(match.format("config.generation.kind", "'vllm'"))


def test_other_questions_are_allowed() -> None:
    allowed = "isinstance(result, ScoreFailure) or loops[config.pipeline.kind]"
    assert questions(f"from qwen3_distill.types import ScoreFailure\nanswer = {allowed}") == []
