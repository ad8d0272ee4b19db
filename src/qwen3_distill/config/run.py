"""`RunConfig`, the root of the schema."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import PathText, PositiveInt, Schema
from qwen3_distill.config.cluster import ClusterConfig
from qwen3_distill.config.data import (
    EvaluationConfig,
    PromptsConfig,
    SamplingConfig,
    StudentConfig,
    Tagging,
    TaskPrompts,
    VerifierConfig,
)
from qwen3_distill.config.engines import (
    GenerationConfig,
    PlanningConfig,
    TrainingConfig,
)
from qwen3_distill.config.learning import ReplayConfig
from qwen3_distill.config.objective import ObjectiveConfig
from qwen3_distill.config.operation import (
    CheckpointConfig,
    CostConfig,
    LoggingConfig,
    PipelineConfig,
    SequentialPipeline,
)
from qwen3_distill.config.rollouts import RolloutsConfig
from qwen3_distill.config.rules import check_rules
from qwen3_distill.config.scoring import ScoringConfig
from qwen3_distill.config.several import (
    EnsembleScoring,
    NamedTeacher,
    SeveralScoring,
    TeachersConfig,
    teachers_of,
    with_sections,
)
from qwen3_distill.errors import ConfigError


class RunConfig(Schema):
    """One distillation run."""

    output_dir: Annotated[PathText, Field(min_length=1)]
    """Run folder; the run creates it. To continue a run, start it again."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Everything random derives from it: rollouts, the order of prompts from a file or dataset,
    adapters. The problems of an endless task have their own order, independent of the seed."""
    steps: PositiveInt
    """Optimizer steps. Raise it to go on with a run, also with a finished one."""
    prompts_per_step: Annotated[int, Field(ge=1, le=1_000_000)]
    """Prompts per optimizer step."""
    samples_per_prompt: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Rollouts per prompt."""
    student: StudentConfig
    prompts: PromptsConfig
    """Where training prompts come from."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    rollouts: RolloutsConfig = Field(default_factory=RolloutsConfig)
    """Who samples what the student is trained on."""
    generation: GenerationConfig
    """The engine that samples from the student."""
    scoring: TeachersConfig | None = None
    """The teacher and the engine that scores with it, or several. Null: no teacher; only for an
    objective that needs no scores, on rollouts that no teacher samples."""
    training: TrainingConfig
    """The learner."""
    objective: ObjectiveConfig
    """The loss; see docs/concepts/objective.md."""
    replay: ReplayConfig | None = None
    """Trains on scored rollouts again; see docs/guide/replay.md. Null: the run trains on each
    once."""
    verifier: VerifierConfig | None = None
    """Checks training rollouts: for the task reward, and for the metric ``rollout/accuracy``."""
    evaluation: EvaluationConfig | None = None
    """Null: the run is not evaluated."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    cost: CostConfig = Field(default_factory=CostConfig)
    pipeline: PipelineConfig = Field(default_factory=lambda: SequentialPipeline(kind="sequential"))
    planning: PlanningConfig = Field(default_factory=PlanningConfig)
    cluster: ClusterConfig | None = None
    """Engines on several cards or machines; see docs/cluster.md. Null: on this machine, without
    Ray."""

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        check_rules(self)
        return self

    @model_validator(mode="after")
    def _prompts_carry_their_tags(self) -> Self:
        scoring, evaluation = self.scoring, self.evaluation
        if not isinstance(scoring, SeveralScoring):
            return self
        tagging = Tagging(scoring.by, tuple(scoring.teachers))
        if not isinstance(self.prompts, TaskPrompts):
            object.__setattr__(self, "prompts", self.prompts.tagged(tagging))
        if evaluation is not None and not isinstance(evaluation.prompts, TaskPrompts):
            tagged = {"prompts": evaluation.prompts.tagged(tagging)}
            object.__setattr__(self, "evaluation", evaluation.model_copy(update=tagged))
        return self

    @property
    def output_path(self) -> Path:
        return Path(self.output_dir)

    @property
    def teacher(self) -> ScoringConfig:
        """The section of the one teacher, for what cannot do without it.

        Raises:
            ConfigError: there is none, or there are several.
        """
        scoring = self.scoring
        if scoring is None:
            raise ConfigError("this needs a teacher, and scoring is null; add a `scoring` section")
        if isinstance(scoring, SeveralScoring | EnsembleScoring):
            names = ", ".join(teacher.setting for teacher in self.teachers)
            raise ConfigError(
                f"this needs one teacher, and scoring.kind={scoring.kind} has several ({names}); "
                "use a config whose `scoring` is one of these sections"
            )
        return scoring

    @property
    def only_teacher(self) -> ScoringConfig | None:
        """The section of the only teacher; None: there is none, or there are several."""
        scoring = self.scoring
        return None if isinstance(scoring, SeveralScoring | EnsembleScoring) else scoring

    @property
    def teachers(self) -> tuple[NamedTeacher, ...]:
        """Every teacher of the config; empty without `scoring`."""
        return () if self.scoring is None else teachers_of(self.scoring)

    @property
    def loaded_teachers(self) -> tuple[NamedTeacher, ...]:
        """The teachers that training needs, for scores or samples; empty: none is loaded.

        An evaluation may load embedded teachers for itself.
        """
        return self.teachers if self._loads_teachers else ()

    @property
    def loaded_teacher(self) -> ScoringConfig | None:
        """The one teacher that training needs; None: it is not loaded.

        Raises:
            ConfigError: there are several.
        """
        return self.teacher if self.scoring is not None and self._loads_teachers else None

    @property
    def _loads_teachers(self) -> bool:
        samples = "teacher" in self.rollouts.samplers
        return self.objective.score_request is not None or samples

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the prompts; empty unless every tag has a teacher of its own."""
        return tuple(self.scoring.teachers) if isinstance(self.scoring, SeveralScoring) else ()

    @property
    def tag_weights(self) -> Mapping[str, float] | None:
        """Weight of every tag's prompts; None: a tag weighs as much as it has rows."""
        return self.scoring.weights if isinstance(self.scoring, SeveralScoring) else None

    def with_teacher(self, teacher: NamedTeacher) -> Self:
        """Copy the config with one of its teachers alone. It is measured or checked, never run."""
        return self.model_copy(update={"scoring": teacher.section})

    def with_sections(self, sections: Mapping[str, ScoringConfig]) -> Self:
        """Copy the config with other sections for some teachers, by `NamedTeacher.name`."""
        if self.scoring is None:
            return self
        return self.model_copy(update={"scoring": with_sections(self.scoring, sections)})

    @property
    def max_in_flight(self) -> int:
        """Maximum rollouts in flight of a streaming pipeline."""
        pipeline = self.pipeline
        limit = pipeline.max_in_flight if pipeline.kind == "streaming" else None
        return limit or self.generation.max_sequences * self.num_rollout_engines

    @property
    def num_rollout_engines(self) -> int:
        """Engines that sample concurrently, each `generation.max_sequences` rollouts."""
        fleet = None if self.cluster is None else self.cluster.rollouts
        return 1 if fleet is None else fleet.replicas

    @property
    def max_steps_ahead(self) -> int:
        """Steps beyond the next one that a streaming pipeline may sample rollouts for."""
        pipeline = self.pipeline
        if pipeline.kind != "streaming":
            return 0
        ahead = pipeline.max_steps_ahead
        return pipeline.max_staleness_steps if ahead is None else ahead

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt
