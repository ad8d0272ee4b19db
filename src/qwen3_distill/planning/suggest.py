"""Searches settings for the most tokens per second that the memory plan allows.

Settings of speed and memory are searched together; those that change what is learned (rollouts of a
step, samples of a prompt, streaming) only in variants of their own, each named. A cluster's cards
are laid out in each way of `layouts`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_distill.config import RunConfig, StreamingPipeline
from qwen3_distill.config.load import check_config, dump_config
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.shapes import ModelShape
from qwen3_distill.planning import memory
from qwen3_distill.planning.cards import lay_out_cards, plan_cards, plan_of
from qwen3_distill.planning.device import DeviceMemory
from qwen3_distill.planning.layouts import layouts
from qwen3_distill.planning.memory import Models
from qwen3_distill.planning.plan import MemoryPlan
from qwen3_distill.planning.rates import Rates
from qwen3_distill.planning.time_plan import Assumed, Planned, TimePlan, plan_time

_GAIN = 1.02
"""Least gain in tokens per second that is worth a suggestion."""
_SEQUENCES = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
_MICRO_BATCHES = (2048, 4096, 5120, 8192, 10240, 16384, 20480)
_LARGE_CARD_BYTES = 80e9
_LEAST_ON_LARGE_CARDS = 4096
"""Tokens of the smallest micro-batch on such a card: smaller ones, which leave the GPU waiting for
the host, were not measured on any, so the time plan does not know what they cost there."""
_SWEEPS = 2
_TIE = 1e-3
"""Settings whose rates or times differ by less are as fast as one another."""
_FP8_CACHE = {"generation.kv_cache_dtype": "fp8", "generation.attention_backend": "flashinfer"}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A run, its device and its assumed lengths: settings are searched for it."""

    config: RunConfig
    student: ModelShape
    teacher: ModelShape | None
    device: DeviceMemory
    rates: Rates
    assumed: Assumed


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Settings with their plans of memory and time."""

    changes: Mapping[str, Any]
    """Settings that differ from the config's, by their keys."""
    meaning: tuple[str, ...]
    """Changes of the optimization, for people; empty: none."""
    config: RunConfig
    memory: MemoryPlan
    """That of the fullest card."""
    plan: TimePlan

    @property
    def overrides(self) -> tuple[str, ...]:
        """Words to type after ``--config FILE``."""
        return tuple(f"{key}={_value(value)}" for key, value in self.changes.items())


@dataclass(frozen=True)
class _Variant:
    """Settings that change the optimization, and how."""

    changes: dict[str, Any]
    meaning: tuple[str, ...]


def suggest(situation: Situation, count: int = 3) -> list[Suggestion]:
    """Return the fastest settings that fit: ``count`` of each kind, the fastest first.

    The config itself need not fit: then the fastest of all that do are returned.

    Raises:
        ConfigError: an engine of the cluster has no card.
    """
    config = situation.config
    refuse_without_cards(config)
    now = _fitting(situation, {}, ())
    found = [
        _search(situation, _Variant(each.changes | layout, each.meaning))
        for each in _variants(config, situation.device, situation.rates)
        for layout in layouts(config)
    ]
    fitting = [each for each in found if each is not None]
    kept = [each for each in fitting if not each.meaning]
    # Nothing is gained over a config that does not fit: then over the best that leaves it as it is.
    rates = [each.plan.tokens_per_s for each in ([now] if now is not None else kept)]
    least = max(rates, default=0.0) * _GAIN
    faster = [each for each in fitting if each.plan.tokens_per_s > least]
    if now is not None:
        kept = [each for each in faster if not each.meaning]
    return [*_best(kept, count), *_best([each for each in faster if each.meaning], count)]


def refuse_without_cards(config: RunConfig) -> None:
    """Refuse a cluster of which an engine computes on the CPU: its time is not predicted.

    Raises:
        ConfigError: an engine has no card.
    """
    for name in ("rollouts", "teachers", "learner"):
        engines = getattr(config.cluster, name, None)
        if engines is not None and engines.cards == 0:
            raise ConfigError(
                f"--suggest plans cards, and cluster.{name}.cards=0 has none; give it a card, or "
                "drop --suggest"
            )


def _best(found: list[Suggestion], count: int) -> list[Suggestion]:
    """Return the fastest, without those that change more than another that is as fast."""
    ranked = sorted(found, key=lambda each: -each.plan.tokens_per_s)
    chosen: list[Suggestion] = []
    for one in ranked:
        rate = one.plan.tokens_per_s / _GAIN
        rivals = [other for other in ranked if other is not one and other.plan.tokens_per_s > rate]
        if not any(len(other.meaning) < len(one.meaning) for other in rivals):
            chosen.append(one)
    return chosen[:count]


def evaluated(situation: Situation, laid_out: MemoryPlan) -> TimePlan:
    """Return the time plan of the config itself.

    Args:
        laid_out: memory of the card that the learner is on.
    """
    planned = Planned(
        config=situation.config,
        student=situation.student,
        teacher=situation.teacher,
        recomputed_layers=recomputed_layers(situation.config, situation, laid_out),
    )
    return plan_time(planned, situation.rates, situation.assumed)


def _variants(config: RunConfig, device: DeviceMemory, rates: Rates) -> Iterator[_Variant]:
    """Iterate over changes of the optimization, none first."""
    pipelines: list[dict[str, Any] | None] = [None]
    if config.pipeline.kind == "sequential":
        # MPS is not known to work where CPU and GPU share the memory.
        mps = device.kind != "unified" and not rates.unified
        pipelines.append(
            {"kind": "streaming", "mps": mps, "max_staleness_steps": 8, "max_steps_ahead": 3}
        )
    for pipeline in pipelines:
        for times in (1, 2, 4):
            for samples in dict.fromkeys((config.samples_per_prompt, 4)):
                variant = _variant(config, pipeline, times, samples)
                if variant is None:
                    continue
                yield variant
                # In a sequential loop the host bounded a decode step, and nothing was gained.
                streams = pipeline is not None or config.pipeline.kind == "streaming"
                if streams and _may_cache_in_fp8(config, rates):
                    changes = variant.changes | _FP8_CACHE
                    yield _Variant(changes, (*variant.meaning, *_cache_meaning(config)))


def _may_cache_in_fp8(config: RunConfig, rates: Rates) -> bool:
    """Whether vLLM could have the attention for a cache in FP8 that was measured on Hopper."""
    generation = config.generation
    if generation.kind != "vllm" or not rates.hopper or config.objective.lacks_ratio:
        return False
    return generation.dtype == "bfloat16" and generation.attention_backend is None


def _cache_meaning(config: RunConfig) -> Iterator[str]:
    """Say what FlashInfer over a cache in FP8 changes: where it is in FP8 already, nothing."""
    if getattr(config.generation, "kv_cache_dtype", "auto") == "auto":
        yield "what answers: the student with keys and values in FP8"


def _variant(
    config: RunConfig, pipeline: dict[str, Any] | None, times: int, samples: int
) -> _Variant | None:
    changes: dict[str, Any] = {}
    meaning: list[str] = []
    before, rollouts = config.rollouts_per_step, config.rollouts_per_step * times
    if rollouts % samples:
        return None
    if (prompts := rollouts // samples) != config.prompts_per_step:
        changes["prompts_per_step"] = prompts
    if times > 1:
        meaning.append(f"the batch: {before} -> {rollouts} rollouts of an optimizer step")
    if samples != config.samples_per_prompt:
        changes["samples_per_prompt"] = samples
        had = config.samples_per_prompt
        meaning.append(f"the batch: {samples} answers of a prompt instead of {had}")
    if pipeline is not None:
        changes["pipeline"] = pipeline
        meaning.append("on-policy: a token may be 8 steps old when it is trained on (streaming)")
    return _Variant(changes, tuple(meaning))


def _search(situation: Situation, variant: _Variant) -> Suggestion | None:
    """Improve one setting after another, as long as it gains; where nothing fits yet, try all."""
    best = _fitting(situation, variant.changes, variant.meaning)
    settings = list(_settings(situation))
    if best is None:
        best, settings = _search_all(situation, variant), []
    if best is None:
        return None
    for _ in range(_SWEEPS):
        improved = False
        for key, values in (*settings, *_rows(best.config)):
            for value in values:
                changes = {**best.changes, key: value}
                tried = _faster(situation, changes, variant.meaning, best)
                if tried is not None:
                    best, improved = tried, True
        if not improved:
            break
    return _fewer_launches(situation, variant, best)


def _fewer_launches(situation: Situation, variant: _Variant, best: Suggestion) -> Suggestion:
    """Enlarge the best's micro-batches where that costs nothing and a slow host would gain.

    Not where the learner shares its GPU with decoding, which its longer kernels seem to keep
    waiting: the rates that were measured are no better (docs/measured/overlap.md).
    """
    if isinstance(best.config.pipeline, StreamingPipeline):
        return best
    least = (1 - _TIE) * best.plan.tokens_per_s
    for size in _MICRO_BATCHES:
        if size <= best.config.training.micro_batch_tokens:
            continue
        changes = {**best.changes, "training.micro_batch_tokens": size}
        tried = _evaluate(situation, changes, variant.meaning)
        if tried is None or tried.plan.tokens_per_s < least:
            continue
        gains = tried.plan.slow_host_s < (1 - _TIE) * best.plan.slow_host_s
        if gains and _is_planned(situation, tried):
            best = tried
    return best


def _search_all(situation: Situation, variant: _Variant) -> Suggestion | None:
    """Try all settings together: it may take two that are lowered at once to fit."""
    best: Suggestion | None = None
    kept = [[(key, None), *((key, value) for value in v)] for key, v in _settings(situation)]
    for chosen in itertools.product(*kept):
        lowered = {key: value for key, value in chosen if value is not None}
        changes = variant.changes | lowered
        best = _faster(situation, changes, variant.meaning, best) or best
    return best


def _faster(
    situation: Situation,
    changes: dict[str, Any],
    meaning: tuple[str, ...],
    best: Suggestion | None,
) -> Suggestion | None:
    """Return changed settings if they are planned and faster than the best by a thousandth.

    A tie keeps what is there.
    """
    tried = _evaluate(situation, changes, meaning)
    if tried is None:
        return None
    if best is not None and tried.plan.tokens_per_s <= (1 + _TIE) * best.plan.tokens_per_s:
        return None
    return tried if _is_planned(situation, tried) else None


def _settings(situation: Situation) -> Iterator[tuple[str, Sequence[Any]]]:
    """Iterate over settings that change speed and memory only."""
    config, device = situation.config, situation.device
    most, cache = max(_SEQUENCES), getattr(config.generation, "kv_cache_gib", None)
    if cache is not None:  # more rollouts than the stated cache holds would wait in the engine
        most = config.generation.max_sequences
    yield "generation.max_sequences", [number for number in _SEQUENCES if number <= most]
    if config.generation.kind == "vllm" and config.training.tuning.kind == "lora":
        yield "generation.adapters", ("merge", "swap")
    least = 0
    if device.kind == "cuda" and device.free_bytes >= _LARGE_CARD_BYTES:
        least = min(_LEAST_ON_LARGE_CARDS, config.training.micro_batch_tokens)
    yield "training.micro_batch_tokens", [size for size in _MICRO_BATCHES if size >= least]


def _rows(config: RunConfig) -> Iterator[tuple[str, Sequence[Any]]]:
    """Iterate over how unsloth lays out sequences, as was measured; none is needed to fit."""
    training = config.training
    if training.kind != "unsloth" or training.tuning.kind != "lora":
        return
    if config.samples_per_prompt > 1:
        yield "training.shared_prompts", (True,)


def _fitting(
    situation: Situation, changes: dict[str, Any], meaning: tuple[str, ...]
) -> Suggestion | None:
    """Plan memory and time of changed settings; None if the memory plan does not accept them."""
    return _faster(situation, changes, meaning, None)


def _evaluate(
    situation: Situation, changes: dict[str, Any], meaning: tuple[str, ...]
) -> Suggestion | None:
    """Plan memory and time of changed settings; None if they are refused or do not fit."""
    try:
        config = _changed(situation.config, changes) if changes else situation.config
        timed = config.model_copy(update={"evaluation": None})  # no part of tokens per second
    except ConfigError:
        return None
    shapes = {"student_shape": situation.student, "teacher_shape": situation.teacher}
    cards = lay_out_cards(config, device=situation.device, **shapes)
    if not all(card.plan.fits for card in cards):
        return None
    planned = Planned(
        config=timed,
        student=situation.student,
        teacher=situation.teacher,
        recomputed_layers=recomputed_layers(config, situation, plan_of("learner", cards)),
    )
    return Suggestion(
        changes=changes,
        meaning=(*meaning, *_in_flight_meaning(situation.config, config)),
        config=config,
        memory=max((card.plan for card in cards), key=lambda plan: plan.required_bytes),
        plan=plan_time(planned, situation.rates, situation.assumed),
    )


def _in_flight_meaning(before: RunConfig, after: RunConfig) -> Iterator[str]:
    """Say that rollouts in flight decide how old tokens are, where the run streams already."""
    was, now = before.max_in_flight, after.max_in_flight
    if before.pipeline.kind == "streaming" and was != now:
        yield f"how old tokens are: {was} -> {now} rollouts in flight"


def recomputed_layers(config: RunConfig, situation: Situation, laid_out: MemoryPlan) -> int:
    """Return how many layers of the student the learner recomputes with a memory plan."""
    models = Models(student=situation.student, teacher=situation.teacher)
    room = laid_out.learner_memory_bytes
    return memory.checkpointing(config, models, laid_out.device, room).recomputed_layers


def _is_planned(situation: Situation, found: Suggestion) -> bool:
    """Whether the whole memory plan accepts it, loading included."""
    try:
        plan_cards(
            found.config,
            device=situation.device,
            student_shape=situation.student,
            teacher_shape=situation.teacher,
        )
    except ConfigError:
        return False
    return True


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return the checked config with other settings.

    Raises:
        ConfigError: they are refused.
    """
    values = dump_config(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    return check_config(values, "suggested settings")


def _value(value: Any) -> str:
    """Write a value as an override of the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, dict):
        return str(value)
    inner = ", ".join(f"{key}: {_value(each)}" for key, each in value.items())
    return f"'{{{inner}}}'"
