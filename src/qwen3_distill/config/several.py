"""Several teachers: one for every tag of the prompts, or a mean of several."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import PositiveFloat, Schema
from qwen3_distill.config.scoring import (
    EmbeddedScoring,
    ScoringConfig,
    SglangScoring,
    VllmScoring,
)

Tag: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""It names metrics, log files and settings: letters, digits, ``_`` and ``-`` only."""


class EnsembleScoring(Schema):
    """A mean of several teachers, in probability space."""

    kind: Literal["ensemble"]
    members: Annotated[tuple[ScoringConfig, ...], Field(min_length=2)]
    """The teachers. An objective over the sampled token takes any; ``objective.kind=top_k`` and a
    top-k baseline only embedded ones with ``own_process=false``, whose full distributions are
    averaged."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Weight of each member, relative to the others; null: equal."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, divided by their sum."""
        weights = self.weights or (1.0,) * len(self.members)
        return tuple(weight / sum(weights) for weight in weights)

    @model_validator(mode="after")
    def _a_weight_for_each_member(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {len(self.members)} members; give "
                "one for each, or null"
            )
        return self


TaggedScoring: TypeAlias = Annotated[
    EmbeddedScoring | SglangScoring | VllmScoring | EnsembleScoring, Field(discriminator="kind")
]
"""The teacher of a tag."""


class SeveralScoring(Schema):
    """A teacher for every tag of the prompts."""

    kind: Literal["several"]
    by: Annotated[str, Field(min_length=1)]
    """Field of a prompt's row that names its teacher, e.g. ``task``; dots lead into objects, as in
    `prompt_field`. The held-out problems need it too."""
    teachers: Annotated[dict[Tag, TaggedScoring], Field(min_length=2)]
    """By value of that field, the teacher: any kind of `scoring` but ``several``. A row with
    another value is an error before the run."""
    weights: dict[str, PositiveFloat] | None = None
    """Weight of every tag's prompts among those that a run draws, relative to the others. Null:
    every row is drawn once an epoch, so a tag weighs as much as it has rows."""

    @model_validator(mode="after")
    def _a_weight_for_each_teacher(self) -> Self:
        if self.weights is not None and set(self.weights) != set(self.teachers):
            raise ValueError(
                f"weights is for {', '.join(sorted(self.weights))}, and teachers has "
                f"{', '.join(sorted(self.teachers))}; give every tag one weight, or null"
            )
        return self

    @model_validator(mode="after")
    def _servers_have_ports_of_their_own(self) -> Self:
        taken: dict[int, str] = {}
        for teacher in teachers_of(self):
            port = getattr(teacher.section, "port", None)
            if port is None:
                continue
            if port in taken:
                raise ValueError(
                    f"port={port} is given to {taken[port]} and {teacher.name}; give each server "
                    "another one, or null"
                )
            taken[port] = teacher.name
        return self


TeachersConfig: TypeAlias = Annotated[
    EmbeddedScoring | SglangScoring | VllmScoring | EnsembleScoring | SeveralScoring,
    Field(discriminator="kind"),
]
"""The section `scoring`: one teacher or several."""


class NamedTeacher(NamedTuple):
    """One of a run's teachers."""

    name: str
    """Empty for the only one, ``math`` for a tag's, ``math.0`` for a member of a tag's ensemble."""
    setting: str
    """Where its section is: ``scoring``, ``scoring.teachers.math``."""
    section: ScoringConfig

    @property
    def role(self) -> str:
        """Its name among a run's models: ``teacher``, ``teacher.math``."""
        return _dotted("teacher", self.name)

    @property
    def suffix(self) -> str:
        """The end of its log file's name: empty, ``-math``, ``-math-0``."""
        return f"-{self.name.replace('.', '-')}" if self.name else ""


def teachers_of(scoring: TeachersConfig) -> tuple[NamedTeacher, ...]:
    """Return every teacher of a section, in its order."""
    match scoring:
        case SeveralScoring():
            return tuple(
                NamedTeacher(_dotted(tag, one.name), f"scoring.teachers.{tag}{inner}", one.section)
                for tag, section in scoring.teachers.items()
                for one in teachers_of(section)
                for inner in [one.setting.removeprefix("scoring")]
            )
        case EnsembleScoring():
            return tuple(
                NamedTeacher(str(index), f"scoring.members.{index}", member)
                for index, member in enumerate(scoring.members)
            )
        case _:
            return (NamedTeacher("", "scoring", scoring),)


def with_sections(scoring: Any, sections: Mapping[str, ScoringConfig]) -> Any:
    """Copy a section with some of its teachers replaced, by their names."""
    match scoring:
        case SeveralScoring():
            return scoring.model_copy(
                update={
                    "teachers": {
                        tag: with_sections(section, _below(tag, sections))
                        for tag, section in scoring.teachers.items()
                    }
                }
            )
        case EnsembleScoring():
            members = (
                sections.get(str(index), member) for index, member in enumerate(scoring.members)
            )
            return scoring.model_copy(update={"members": tuple(members)})
        case _:
            return sections.get("", scoring)


def teacher_values(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the section of every teacher in a config's unchecked values, with its setting."""
    yield from _teacher_values("scoring", values.get("scoring"))


def _teacher_values(setting: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(node, dict):
        return
    yield setting, node
    teachers, members = node.get("teachers"), node.get("members")
    for tag, inner in teachers.items() if isinstance(teachers, dict) else ():
        yield from _teacher_values(f"{setting}.teachers.{tag}", inner)
    for index, inner in enumerate(members) if isinstance(members, list) else ():
        yield from _teacher_values(f"{setting}.members.{index}", inner)


def as_of_one_teacher(key: str) -> str:
    """Return a setting of one of several teachers as if it were the only one.

    ``scoring.teachers.math.urls`` becomes ``scoring.urls``; other settings stay.
    """
    return re.sub(r"^scoring(\.teachers\.[^.]+)?(\.members\.\d+)?\.", "scoring.", key)


def _below(tag: str, sections: Mapping[str, ScoringConfig]) -> dict[str, ScoringConfig]:
    found = {}
    for name, section in sections.items():
        first, _, rest = name.partition(".")
        if first == tag:
            found[rest] = section
    return found


def _dotted(first: str, rest: str) -> str:
    return f"{first}.{rest}" if rest else first
