"""The whole config of a run."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import PositiveInt, Schema
from qwen3_distill.config.data import (
    EvaluationConfig,
    PromptsConfig,
    SamplingConfig,
    StudentConfig,
    VerifierConfig,
)
from qwen3_distill.config.engines import (
    VLLM_MAX_RANK,
    GenerationConfig,
    PlanningConfig,
    ScoringConfig,
    TrainingConfig,
)
from qwen3_distill.config.learning import ReplayConfig
from qwen3_distill.config.objective import ObjectiveConfig, needs_hidden_states
from qwen3_distill.config.operation import (
    CheckpointConfig,
    LoggingConfig,
    PipelineConfig,
    SequentialPipeline,
)


class RunConfig(Schema):
    """One distillation run."""

    output_dir: Annotated[str, Field(min_length=1)]
    """Run folder. Made by the run; a run is continued by starting it again."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random derives from it: rollouts, the order of prompts that come from a file or
    dataset, adapters. An endless task is taken in its own order whatever the seed."""
    steps: PositiveInt
    """Optimizer steps."""
    prompts_per_step: PositiveInt
    """Prompts drawn for one optimizer step."""
    samples_per_prompt: PositiveInt = 1
    """Rollouts of each of them."""
    student: StudentConfig
    prompts: PromptsConfig
    """Where training prompts come from."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    generation: GenerationConfig
    """The engine that samples from the student."""
    scoring: ScoringConfig
    """The teacher and the engine that scores with it."""
    training: TrainingConfig
    """The learner."""
    objective: ObjectiveConfig
    """What is minimised; see concepts.md."""
    replay: ReplayConfig | None = None
    """Keeps scored rollouts and trains on them again; see replay.md. Null: each is trained on
    once."""
    verifier: VerifierConfig | None = None
    """Checks training rollouts: for the task reward, and for the metric ``rollout/accuracy``."""
    evaluation: EvaluationConfig | None = None
    """Null: the run is not evaluated."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    pipeline: PipelineConfig = Field(default_factory=lambda: SequentialPipeline(kind="sequential"))
    planning: PlanningConfig = Field(default_factory=PlanningConfig)

    @model_validator(mode="after")
    def _hidden_states_stay_in_one_process(self) -> Self:
        objective, scoring, training = self.objective, self.scoring, self.training
        if not needs_hidden_states(objective):
            return self
        if scoring.kind != "embedded" or training.kind != "embedded":
            raise ValueError(
                f"objective.kind={objective.kind} over the full vocabulary needs the teacher's "
                "hidden states and output head, which a server does not give: use "
                "scoring.kind=embedded with training.kind=embedded, or objective.kind=top_k, or "
                "objective.kl_baseline.kind=top_k"
            )
        if scoring.own_process or training.own_process:
            raise ValueError(
                f"objective.kind={objective.kind} over the full vocabulary needs teacher and "
                "learner in one process, where the teacher's output head is shared: use "
                "own_process=false for both, or objective.kind=top_k, or "
                "objective.kl_baseline.kind=top_k"
            )
        return self

    @model_validator(mode="after")
    def _quantized_rollouts_need_the_ratio(self) -> Self:
        generation, objective = self.generation, self.objective
        if (
            generation.kind == "vllm"
            and generation.quantization is not None
            and objective.kind == "sampled_reverse_kl"
            and objective.ratio_cap is None
        ):
            raise ValueError(
                f"generation.quantization={generation.quantization} with "
                "objective.ratio_cap=null: tokens are sampled from a quantized student, and "
                "without the ratio the gradient is biased; set ratio_cap or quantization=null"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit_the_rollout_engine(self) -> Self:
        tuning, generation = self.training.tuning, self.generation
        if generation.kind != "vllm" or generation.adapters != "swap" or tuning.kind != "lora":
            return self
        given = generation.engine_arguments.get("max_lora_rank")
        limit = min(given, VLLM_MAX_RANK) if isinstance(given, int) else VLLM_MAX_RANK
        if tuning.rank > limit:
            raise ValueError(
                f"training.tuning.rank={tuning.rank} is above vLLM's limit of {limit}; lower the "
                "rank, or have vLLM serve merged weights with generation.adapters=merge"
            )
        return self

    @model_validator(mode="after")
    def _truncated_sampling_biases_the_sampled_estimator(self) -> Self:
        truncated = self.sampling.top_p < 1 or self.sampling.top_k > 0
        if self.objective.kind == "sampled_reverse_kl" and truncated:
            raise ValueError(
                f"objective.kind=sampled_reverse_kl with sampling.top_p={self.sampling.top_p}, "
                f"top_k={self.sampling.top_k}: tokens that are never sampled get no gradient, and "
                "no importance ratio can bring them back, so the gradient is not that of the "
                "reverse KL; use top_p=1 and top_k=0, or objective.kind=full or top_k"
            )
        return self

    @model_validator(mode="after")
    def _tempered_sampling_needs_the_ratio(self) -> Self:
        objective = self.objective
        if (
            objective.kind == "sampled_reverse_kl"
            and objective.ratio_cap is None
            and self.sampling.temperature != 1
        ):
            raise ValueError(
                f"objective.ratio_cap=null with sampling.temperature={self.sampling.temperature}: "
                "tokens are sampled from another distribution than the one whose KL is minimised, "
                "and without the ratio the gradient is biased; set ratio_cap or temperature=1"
            )
        return self

    @model_validator(mode="after")
    def _tempered_sampling_cannot_credit_later_tokens(self) -> Self:
        objective = self.objective
        if (
            objective.kind == "sampled_reverse_kl"
            and self.sampling.temperature != 1
            and (objective.discount > 0 or objective.task_reward_weight > 0)
        ):
            raise ValueError(
                f"sampling.temperature={self.sampling.temperature} with discount="
                f"{objective.discount}, task_reward_weight={objective.task_reward_weight}: a "
                "token's ratio does not correct the tokens after it, so their share of its "
                "advantage is biased; use temperature=1, or discount=0 and no task reward"
            )
        return self

    @model_validator(mode="after")
    def _lent_weights_do_not_change_under_an_engine(self) -> Self:
        generation, tuning = self.generation, self.training.tuning
        if (
            generation.kind == "vllm"
            and generation.full_weights == "ipc"
            and tuning.kind == "full"
            and self.pipeline.kind == "streaming"
        ):
            raise ValueError(
                "generation.full_weights=ipc with training.tuning.kind=full and "
                "pipeline.kind=streaming: CUDA IPC lends the weights that are being trained, and "
                "an engine that is started again during a step could not get its version back; "
                "use full_weights=auto or directory"
            )
        return self

    @model_validator(mode="after")
    def _a_prompts_samples_are_begun_together(self) -> Self:
        pipeline = self.pipeline
        if pipeline.kind == "streaming" and self.max_in_flight < self.samples_per_prompt:
            raise ValueError(
                f"samples_per_prompt={self.samples_per_prompt} is more than the "
                f"{self.max_in_flight} rollouts that run at a time, and the samples of a prompt "
                "are begun together; raise pipeline.max_in_flight or generation.max_sequences"
            )
        return self

    @model_validator(mode="after")
    def _what_runs_ahead_may_be_trained_on(self) -> Self:
        pipeline = self.pipeline
        if pipeline.kind != "streaming" or pipeline.max_steps_ahead is None:
            return self
        if pipeline.max_steps_ahead > pipeline.max_staleness_steps:
            raise ValueError(
                f"pipeline.max_steps_ahead={pipeline.max_steps_ahead} is more than "
                f"max_staleness_steps={pipeline.max_staleness_steps}: rollouts would be sampled to "
                "be dropped; lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _what_is_kept_outlives_its_updates(self) -> Self:
        pipeline, replay = self.pipeline, self.replay
        if pipeline.kind != "streaming" or replay is None:
            return self
        needed = pipeline.max_staleness_steps + replay.updates_per_batch - 1
        if replay.max_age_steps < needed:
            raise ValueError(
                f"replay.max_age_steps={replay.max_age_steps} with "
                f"pipeline.max_staleness_steps={pipeline.max_staleness_steps}, "
                f"updates_per_batch={replay.updates_per_batch}: rollouts that arrive as old as "
                f"they may would be dropped before their last update; use at least {needed}, or "
                "lower the others"
            )
        return self

    @model_validator(mode="after")
    def _pieces_of_an_answer_cannot_credit_later_tokens(self) -> Self:
        pipeline, objective = self.pipeline, self.objective
        if pipeline.kind != "streaming" or objective.kind != "sampled_reverse_kl":
            return self
        cut = "harvest" if pipeline.harvest else "prefix" if pipeline.prefix else None
        if cut and (objective.discount > 0 or objective.task_reward_weight > 0):
            raise ValueError(
                f"pipeline.{cut} with objective.discount={objective.discount}, "
                f"task_reward_weight={objective.task_reward_weight}: a piece of an answer does not "
                "know what comes after it; use discount=0 and no task reward, or whole rollouts"
            )
        return self

    @model_validator(mode="after")
    def _replayed_tokens_need_the_ratio(self) -> Self:
        objective = self.objective
        if (
            self.replay is not None
            and objective.kind == "sampled_reverse_kl"
            and objective.ratio_cap is None
        ):
            raise ValueError(
                "replay with objective.ratio_cap=null: replayed tokens were sampled from older "
                "weights, and without the ratio the gradient is biased; set ratio_cap"
            )
        return self

    @model_validator(mode="after")
    def _replayed_tokens_answer_for_themselves(self) -> Self:
        objective = self.objective
        if (
            self.replay is not None
            and objective.kind == "sampled_reverse_kl"
            and (objective.discount > 0 or objective.task_reward_weight > 0)
        ):
            raise ValueError(
                f"replay with objective.discount={objective.discount}, task_reward_weight="
                f"{objective.task_reward_weight}: a token's ratio does not correct the tokens "
                "after it, which older weights sampled, so their share of its advantage is "
                "biased; use discount=0 and no task reward, or no replay"
            )
        return self

    @model_validator(mode="after")
    def _hidden_states_are_not_kept(self) -> Self:
        if self.replay is not None and needs_hidden_states(self.objective):
            raise ValueError(
                f"replay with objective.kind={self.objective.kind} over the full vocabulary: the "
                "teacher's hidden states are thousands of numbers a token and are not kept; use "
                "objective.kind=top_k, or objective.kl_baseline.kind=top_k or none"
            )
        return self

    @model_validator(mode="after")
    def _a_step_fits_the_replay_buffer(self) -> Self:
        replay = self.replay
        if replay is None:
            return self
        rollouts = self.rollouts_per_step
        if replay.capacity_rollouts is not None and replay.capacity_rollouts < rollouts:
            raise ValueError(
                f"replay.capacity_rollouts={replay.capacity_rollouts} is below one step's "
                f"{rollouts} rollouts (prompts_per_step x samples_per_prompt); raise it"
            )
        least = rollouts * self.sampling.max_new_tokens
        if replay.capacity_tokens < least:
            raise ValueError(
                f"replay.capacity_tokens={replay.capacity_tokens} is below what one step may "
                f"sample: {rollouts} rollouts of up to {self.sampling.max_new_tokens} tokens are "
                f"{least}; raise it, with room for the prompts"
            )
        return self

    @model_validator(mode="after")
    def _training_and_evaluation_problems_are_apart(self) -> Self:
        evaluation = self.evaluation
        if (
            evaluation is not None
            and evaluation.prompts.kind == "task"
            and self.prompts.kind == "task"
            and evaluation.prompts.split == self.prompts.split
        ):
            raise ValueError(
                f"prompts.split and evaluation.prompts.split are both {self.prompts.split!r}: "
                "the evaluation would not be held out; train on `train`, evaluate on `eval`"
            )
        return self

    @model_validator(mode="after")
    def _task_reward_needs_a_verifier_and_groups(self) -> Self:
        objective = self.objective
        if objective.kind != "sampled_reverse_kl" or objective.task_reward_weight == 0:
            return self
        if self.verifier is None:
            raise ValueError("objective.task_reward_weight > 0 needs a `verifier` section")
        if self.samples_per_prompt < 2:
            raise ValueError(
                "objective.task_reward_weight > 0 with samples_per_prompt=1: the reward is centred "
                "within a prompt's samples, so with one sample it is always 0; use 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _math_verifier_needs_references(self) -> Self:
        pairs: list[tuple[str, Any, Any]] = [("verifier", self.verifier, self.prompts)]
        if self.evaluation is not None:
            pairs.append(("evaluation", self.evaluation.verifier, self.evaluation.prompts))
        for where, verifier, prompts in pairs:
            if verifier is None:
                continue
            if verifier.kind == "task" and prompts.kind != "task":
                raise ValueError(f"{where}: a task verifier needs prompts of kind `task`")
            if verifier.kind == "math" and prompts.kind == "task":
                raise ValueError(f"{where}: a math verifier needs prompts with an answer_field")
            if verifier.kind == "math" and prompts.answer_field is None:
                raise ValueError(
                    f"{where}: the math verifier compares with a reference answer; set answer_field"
                )
        return self

    @property
    def output_path(self) -> Path:
        return Path(self.output_dir)

    @property
    def max_in_flight(self) -> int:
        """Rollouts that a streaming pipeline has sampled at a time."""
        pipeline = self.pipeline
        limit = pipeline.max_in_flight if pipeline.kind == "streaming" else None
        return limit or self.generation.max_sequences

    @property
    def max_steps_ahead(self) -> int:
        """Steps beyond the coming one that a streaming pipeline has rollouts out for."""
        pipeline = self.pipeline
        if pipeline.kind != "streaming":
            return 0
        ahead = pipeline.max_steps_ahead
        return pipeline.max_staleness_steps if ahead is None else ahead

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt
