"""Only `pipeline.assembly` asks which engine the config names; the rest uses the ports."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from qwen3_distill.config import GenerationConfig, ScoringConfig, TrainingConfig

PACKAGE = Path(__file__).parents[2] / "src" / "qwen3_distill"
PIPELINE = PACKAGE / "pipeline"
ADAPTERS = ("generation", "scoring", "training")
CHANNELS = ("weights.directory", "weights.ipc", "weights.memory")
UNIONS = {
    "GenerationConfig": GenerationConfig,
    "ScoringConfig": ScoringConfig,
    "TrainingConfig": TrainingConfig,
}
SECTION_CLASSES = [cls for union in UNIONS.values() for cls in get_args(get_args(union)[0])]
SECTION_NAMES = {"generation", "scoring", "training", "section"}
"""Names of variables and attributes that hold an engine's section."""
SETTINGS = {name for cls in SECTION_CLASSES for name in cls.model_fields} | SECTION_NAMES
WHERE = {"learns_elsewhere", "loads_beside_steps", "samples_elsewhere"}
"""Functions of `assembly.channel` that ask for the kind."""


def _classes_below(rooms: tuple[str, ...]) -> set[str]:
    """The names of the classes that rooms and modules of the package define."""
    files: list[Path] = []
    for room in rooms:
        path = PACKAGE.joinpath(*room.split("."))
        files += path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return {
        node.name
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }


CLASSES = {cls.__name__ for cls in SECTION_CLASSES} | _classes_below((*ADAPTERS, *CHANNELS))
"""Engines, their sections in the config, and channels."""


def questions(source: str) -> list[str]:
    """The expressions of a module that ask which kind of engine or channel there is."""
    tree = ast.parse(source)
    return [ast.unparse(question) for question in _Module(tree).questions()]


class _Module:
    """One module, and the names that it gives to sections and to classes."""

    def __init__(self, tree: ast.Module) -> None:
        self._nodes = list(ast.walk(tree))
        self._printed = set(_printed(self._nodes))
        self._classes = CLASSES | set(_imported_as(self._nodes, CLASSES))
        self._where = WHERE | set(_imported_as(self._nodes, WHERE))
        self._sections = set(SECTION_NAMES)
        size = 0
        while size < len(self._sections):  # a name of a name
            size = len(self._sections)
            self._sections |= set(self._named_sections())

    def questions(self) -> Iterator[ast.AST]:
        for node in self._nodes:
            if node not in self._printed and self._asks(node):
                yield node

    def _asks(self, node: ast.AST) -> bool:
        match node:
            case ast.Attribute(value=base, attr="kind", ctx=ast.Load()):
                return self._is_section(base)
            case ast.Attribute(attr="__class__"):
                return True
            case ast.Call(func=ast.Name("getattr" | "hasattr"), args=[base, name, *_]):
                return self._is_read_by_name(base, name)
            case ast.Call(func=ast.Name("isinstance" | "issubclass"), args=[_, classes]):
                return bool(self._classes & _last_names(classes))
            case ast.Call(func=ast.Name("type"), args=[_]):
                return True
            case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)):
                return name in self._where and name not in SETTINGS
            case ast.ImportFrom(names=names):
                return any(alias.name in WHERE for alias in names)
            case ast.MatchClass(cls=cls):
                return bool(self._classes & _last_names(cls))
        return False

    def _is_section(self, node: ast.AST) -> bool:
        match node:
            case ast.Name(name) | ast.Attribute(attr=name):
                return name in self._sections
            case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(name), *_]):
                return name in self._sections
            case ast.Subscript(slice=ast.Constant(name)):
                return name in self._sections
            case ast.NamedExpr(value=value):
                return self._is_section(value)
            case ast.IfExp(body=body, orelse=orelse):
                return self._is_section(body) or self._is_section(orelse)
        return False

    def _is_read_by_name(self, base: ast.AST, name: ast.AST) -> bool:
        """Whether ``getattr(base, name)`` reads a section or one of its settings."""
        if self._is_section(base):
            return True
        if isinstance(base, ast.Call) and getattr(base.func, "id", "") == "getattr":
            return True
        return isinstance(name, ast.Constant) and name.value in SETTINGS

    def _named_sections(self) -> Iterator[str]:
        """Names of variables and parameters that are bound to a section."""
        for node in self._nodes:
            match node:
                case ast.Assign(targets=[ast.Name(name)], value=value):
                    values = [value]
                case ast.AnnAssign(target=ast.Name(name), annotation=annotation, value=value):
                    values = [annotation, value]
                case ast.NamedExpr(target=ast.Name(name), value=value):
                    values = [value]
                case ast.arg(arg=name, annotation=annotation):
                    values = [annotation]
                case (
                    ast.For(target=ast.Name(name), iter=ast.Tuple(elts=values))
                    | ast.For(target=ast.Name(name), iter=ast.List(elts=values))
                    | ast.comprehension(target=ast.Name(name), iter=ast.Tuple(elts=values))
                    | ast.comprehension(target=ast.Name(name), iter=ast.List(elts=values))
                ):
                    pass
                case _:
                    continue
            sections = self._classes & {cls.__name__ for cls in SECTION_CLASSES} | UNIONS.keys()
            if any(
                value is not None and (self._is_section(value) or sections & _last_names(value))
                for value in values
                if not isinstance(value, ast.Call)
            ):
                yield name


def _printed(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """Expressions that are a whole field of an f-string which is a text, and no question."""
    asked = {
        part
        for node in nodes
        if isinstance(node, ast.Compare | ast.Subscript | ast.Match)
        for part in ast.walk(node.subject if isinstance(node, ast.Match) else node)
        if isinstance(part, ast.FormattedValue)
    }
    for node in nodes:
        if isinstance(node, ast.FormattedValue) and node not in asked:
            yield node.value
            if isinstance(node.value, ast.Attribute) and node.value.attr == "__name__":
                yield node.value.value


def _imported_as(nodes: list[ast.AST], names: set[str]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in names and alias.asname:
                    yield alias.asname


def _last_names(node: ast.AST) -> set[str]:
    """The names in an expression, without the modules that they are reached through."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def test_no_file_outside_of_assembly_asks() -> None:
    files = [file for file in sorted(PIPELINE.rglob("*.py")) if file.parent.name != "assembly"]
    assert len(files) > 10
    assert {file.name: found for file in files if (found := questions(file.read_text()))} == {}


def test_assembly_asks() -> None:
    """The guard sees the questions where they are."""
    for name in ("engines", "teachers", "channel"):
        assert questions((PIPELINE / "assembly" / f"{name}.py").read_text()), name


def test_the_classes_of_the_question_are_known() -> None:
    assert {"SglangScoring", "VllmGeneration", "UnslothTraining", "IpcChannel"} <= CLASSES
    assert {"EmbeddedTeacher", "HostedLearner", "EmbeddedRolloutEngine"} <= CLASSES
    assert {"kind", "python", "cache", "urls", "adapters"} <= SETTINGS


@pytest.mark.parametrize(
    "question",
    [
        "config.scoring.kind == 'sglang'",
        "'vllm' != generation.kind",
        "config.training.kind in ('embedded',)",
        "TABLE[config.scoring.kind]",
        "TABLE.get(section.kind)",
        "config.generation.kind.startswith('v')",
        "parts.config.scoring.kind.lower()",
        "f'{config.scoring.kind}' == 'sglang'",
        "TABLE[f'{config.scoring.kind}']",
        "f'{1 if scoring.kind == other else 2}'",
        "[s for s in (config.scoring, config.training) if s.kind == 'embedded']",
        "(x := config.scoring) and x.kind",
        "sections['scoring'].kind",
        "getattr(config.scoring, 'kind')",
        "getattr(config.scoring, 'kind') == 'sglang'",
        "getattr(config, 'scoring').kind",
        "getattr(config, 'scoring')",
        "getattr(getattr(config, name), 'python', None)",
        "getattr(getattr(config, name), setting)",
        "getattr(config.scoring, name)",
        "hasattr(x, 'python')",
        "hasattr(config.generation, 'python')",
        "isinstance(config.scoring, SglangScoring)",
        "isinstance(config.scoring, engines.SglangScoring)",
        "isinstance(config.scoring, qwen3_distill.config.SglangScoring)",
        "isinstance(config.scoring, (str, config.SglangScoring))",
        "isinstance(teacher, str | Teacher)",
        "isinstance(teacher, EmbeddedTeacher)",
        "isinstance(channel, IpcChannel)",
        "isinstance(channel, ipc.IpcChannel)",
        "issubclass(cls, EmbeddedScoring)",
        "type(teacher) is Teacher",
        "type(teacher).__name__ == 'SglangTeacher'",
        "teacher.__class__.__name__ == 'SglangTeacher'",
        "learns_elsewhere(config.training)",
        "channel.samples_elsewhere(config.generation)",
    ],
)
def test_each_form_of_the_question_is_seen(question: str) -> None:
    imports = "from qwen3_distill.scoring.sglang.teacher import SglangTeacher as Teacher\n"
    assert questions(f"{imports}answer = {question}")


@pytest.mark.parametrize(
    "source",
    [
        "k = config.generation.kind\nif k == 'vllm':\n    pass",
        "g = config.generation\nif g.kind == 'vllm':\n    pass",
        "g = config.generation\nh = g\nk = h.kind",
        "def f(settings: ScoringConfig):\n    return settings.kind",
        "def f(settings: config.EmbeddedScoring | None):\n    return settings.kind",
        "for part in (config.generation, config.scoring):\n    TABLE[part.kind]",
        "from qwen3_distill.pipeline.assembly.channel import learns_elsewhere",
        "from qwen3_distill.pipeline.assembly.channel import samples_elsewhere as f\nf(generation)",
    ],
)
def test_a_question_under_another_name_is_seen(source: str) -> None:
    assert questions(source)


@pytest.mark.parametrize(
    ("subject", "case"),
    [
        ("generation", "VllmGeneration()"),
        ("generation", "engines.VllmGeneration()"),
        ("teacher", "Teacher()"),
        ("config.generation.kind", "'vllm'"),
        ("config.generation", "object(kind='vllm') if config.generation.kind"),
        ("f'{config.generation.kind}'", "'vllm'"),
    ],
)
def test_a_match_by_class_or_kind_is_seen(subject: str, case: str) -> None:
    imports = "from qwen3_distill.scoring.sglang.teacher import SglangTeacher as Teacher\n"
    assert questions(f"{imports}match {subject}:\n    case {case}:\n        pass\n")


@pytest.mark.parametrize(
    "allowed",
    [
        "isinstance(result, ScoreFailure) or loops[config.pipeline.kind]",
        "prompts.kind != 'task'",
        "f'the teacher ({config.scoring.kind})'",
        "f'holds a {type(values).__name__}'",
        "parts.samples_elsewhere and parts.learner.max_restarts",
        "config.scoring.cache_folder or config.training.interpreter",
    ],
)
def test_other_questions_are_allowed(allowed: str) -> None:
    assert questions(f"answer = {allowed}") == []
