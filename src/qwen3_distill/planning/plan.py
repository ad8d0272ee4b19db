"""Divides one device's memory among the engines, before anything is started.

A scoring server takes a share of the memory that it finds free. It is started first and alone, so
that this is the memory that the plan assumes.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3_distill.config import (
    ClusterConfig,
    ClusterLearner,
    LoraTuning,
    RunConfig,
    ScoringConfig,
)
from qwen3_distill.config.yaml12 import parse_yaml
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.shapes import ModelShape, read_shape
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning import memory
from qwen3_distill.planning.device import DeviceMemory, detect_memory, memory_to_plan
from qwen3_distill.planning.memory import ENGINES, Engine, Models, PlanRow
from qwen3_distill.recording.text import gibibytes

_DEFAULT_RESERVE_BYTES = 8 * GIB
_DEFAULT_RESERVE_FRACTION = 1 / 8
_LARGEST_FRACTION = 0.95
_LORA = LoraTuning(kind="lora")


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A change of the config and the memory that it frees."""

    change: str
    frees_bytes: int


@dataclass(frozen=True, kw_only=True)
class TeacherShare:
    """The memory of one teacher's server; zeros for a teacher without a server here."""

    static_bytes: int
    memory_fraction: float
    max_total_tokens: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory that each engine may use."""

    device: DeviceMemory
    rows: tuple[PlanRow, ...]
    reserve_bytes: int
    vllm_kv_cache_bytes: int
    """Key-value cache of the rollout engine."""
    sglang_memory_fraction: float
    """Share of the memory that is free when the scoring server starts, before all other engines.
    Unused if the servers run elsewhere."""
    sglang_max_total_tokens: int
    """Tokens of the scoring server's key-value cache."""
    teacher_cache_bytes: int
    """The same in bytes: vLLM's server is told a size."""
    learner_memory_bytes: int
    """The learner's share of the device: PyTorch's memory and CUDA's context."""
    teacher_static_bytes: int
    """Weights and cache of the scoring server, with a margin for errors of measurement."""
    teachers: Mapping[str, TeacherShare] = field(default_factory=dict)
    """By name, every teacher's share; the four settings of a teacher above are the first one's."""

    @property
    def required_bytes(self) -> int:
        """All rows and the reserve."""
        return sum(row.num_bytes for row in self.rows) + self.reserve_bytes

    @property
    def fits(self) -> bool:
        return self.required_bytes <= self.device.free_bytes

    def engine_bytes(self, engine: Engine) -> int:
        """Sum of an engine's rows."""
        return sum(row.num_bytes for row in self.rows if row.engine == engine)

    def for_teacher(self, name: str) -> "MemoryPlan":
        """Copy the plan with the settings of one of several teachers' servers.

        Args:
            name: `NamedTeacher.name`.
        """
        share = self.teachers[name]
        return replace(
            self,
            sglang_memory_fraction=share.memory_fraction,
            sglang_max_total_tokens=share.max_total_tokens,
            teacher_cache_bytes=share.cache_bytes,
            teacher_static_bytes=share.static_bytes,
        )

    def teacher_memory_fraction(self, free_bytes: int) -> float:
        """The share that a server needs if ``free_bytes`` are free."""
        return _fraction(self.teacher_static_bytes, free_bytes)


def fraction_of_free_memory(plan: MemoryPlan) -> float:
    """Return the share of the memory that is free here and now that a plan's server needs.

    A function of a module: it is sent to a server's worker on another node.
    """
    return plan.teacher_memory_fraction(detect_memory().free_bytes)


def make_plan(
    config: RunConfig,
    *,
    device_memory_bytes: int | None = None,
    device: DeviceMemory | None = None,
    student_shape: ModelShape | None = None,
    teacher_shape: ModelShape | None = None,
    engines: Collection[Engine] = ENGINES,
) -> MemoryPlan:
    """Plan a run's memory. Values that the config states are not changed.

    Args:
        config: the run.
        device_memory_bytes: memory that the engines share; default: the config's
            ``planning.device_memory_gib``, else the memory that is free now.
        device: the device itself, in place of its memory.
        student_shape: default: read from the student's directory.
        teacher_shape: default: read from the teacher's directory.
        engines: those that share the device.

    Raises:
        ConfigError: the engines do not fit; names the plan, the free memory and possible savings.
        ModelError: a model directory has no readable ``config.json``.
    """
    plan = lay_out(
        config,
        device_memory_bytes=device_memory_bytes,
        device=device,
        student_shape=student_shape,
        teacher_shape=teacher_shape,
        engines=engines,
    )
    models = _models(config, student_shape, teacher_shape, engines)
    _check_what_is_stated(config, models, plan)
    if not plan.fits:
        raise ConfigError(_does_not_fit(config, models, plan))
    _check_loading(config, models, plan)
    return plan


def lay_out(
    config: RunConfig,
    *,
    device_memory_bytes: int | None = None,
    device: DeviceMemory | None = None,
    student_shape: ModelShape | None = None,
    teacher_shape: ModelShape | None = None,
    engines: Collection[Engine] = ENGINES,
) -> MemoryPlan:
    """Plan without the checks of `make_plan`: the plan may need more than is free."""
    models = _models(config, student_shape, teacher_shape, engines)
    return _lay_out(config, models, device or planned_device(config, device_memory_bytes))


def _models(
    config: RunConfig,
    student_shape: ModelShape | None,
    teacher_shape: ModelShape | None,
    engines: Collection[Engine],
) -> Models:
    student = student_shape or read_shape(config.student.model)
    teachers = {
        teacher.name: teacher_shape or read_shape(teacher.section.model)
        for teacher in config.loaded_teachers
    }
    return Models(
        student=student,
        teacher=next(iter(teachers.values()), None),
        teachers=teachers,
        engines=frozenset(engines),
    )


def planned_device(
    config: RunConfig, device_memory_bytes: int | None = None, *, unified: bool | None = None
) -> DeviceMemory:
    """Return the device whose memory a plan divides: as given, as configured, or the one here.

    Args:
        device_memory_bytes: default: the config's ``planning.device_memory_gib``.
        unified: as of `memory_to_plan`.
    """
    stated_gib = config.planning.device_memory_gib
    if device_memory_bytes is None and stated_gib is not None:
        device_memory_bytes = int(stated_gib * GIB)
    return memory_to_plan(device_memory_bytes, unified=unified)


def _lay_out(
    config: RunConfig, models: Models, device: DeviceMemory, *, thrifty: bool = False
) -> MemoryPlan:
    """The plan; a ``thrifty`` learner recomputes all it can, however much memory it has."""
    reserve = _reserve_bytes(config, device)
    engines = models.engines
    teacher, shares = _teachers(config, models, device) if "teacher" in engines else ([], {})
    student = memory.student_rows(config, models, device) if "student" in engines else []
    others = reserve + sum(row.num_bytes for row in [*teacher, *student])
    left = device.free_bytes - others
    room = _learner_bytes(config, left - memory.outside_bytes(config, device))
    choice = memory.checkpointing(config, models, device, 0 if thrifty else room)
    learner = memory.learner_rows(config, models, device, choice) if "learner" in engines else []
    none = TeacherShare(static_bytes=0, memory_fraction=0.0, max_total_tokens=0, cache_bytes=0)
    first = next(iter(shares.values()), none)
    return MemoryPlan(
        device=device,
        rows=(*teacher, *student, *learner),
        reserve_bytes=reserve,
        vllm_kv_cache_bytes=memory.student_cache_bytes(config, models),
        sglang_memory_fraction=first.memory_fraction,
        sglang_max_total_tokens=first.max_total_tokens,
        teacher_cache_bytes=first.cache_bytes,
        learner_memory_bytes=room,
        teacher_static_bytes=first.static_bytes,
        teachers=shares,
    )


def _teachers(
    config: RunConfig, models: Models, device: DeviceMemory
) -> tuple[list[PlanRow], dict[str, TeacherShare]]:
    """Plan the teachers in the order in which they start: each finds what those before it left."""
    rows: list[PlanRow] = []
    shares: dict[str, TeacherShare] = {}
    for teacher, one, its_models in memory.each_teacher(config, models):
        held = sum(row.num_bytes for row in rows)
        left = replace(device, free_bytes=max(0, device.free_bytes - held))
        own = memory.teacher_rows(one, its_models, left)
        rows += [replace(row, name=teacher.name) for row in own]
        shares[teacher.name] = _share(one, its_models, left.free_bytes)
    return rows, shares


def _share(config: RunConfig, models: Models, free_bytes: int) -> TeacherShare:
    """Divide off the memory of one teacher's server.

    Args:
        config: the run with this teacher alone.
        free_bytes: what is free when it starts.
    """
    scoring = config.teacher
    static = memory.teacher_static_bytes(config, models, free_bytes)
    stated = scoring.memory_fraction if scoring.kind == "sglang" else None
    if stated is None:
        # The cache is bounded by its tokens: a larger share costs nothing, one that is a little
        # too small ends the server's start.
        static = int(static * 1.05 + max(2 * GIB, free_bytes / 8))
    return TeacherShare(
        static_bytes=static,
        memory_fraction=_fraction(static, free_bytes) if stated is None else stated,
        max_total_tokens=memory.teacher_cache_tokens(config, models),
        cache_bytes=memory.teacher_cache_bytes(config, models),
    )


def _reserve_bytes(config: RunConfig, device: DeviceMemory) -> int:
    if config.planning.reserve_gib is not None:
        return int(config.planning.reserve_gib * GIB)
    return int(min(_DEFAULT_RESERVE_BYTES, device.free_bytes * _DEFAULT_RESERVE_FRACTION))


def _learner_bytes(config: RunConfig, left: int) -> int:
    training = config.training
    if training.kind == "unsloth" and training.memory_gib is not None:
        return int(training.memory_gib * GIB)
    return max(0, left)


def _fraction(static_bytes: int, free_bytes: int) -> float:
    return round(min(_LARGEST_FRACTION, static_bytes / max(1, free_bytes)), 4)


# --- Errors -------------------------------------------------------------------------------------


def _check_what_is_stated(config: RunConfig, models: Models, plan: MemoryPlan) -> None:
    """Refuse stated settings that fail however much memory there is."""
    generation, training = config.generation, config.training
    engines = models.engines
    if "student" in engines and generation.kind == "vllm" and generation.kv_cache_gib is not None:
        longest = generation.max_model_tokens or models.student.context_length
        per_token = models.student.kv_bytes_per_token(memory.student_cache_itemsize(config))
        if plan.vllm_kv_cache_bytes < longest * per_token:
            raise ConfigError(
                f"generation.kv_cache_gib={generation.kv_cache_gib} holds "
                f"{plan.vllm_kv_cache_bytes // per_token} tokens, but one sequence may have "
                f"{longest}; raise it to {gibibytes(longest * per_token)} or lower "
                "generation.max_model_tokens"
            )
    if "teacher" in engines:
        for teacher, one, its_models in memory.each_teacher(config, models):
            _check_stated_teacher(one, its_models, plan.for_teacher(teacher.name), teacher.setting)
    if "learner" in engines and training.kind == "unsloth" and training.memory_gib is not None:
        outside = memory.outside_bytes(config, plan.device)
        needed = plan.engine_bytes("learner") - outside
        if plan.learner_memory_bytes < needed:
            choice = memory.checkpointing(config, models, plan.device, plan.learner_memory_bytes)
            raise ConfigError(
                f"training.memory_gib={training.memory_gib}, but weights, optimizer and a "
                f"micro-batch of {memory.micro_batch_tokens(config, models)} tokens with "
                f"{choice.describe(models.student)} need {gibibytes(needed)}; raise it, or lower "
                "training.micro_batch_tokens"
            )


def _check_stated_teacher(
    config: RunConfig, models: Models, plan: MemoryPlan, setting: str
) -> None:
    scoring = config.teacher
    if scoring.kind == "embedded":
        return
    if scoring.kind == "sglang" and not scoring.urls and scoring.memory_fraction is not None:
        weights = memory.teacher_weight_bytes(config, models)
        if plan.teacher_static_bytes <= weights:
            raise ConfigError(
                f"{setting}.memory_fraction={scoring.memory_fraction} of the "
                f"{gibibytes(plan.device.free_bytes)} that are free is "
                f"{gibibytes(plan.teacher_static_bytes)}, and the teacher's weights alone need "
                f"{gibibytes(weights)}; raise it, or leave it out to have it planned"
            )
    longest = memory.longest_sequence_tokens(config, models)
    if scoring.kind == "vllm" and not scoring.urls:
        longest = memory.vllm_teacher_tokens(config, models)
    if plan.sglang_max_total_tokens <= longest:
        raise ConfigError(
            f"{setting}.max_total_tokens={plan.sglang_max_total_tokens} cannot hold one sequence "
            f"of {longest} tokens; raise it, or leave it out to have it planned"
        )


def _check_loading(config: RunConfig, models: Models, plan: MemoryPlan) -> None:
    """Refuse a teacher whose unquantized weights do not fit while it loads."""
    if "teacher" not in models.engines:
        return
    held = 0
    for teacher, one, its_models in memory.each_teacher(config, models):
        scoring = one.teacher
        if scoring.kind != "embedded" and not scoring.urls:
            loading = memory.teacher_loading_bytes(one, its_models)
            room = plan.device.free_bytes - plan.reserve_bytes - held
            if loading > room:
                raise ConfigError(
                    f"{teacher.setting}.quantization={scoring.quantization} quantizes after "
                    f"loading: the teacher's {gibibytes(loading)} of weights do not fit into "
                    f"{gibibytes(room)} at its start, though the quantized ones would; use an FP8 "
                    "checkpoint of the teacher"
                )
        held += sum(row.num_bytes for row in plan.rows if row.of == ("teacher", teacher.name))


def _does_not_fit(config: RunConfig, models: Models, plan: MemoryPlan) -> str:
    lines = [
        f"the engines need {gibibytes(plan.required_bytes)}, but there are "
        f"{gibibytes(plan.device.free_bytes)} ({plan.device.name}). Planned:"
    ]
    lines += [
        f"  {row.label:8} {row.what:24} {gibibytes(row.num_bytes):>10}  {row.how}"
        for row in plan.rows
    ]
    lines.append(f"  {'reserve':8} {'left free':24} {gibibytes(plan.reserve_bytes):>10}")
    missing = plan.required_bytes - plan.device.free_bytes
    lines.append(f"{gibibytes(missing)} are missing. What would free memory:")
    found = _savings(config, models, plan.device)
    lines += [f"  {saving.change}: {gibibytes(saving.frees_bytes)}" for saving in found]
    if not found:
        lines.append("  nothing in the config: use smaller models or a larger device")
    return "\n".join(lines)


# --- Savings ------------------------------------------------------------------------------------


def _savings(config: RunConfig, models: Models, device: DeviceMemory) -> list[Saving]:
    # Thrifty, or the learner would use what is freed elsewhere.
    before = _lay_out(config, models, device, thrifty=True)
    found = []
    for changes, changed in _changes(config):
        after = _lay_out(changed, models, device, thrifty=True)
        frees = before.required_bytes - after.required_bytes
        if frees >= GIB / 20:
            change = ", ".join(f"{key}={value}" for key, value in changes.items())
            found.append(Saving(change=change, frees_bytes=frees))
    return sorted(found, key=lambda saving: -saving.frees_bytes)


def _changes(config: RunConfig) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Changes that may save memory, each with the changed config."""
    generation, training = config.generation, config.training
    candidates: list[dict[str, Any]] = []
    if generation.kind == "vllm" and generation.kv_cache_gib is not None:
        candidates.append({"generation.kv_cache_gib": generation.kv_cache_gib / 2})
    elif generation.max_sequences > 1:
        candidates.append({"generation.max_sequences": generation.max_sequences // 2})
    if generation.kind == "vllm" and generation.max_model_tokens is None:
        planned = config.planning.prompt_tokens + config.sampling.max_new_tokens
        candidates.append({"generation.max_model_tokens": planned})
    lora = training.tuning.kind == "lora"
    if generation.kind == "vllm" and generation.adapters == "merge" and lora:
        candidates.append({"generation.adapters": "swap"})
    for teacher in config.loaded_teachers:
        candidates += [
            {f"{teacher.setting}.{key}": value for key, value in changes.items()}
            for changes in _teacher_changes(config, teacher.section)
        ]
    if training.tuning.kind == "full":
        candidates.append({"training.tuning": "{kind: lora}"})
    if (sharded := _sharded(config)) is not None:
        candidates.append(sharded)
    if training.micro_batch_tokens > 1024:
        candidates.append({"training.micro_batch_tokens": training.micro_batch_tokens // 2})
    checkpointing = training.gradient_checkpointing
    if training.kind == "unsloth" and checkpointing == "off":
        candidates.append({"training.gradient_checkpointing": "auto"})
    if training.kind == "embedded" and checkpointing is False:
        candidates.append({"training.gradient_checkpointing": True})
    if config.planning.prompt_tokens > 64:
        candidates.append({"planning.prompt_tokens": config.planning.prompt_tokens // 2})
    if config.planning.reserve_gib is not None and config.planning.reserve_gib > 4:
        candidates.append({"planning.reserve_gib": config.planning.reserve_gib / 2})
    for changes in candidates:
        yield changes, _changed(config, changes)


def _teacher_changes(config: RunConfig, scoring: ScoringConfig) -> Iterator[dict[str, Any]]:
    """Changes of a teacher's section that may save memory."""
    if scoring.kind == "embedded" or scoring.urls:
        return
    if scoring.quantization is None:
        yield {"quantization": "fp8"}
    if scoring.kind == "vllm" and scoring.max_model_tokens is None:
        planned = config.planning.prompt_tokens + config.sampling.max_new_tokens
        yield {"max_model_tokens": planned}
    if scoring.kind == "sglang" and scoring.memory_fraction is not None:
        yield {"memory_fraction": None}
    elif scoring.max_total_tokens is not None:
        yield {"max_total_tokens": scoring.max_total_tokens // 2}
    else:
        yield {"request_tokens": scoring.request_tokens // 2}
    if scoring.kind == "sglang" and scoring.chunk_tokens > 512:
        yield {"chunk_tokens": scoring.chunk_tokens // 2}
    if scoring.decode_graphs:
        yield {"decode_graphs": False}
    if scoring.chunked_prefill_tokens > 1024:
        yield {"chunked_prefill_tokens": scoring.chunked_prefill_tokens // 2}


def _sharded(config: RunConfig) -> dict[str, Any] | None:
    """The change to ranks that divide the weights of full tuning; None: they cannot, or do."""
    training = config.training
    learner = None if config.cluster is None else config.cluster.learner
    if training.kind != "embedded" or training.tuning.kind != "full":
        return None
    if training.compiled or (learner is not None and learner.sharded):
        return None
    ranks = max(2, 1 if learner is None else learner.ranks)
    changes: dict[str, Any] = {} if training.own_process else {"training.own_process": True}
    return changes | {"cluster.learner": f"{{ranks: {ranks}, sharded: true}}"}


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A copy with other settings, not validated: it is measured, never run."""
    settings = {teacher.setting: teacher for teacher in config.loaded_teachers}
    for key, value in changes.items():
        section_name, _, name = key.rpartition(".")
        if (teacher := settings.get(section_name)) is not None:
            section = teacher.section.model_copy(update={name: value})
            config = config.with_sections({teacher.name: section})
            continue
        section = getattr(config, section_name) or ClusterConfig(learner=ClusterLearner())
        if key == "training.tuning":
            value = _LORA
        elif key == "cluster.learner":
            value = ClusterLearner.model_validate(parse_yaml(value, key))
        section = section.model_copy(update={name: value})
        config = config.model_copy(update={section_name: section})
    return config
