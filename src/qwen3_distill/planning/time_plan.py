"""Predicts the time of a run: seconds a step by stage, what bounds each, tokens per second, hours.

The memory plan says what fits (`planning.plan`), this one how long it takes. It is a prediction: a
roofline with shares measured on one kind of device. How far it was off on results that did not fit
it: docs/measured/time-plan.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from qwen3_distill.config import RunConfig, candidates_per_token
from qwen3_distill.modeling.shapes import ModelShape
from qwen3_distill.modeling.step_memory import arithmetic_of
from qwen3_distill.planning import rates as shares
from qwen3_distill.planning import roofline
from qwen3_distill.planning.rates import EFFICIENCY, Efficiency, Rates
from qwen3_distill.planning.roofline import Decoding, Model, StageTime, Training
from qwen3_distill.planning.work import Answers, Rollouts, shared_rows
from qwen3_distill.utils.batches import packed_rows, padded_batches

_ITEMSIZE = {"float32": 4, "bfloat16": 2}

Stage: TypeAlias = Literal["sampling", "scoring", "training", "publishing", "host"]
_MUCH_LONGER = 1.05
"""A slow host is named where it would make training take more than this many times as long."""
MEASURED_CANDIDATES = 16
"""Candidates of the teacher for a token whose cost was measured."""
STAGES: tuple[Stage, ...] = ("sampling", "scoring", "training", "publishing", "host")


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Lengths that a plan has to assume."""

    prompt_tokens: int
    answers: Answers


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A config with its models' shapes and the memory plan's choice."""

    config: RunConfig
    student: ModelShape
    teacher: ModelShape | None
    recomputed_layers: int


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """The predicted time of a run."""

    rates: Rates
    stages: Mapping[Stage, StageTime]
    """Each stage of a step by itself; in streaming they overlap."""
    step_s: float
    """Seconds of a whole step."""
    slow_host_s: float
    """Seconds of a whole step with a slow host that was measured under a learner, which waits for
    it with small micro-batches; `step_s` where it would not."""
    new_tokens: float
    """Tokens sampled for a step."""
    run_s: float
    """Seconds of all steps, evaluations and checkpoints; starts are left out."""
    evaluation_s: float
    """Seconds of evaluations, a part of `run_s`."""
    devices: int
    price_per_device_hour: float | None
    currency: str
    notes: tuple[str, ...]
    """Parts of this config's time that are left out, a slow host's among them."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens over the time of whole steps."""
        return self.new_tokens / self.step_s

    @property
    def bound(self) -> str:
        """The longest stage and what bounds it."""
        stage = max(self.stages, key=lambda name: self.stages[name].seconds)
        return f"{stage} ({self.stages[stage].bound})"

    @property
    def money(self) -> float | None:
        """Price of the devices for the run; None without a price."""
        if self.price_per_device_hour is None:
            return None
        return self.run_s / 3600 * self.devices * self.price_per_device_hour


def assumed_lengths(
    config: RunConfig,
    *,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    tail: float = 1.0,
) -> Assumed:
    """Return the lengths to plan with; without wishes every answer is the longest allowed.

    Args:
        response_tokens: median length of answers.
        tail: 99th percentile over the median.
    """
    longest = config.sampling.max_new_tokens
    answers = Answers(median_tokens=response_tokens or longest, tail=tail, max_tokens=longest)
    return Assumed(prompt_tokens=prompt_tokens or config.planning.prompt_tokens, answers=answers)


def plan_time(
    planned: Planned, rates: Rates, assumed: Assumed, share: Efficiency = EFFICIENCY
) -> TimePlan:
    """Predict a run's time.

    Raises:
        ConfigError: the assumed lengths are impossible.
    """
    config = planned.config
    rollouts = Rollouts.of(
        assumed.answers,
        count=config.rollouts_per_step,
        prompt_tokens=assumed.prompt_tokens,
        samples_per_prompt=config.samples_per_prompt,
    )
    stages: dict[Stage, StageTime] = {
        stage: time.times(_times_per_step(config, stage) / _devices_of(config, stage))
        for stage, time in _stages(planned, rates, rollouts, share).items()
    }
    step_s = _step_seconds(config, stages, share)
    waiting: dict[Stage, StageTime] = {
        **stages,
        "training": _on_slow_host(planned, rates, rollouts, share),
    }
    evaluation_s = _evaluation_seconds(planned, rates, assumed, share)
    return TimePlan(
        rates=rates,
        stages=stages,
        step_s=step_s,
        slow_host_s=_step_seconds(config, waiting, share),
        new_tokens=rollouts.new_tokens * max(_times_per_step(config, "sampling"), 1e-9),
        run_s=config.steps * step_s + evaluation_s,
        evaluation_s=evaluation_s,
        devices=config.cost.devices,
        price_per_device_hour=config.cost.price_per_device_hour,
        currency=config.cost.currency,
        notes=(*_notes(config, rates), *_of_slow_host(stages["training"], waiting["training"])),
    )


# --- Stages -------------------------------------------------------------------------------------


def student_model(planned: Planned, rates: Rates) -> Model:
    """Describe the student as the sampling engine computes with it."""
    generation, shape = planned.config.generation, planned.student
    return Model(
        shape=shape,
        itemsize=_ITEMSIZE[generation.dtype],
        fp8=shape.fp8_checkpoint or getattr(generation, "quantization", None) is not None,
        kv_itemsize=1 if _reads_fp8_cache(planned.config, rates) else None,
    )


def _reads_fp8_cache(config: RunConfig, rates: Rates) -> bool:
    """Whether decoding gains from a cache in FP8, as was measured: while streaming, on Hopper.

    In a sequential loop the host bounded a decode step, and nothing was gained.
    """
    return _flashinfer_in_fp8(config) and rates.hopper and config.pipeline.kind == "streaming"


def _flashinfer_in_fp8(config: RunConfig) -> bool:
    """Whether vLLM has FlashInfer's attention over a cache in FP8; no other gains from it."""
    generation = config.generation
    if generation.kind != "vllm" or generation.kv_cache_dtype != "fp8":
        return False
    return generation.attention_backend == "flashinfer"


def teacher_model(planned: Planned) -> Model:
    """Describe the teacher as the scoring engine computes with it."""
    scoring, shape = planned.config.teacher, planned.teacher
    assert shape is not None
    online = getattr(scoring, "quantization", None) is not None
    return Model(
        shape=shape,
        itemsize=_ITEMSIZE[scoring.dtype],
        fp8=shape.fp8_checkpoint or online,
        fp8_blocks=shape.fp8_checkpoint and not shape.fp8_per_channel,
        float32_head=bool(getattr(scoring, "float32_head", False)),
        tf32_head=bool(getattr(scoring, "server_arguments", {}).get("enable-tf32-matmul", False)),
    )


def decoding_settings(config: RunConfig) -> Decoding:
    """Describe the settings of one sampling engine."""
    generation = config.generation
    sequences = generation.max_sequences
    if generation.kind == "vllm":
        eager = generation.enforce_eager
        return Decoding(
            max_sequences=sequences,
            eager_kernels=shares.EAGER_KERNELS_PER_LAYER if eager else None,
            adapter=config.training.tuning.kind == "lora" and generation.adapters == "swap",
        )
    graphs = generation.batching == "static" and generation.device != "cpu"
    return Decoding(
        max_sequences=sequences,
        eager_kernels=None if graphs else shares.EMBEDDED_KERNELS_PER_LAYER,
        adapter=config.training.tuning.kind == "lora",
    )


def _stages(
    planned: Planned, rates: Rates, rollouts: Rollouts, share: Efficiency
) -> dict[Stage, StageTime]:
    config = planned.config
    nothing = StageTime({"host": 0.0})
    scored = nothing
    if config.objective.score_request is not None and planned.teacher is not None:
        scoring = config.teacher
        # vLLM computes the logits of a prompt's part at once.
        chunk_tokens = (
            scoring.chunked_prefill_tokens if scoring.kind == "vllm" else scoring.chunk_tokens
        )
        teacher = teacher_model(planned)
        scored = roofline.scoring(
            teacher,
            rates,
            rollouts,
            chunk_tokens=chunk_tokens,
            candidates=_names_candidates(config),
            share=share,
        )
    adapter = (
        config.generation.kind == "vllm"
        and config.generation.adapters == "swap"
        and config.training.tuning.kind == "lora"
    )
    weights = planned.student.weight_bytes(_ITEMSIZE[config.generation.dtype])
    return {
        "sampling": _sampling(planned, rates, rollouts, share),
        "scoring": scored,
        "training": roofline.training(
            planned.student, rates, training_work(planned, rollouts), rollouts, share
        ),
        "publishing": roofline.publishing(weights, rates, adapter=adapter, share=share),
        "host": StageTime({"host": share.host_s_per_rollout * rollouts.count}),
    }


def _sampling(planned: Planned, rates: Rates, rollouts: Rollouts, share: Efficiency) -> StageTime:
    """Predict sampling by all engines, each of which pays for its own decode steps."""
    config, model = planned.config, student_model(planned, rates)
    engines, decoding = config.num_rollout_engines, decoding_settings(config)
    if config.pipeline.kind == "streaming":
        found = roofline.steady_sampling(model, rates, decoding, rollouts, share)
        return found.times(1 / engines)
    return roofline.sampling(model, rates, decoding, rollouts.of_one(engines), share)


def training_work(planned: Planned, rollouts: Rollouts) -> Training:
    """Describe the learner's settings and lay out its micro-batches."""
    config, training = planned.config, planned.config.training
    lengths, prompt_tokens = rollouts.lengths, rollouts.prompt_tokens
    packed = training.shared_prompts or (training.kind == "unsloth" and training.packing is True)
    if training.shared_prompts:
        samples, most = config.samples_per_prompt, training.micro_batch_tokens
        rows = shared_rows(rollouts.responses, prompt_tokens, samples, most)
        batches = [[prompt_tokens + tokens for tokens in answers] for answers, _ in rows]
        prompts = [number for _, number in rows]
    else:
        laid_out = packed_rows if packed else padded_batches  # as the learner does
        groups = laid_out(lengths, training.micro_batch_tokens)
        batches, prompts = [[lengths[index] for index in group] for group in groups], None
    on_gpu = not (training.kind == "embedded" and training.device == "cpu")
    arithmetic = arithmetic_of(training, on_gpu=on_gpu)
    return Training(
        tuning=training.tuning,
        micro_batches=batches,
        prompts=prompts,
        packed=packed,
        own_attention=training.kind == "unsloth" and packed,
        fp8_backward=training.base_precision == "fp8_backward",
        candidates=candidates_per_token(config.objective) > 0,
        recomputed_layers=planned.recomputed_layers,
        float32=arithmetic == "float32",
        float32_weights=training.dtype == "float32",
    )


# --- Steps --------------------------------------------------------------------------------------


def _times_per_step(config: RunConfig, stage: Stage) -> float:
    """How often a stage works on a step's rollouts, per optimizer step."""
    if stage in ("training", "publishing"):
        return 1.0
    if config.pipeline.kind == "offline" and config.pipeline.collect_steps is not None:
        fresh = config.pipeline.collect_steps / config.steps
    elif config.replay is not None:
        fresh = 1 / config.replay.updates_per_batch
    else:
        fresh = 1.0
    return 0.0 if stage == "sampling" and config.rollouts.source == "file" else min(1.0, fresh)


def _devices_of(config: RunConfig, stage: Stage) -> int:
    """Devices that share a stage's work; of sampling, an engine's: its engines share no step."""
    cluster = config.cluster
    if cluster is None:
        return 1
    if stage == "sampling" and cluster.rollouts is not None:
        return max(1, cluster.rollouts.cards)
    if stage == "scoring" and cluster.teachers is not None:
        return max(1, cluster.teachers.replicas * cluster.teachers.cards)
    if stage == "training" and cluster.learner is not None:
        return cluster.learner.ranks
    return 1


def _step_seconds(config: RunConfig, stages: Mapping[Stage, StageTime], share: Efficiency) -> float:
    """Seconds of a step: all stages, or in streaming those of the busiest card."""
    if config.pipeline.kind != "streaming":
        return sum(time.seconds for time in stages.values())
    # Kernels of stages on one card share it; weights are pushed while decoding goes on.
    longest = 0.0
    for group in _cards(config):
        seconds = [stages[stage].seconds for stage in group]
        factor = share.streaming_mps if config.pipeline.mps else share.streaming_slices
        alone = len([each for each in seconds if each > 0]) < 2
        longest = max(longest, sum(seconds) if alone else factor * sum(seconds), *seconds)
    return max(longest, stages["host"].seconds)


def _cards(config: RunConfig) -> Iterator[list[Stage]]:
    """The stages on each kind of card."""
    cluster, shared = config.cluster, ["training"]
    own: list[list[Stage]] = []
    names: tuple[Stage, ...] = ("sampling", "scoring")
    for stage in names:
        section = None
        if cluster is not None:
            section = cluster.rollouts if stage == "sampling" else cluster.teachers
        if section is None or section.where == "with_learner":
            shared.append(stage)
        else:
            own.append([stage])
    yield [stage for stage in STAGES if stage in shared]
    yield from own


def _evaluation_seconds(
    planned: Planned, rates: Rates, assumed: Assumed, share: Efficiency
) -> float:
    """Seconds of the student's evaluations; the teacher's is left out."""
    config, evaluation = planned.config, planned.config.evaluation
    if evaluation is None:
        return 0.0
    during = sum(evaluation.is_due(step, config.steps) for step in range(1, config.steps))
    longest = evaluation.sampling.max_new_tokens
    median = min(assumed.answers.median_tokens, longest)
    answers = Answers(median_tokens=median, tail=assumed.answers.tail, max_tokens=longest)
    total, ends = 0.0, evaluation.final_num_problems or evaluation.num_problems
    for times, problems in ((during, evaluation.num_problems), (2, ends)):
        if not times:
            continue
        rollouts = Rollouts.of(
            answers,
            count=problems * evaluation.samples_per_problem,
            prompt_tokens=assumed.prompt_tokens,
            samples_per_prompt=evaluation.samples_per_problem,
        )
        model, decoding = student_model(planned, rates), decoding_settings(config)
        of_one = rollouts.of_one(config.num_rollout_engines)
        sampled = roofline.sampling(model, rates, decoding, of_one, share)
        total += times * sampled.seconds / _devices_of(config, "sampling")
    return total * (2 if evaluation.second_temperature is not None else 1)


def _on_slow_host(
    planned: Planned, rates: Rates, rollouts: Rollouts, share: Efficiency
) -> StageTime:
    """Predict training with a slow host that was measured; what was measured is unsloth.

    A backward pass counts as two forward passes: a layer that is recomputed launches a third more.
    """
    training, work = planned.config.training, training_work(planned, rollouts)
    if training.kind == "unsloth":
        layer_s = shares.SLOW_HOST_S_PER_LAYER[training.base_precision]
        layer_s *= 1 + work.recomputed_layers / planned.student.num_layers / 3
        launch_s = layer_s / work.kernels_per_layer
        rates = replace(rates, launch_s=max(launch_s, rates.launch_s))
    found = roofline.training(planned.student, rates, work, rollouts, share)
    return found.times(1 / _devices_of(planned.config, "training"))


def _of_slow_host(here: StageTime, slow: StageTime) -> Iterator[str]:
    """Say how long training would take with a slow host that was measured, if longer."""
    if slow.seconds > _MUCH_LONGER * here.seconds:
        yield (
            f"a slow host: with one that was measured training takes {slow.seconds:.1f} s in place "
            f"of {here.seconds:.1f}, to launch it; larger micro-batches "
            "(training.micro_batch_tokens) need fewer launches"
        )


def _names_candidates(config: RunConfig) -> bool:
    """Whether the teacher is one whose candidates have a time that was measured."""
    asks = candidates_per_token(config.objective) > 0
    return asks and config.scoring is not None and config.teacher.kind == "sglang"


def _notes(config: RunConfig, rates: Rates) -> Iterator[str]:
    """Say what the prediction leaves out for a config."""
    if "teacher" in config.rollouts.samplers:
        yield "answers sampled by the teacher are counted as the student's"
    candidates = candidates_per_token(config.objective)
    if candidates and not _names_candidates(config):
        yield "candidates of the teacher cost it more than is counted here"
    if candidates not in (0, MEASURED_CANDIDATES):
        yield f"what {candidates} candidates cost beyond {MEASURED_CANDIDATES}, which were measured"
    if _flashinfer_in_fp8(config) and not _reads_fp8_cache(config, rates):
        yield "what a cache in FP8 gains, measured while streaming on Hopper only"
    training = config.training
    padded = training.kind == "unsloth" and training.packing == "auto"
    if padded and not training.shared_prompts:
        yield "micro-batches are taken to be padded; packing, where it works, saves the padding"
    if training.base_precision == "fp8":
        yield "what FP8 in frozen layers gains in both passes"
    if "embedded" in (config.generation.kind, training.kind) or (
        config.scoring is not None and config.scoring.kind == "embedded"
    ):
        yield (
            "shares of the embedded engines were not measured; those of vLLM, SGLang and "
            "unsloth are used"
        )
    if config.cluster is not None:
        yield "what several cards lose by talking to one another"
    evaluation = config.evaluation
    if evaluation is not None and evaluation.teacher:
        yield "the teacher's own evaluation"
