"""Settings of any teacher: its context besides the prompt, and a self-teacher's refresh."""

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import PositiveInt, Schema
from qwen3_distill.utils.shown import shortened

CONTEXT_VARIABLES = ("prompt", "system", "answer", "messages", "row")
"""Variables of a context's templates."""


def _checked_template(text: str) -> str:
    """Return the template if it has no syntax error and reads known variables only."""
    try:
        tree = _parsed(text)
    except (TemplateSyntaxError, RecursionError) as error:
        line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ValueError(
            f"a Jinja template with a syntax error{line}: {shortened(str(error), 200)}; correct it"
        ) from None
    known = {*CONTEXT_VARIABLES, *ImmutableSandboxedEnvironment().globals}
    unknown = sorted(meta.find_undeclared_variables(tree) - known)
    if unknown:
        raise ValueError(
            f"a template that reads {', '.join(unknown)}; it may read "
            f"{', '.join(CONTEXT_VARIABLES)}, and a field of the row as row.{unknown[0]}"
        )
    return text


def _parsed(text: str) -> nodes.Template:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).parse(text)


Template: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_checked_template)]
"""A Jinja template over ``prompt`` (the last user message), ``system`` (the system message, else
empty), ``answer`` (the reference answer), ``messages`` and ``row`` (the row's fields:
``row.hint``)."""


class ContextExample(Schema):
    """A question and its answer, shown to the teacher before the conversation."""

    user: Template
    assistant: Template


class ContextConfig(Schema):
    """Messages that the teacher reads in place of the prompt; see docs/guide/teachers.md.

    The texts are Jinja templates over ``prompt`` (the last user message), ``system`` (the system
    message, else empty), ``answer`` (the reference answer), ``messages`` and ``row`` (the row's
    fields, e.g. ``row.hint``). The teacher's chat template renders the messages. The response's
    token ids stay those that the student sampled.
    """

    system: Template | None = None
    """The system message in place of the prompt's, if it has one; null: as in the prompt."""
    examples: tuple[ContextExample, ...] = ()
    """Shown between the system message and the conversation."""
    user: Template | None = None
    """The last user message in place of the prompt's; null: as in the prompt."""
    compare_every_steps: PositiveInt = 10
    """Every this many steps the teacher scores some rollouts with and without its context, for the
    metrics ``context/*``."""
    compare_rollouts: PositiveInt = 4
    """Rollouts that are scored twice for that."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.system is None and self.user is None and not self.examples:
            raise ValueError(
                "context with neither system, examples nor user: the teacher would read the "
                "student's prompt; set one of them, or context: null"
            )
        return self

    @property
    def templates(self) -> dict[str, str]:
        """The templates by the name of their setting."""
        given = {"system": self.system, "user": self.user}
        for number, example in enumerate(self.examples):
            given[f"examples.{number}.user"] = example.user
            given[f"examples.{number}.assistant"] = example.assistant
        return {name: text for name, text in given.items() if text is not None}

    @property
    def row_fields(self) -> frozenset[str] | None:
        """The row's fields that the templates read; None: which ones is seen in rendering only."""
        found: set[str] = set()
        for text in self.templates.values():
            for name in _fields_of_row(_parsed(text)):
                if name is None:
                    return None
                found.add(name)
        return frozenset(found)


def _fields_of_row(tree: nodes.Template) -> Iterator[str | None]:
    """Yield each field that a template reads of the row; None for one that is computed."""
    named = 0
    for node in tree.find_all((nodes.Getattr, nodes.Getitem)):
        if not isinstance(node.node, nodes.Name) or node.node.name != "row":
            continue
        named += 1
        if isinstance(node, nodes.Getattr):
            yield node.attr
        elif isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            yield node.arg.value
        else:
            yield None
    if named < sum(node.name == "row" for node in tree.find_all(nodes.Name)):
        yield None


class NeverRefreshed(Schema):
    """The teacher stays the student of the run's start."""

    kind: Literal["never"]


class RefreshedEvery(Schema):
    """The teacher becomes the student of the moment, every so many optimizer steps."""

    kind: Literal["every"]
    steps: PositiveInt
    """Optimizer steps between two refreshes; 1: the teacher is always the current student."""


class MovingAverage(Schema):
    """The teacher is an exponential moving average of the student's weights, in float32."""

    kind: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)]
    """Weight of the average at each step: ``average = decay * average + (1 - decay) * student``."""


RefreshConfig: TypeAlias = Annotated[
    NeverRefreshed | RefreshedEvery | MovingAverage, Field(discriminator="kind")
]


class TeacherConfig(Schema):
    """Settings that a teacher has on every engine."""

    context: ContextConfig | None = None
    """Messages for the teacher besides the prompt: a hint, the reference answer, other
    instructions. Null: it reads the student's prompt."""
    refresh: RefreshConfig | None = None
    """With ``model: student`` the teacher is the student itself: as it was at the start (``kind:
    never``, the default there), as it is every some steps (``every``), or averaged (``ema``).
    Null: another model."""
