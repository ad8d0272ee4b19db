"""Who samples the rollouts that the student is trained on."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import PathText, Schema

SampledBy: TypeAlias = Literal["student", "teacher"]
"""A model that samples rollouts."""


class RolloutsConfig(Schema):
    """Who samples the rollouts that the student is trained on; see docs/guide/arms.md."""

    source: Literal["student", "teacher", "mixture", "file"] = "student"
    """``student``: on-policy. ``teacher``: the teacher answers every prompt. ``mixture``: it
    answers a share of the prompts (GKD's lambda is 1 - `teacher_share`, arXiv 2306.13649).
    ``file``: nothing is sampled; rollouts come from `file`."""
    teacher_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the prompts that the teacher answers, chosen by the seed and the prompt's number in
    the run; required by ``mixture``, refused otherwise."""
    teacher_temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    """Temperature of the teacher's answers; null: `sampling.temperature`."""
    file: Annotated[PathText, Field(min_length=1)] | None = None
    """Rollout file (Parquet) of `qwen3-distill generate`, `score` or a run; required by ``file``,
    refused otherwise. Each rollout in it says who sampled it."""

    @model_validator(mode="after")
    def _share_belongs_to_mixture(self) -> Self:
        if (self.teacher_share is None) == (self.source == "mixture"):
            raise ValueError(
                f"source={self.source} with teacher_share={self.teacher_share}: set teacher_share "
                "(e.g. 0.5) with source=mixture and only with it"
            )
        return self

    @model_validator(mode="after")
    def _file_belongs_to_file(self) -> Self:
        if (self.file is None) == (self.source == "file"):
            raise ValueError(
                f"source={self.source} with file={self.file}: set file with source=file and only "
                "with it"
            )
        return self

    @model_validator(mode="after")
    def _temperature_needs_teacher(self) -> Self:
        if self.teacher_temperature is not None and "teacher" not in self.samplers:
            raise ValueError(
                f"teacher_temperature={self.teacher_temperature} with source={self.source}: the "
                "teacher samples nothing; drop it, or use source=teacher or mixture"
            )
        return self

    @property
    def samplers(self) -> frozenset[SampledBy]:
        """The models that sample during the run; none where rollouts come from a file."""
        by_source: dict[str, frozenset[SampledBy]] = {
            "student": frozenset({"student"}),
            "teacher": frozenset({"teacher"}),
            "mixture": frozenset({"student", "teacher"}),
            "file": frozenset(),
        }
        return by_source[self.source]
