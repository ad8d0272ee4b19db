"""Sizes every piece of memory that each engine needs.

The formula has two halves. The learner's step (activations, logits, optimizer states and which
layers are recomputed) is in `modeling.step_memory`, because the learner itself decides with it. The
other pieces (weights, caches, CUDA graphs, contexts, and the rows of the plan) are here.

Weights, caches, adapters and optimizer states are exact. Activations and working memory are
estimates; a comment says which figures were measured (Qwen3-4B shape, one H200, bfloat16).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from qwen3_distill.config import NamedTeacher, RunConfig, candidates_per_token
from qwen3_distill.modeling.shapes import ModelShape
from qwen3_distill.modeling.step_memory import GIB, Checkpointing, MemoryModel, allocator_bytes
from qwen3_distill.planning.device import DeviceMemory
from qwen3_distill.replay.buffer import ReplayBuffer
from qwen3_distill.utils.graph_sizes import graphs_over_own

_ITEMSIZE = {"float32": 4, "bfloat16": 2}

Engine: TypeAlias = Literal["teacher", "student", "learner"]
ENGINES: tuple[Engine, ...] = ("teacher", "student", "learner")

_RUNTIME_GIB: dict[str, dict[Engine, float]] = {
    # CUDA's context and libraries.
    "cuda": {"teacher": 0.75, "student": 0.75, "learner": 0.75},
    # The same and the host side of the processes, which is the same memory.
    "unified": {"teacher": 3.0, "student": 2.5, "learner": 2.5},
    # Processes that use the CPU builds.
    "cpu": {"teacher": 2.0, "student": 1.5, "learner": 1.0},
}
_CUDA_GRAPH_BYTES = 1.25 * GIB  # of vLLM's own sizes; with larger ones it is taken to grow
_VLLM_BATCHED_TOKENS = 8192  # of a step, its default on large GPUs
_DECODE_GRAPH_BYTES = 1.0 * GIB
_LINK_GIB = 0.8  # of a process of two ranks beyond that of one alone, on H200s
_CACHE_BLOCK_TOKENS = 16
_VLLM_CPU_BLOCK_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One piece of memory."""

    engine: Engine
    what: str
    num_bytes: int
    how: str
    """How the size follows from the config, for people."""
    name: str = ""
    """Which of several teachers."""

    @property
    def label(self) -> str:
        """The engine, for people: ``teacher math``."""
        return f"{self.engine} {self.name}".rstrip()

    @property
    def of(self) -> tuple[Engine, str]:
        return self.engine, self.name


@dataclass(frozen=True, kw_only=True)
class Models:
    """The shapes of all models, and the engines that share the device."""

    student: ModelShape
    teacher: ModelShape | None
    """The one teacher's; None: training loads none."""
    teachers: Mapping[str, ModelShape] = field(default_factory=dict)
    """By `NamedTeacher.name`, where there are several."""
    engines: frozenset[Engine] = frozenset(ENGINES)


# --- Tokens -------------------------------------------------------------------------------------


def prompt_tokens(config: RunConfig, models: Models) -> int:
    """Planned tokens of a prompt."""
    room = models.student.context_length - config.sampling.max_new_tokens
    return max(1, min(config.planning.prompt_tokens, room))


def longest_sequence_tokens(config: RunConfig, models: Models) -> int:
    """Tokens of a planned prompt with the longest response."""
    new = [config.sampling.max_new_tokens]
    if config.evaluation is not None:
        new.append(config.evaluation.sampling.max_new_tokens)
    return min(prompt_tokens(config, models) + max(new), models.student.context_length)


def decoded_tokens(config: RunConfig, models: Models) -> int:
    """Cached tokens when all rollouts in flight run to their end and share their prompts."""
    sequences = config.generation.max_sequences
    prompts = math.ceil(sequences / config.samples_per_prompt)
    tokens = sequences * (config.sampling.max_new_tokens + _CACHE_BLOCK_TOKENS)
    return tokens + prompts * prompt_tokens(config, models)


def micro_batch_tokens(config: RunConfig, models: Models) -> int:
    """Tokens of one forward and backward pass: at least one sequence."""
    return max(config.training.micro_batch_tokens, longest_sequence_tokens(config, models))


# --- Student ------------------------------------------------------------------------------------


def student_cache_bytes(config: RunConfig, models: Models) -> int:
    """Bytes of the rollout engine's key-value cache."""
    generation, shape = config.generation, models.student
    if generation.kind == "vllm" and generation.kv_cache_gib is not None:
        return int(generation.kv_cache_gib * GIB)
    per_token = shape.kv_bytes_per_token(student_cache_itemsize(config))
    tokens = decoded_tokens(config, models)
    if generation.kind == "vllm":
        # vLLM refuses a cache that cannot hold one sequence of the longest length.
        longest = generation.max_model_tokens or shape.context_length
        tokens = max(tokens, longest + 2 * _VLLM_CPU_BLOCK_TOKENS)
    # Every card has its heads' part; with more cards than heads, a whole head.
    return tokens * per_token // min(student_parts(config), shape.num_kv_heads)


def student_cache_itemsize(config: RunConfig) -> int:
    """Bytes of a key's or a value's element in the rollout engine's cache."""
    generation = config.generation
    in_fp8 = generation.kind == "vllm" and generation.kv_cache_dtype == "fp8"
    return 1 if in_fp8 else _ITEMSIZE[generation.dtype]


def student_parts(config: RunConfig) -> int:
    """Cards that a rollout engine's model is divided over."""
    return config.generation.tensor_parallel if config.generation.kind == "vllm" else 1


def student_rows(config: RunConfig, models: Models, device: DeviceMemory) -> list[PlanRow]:
    """Rows of the rollout engine."""
    generation, shape = config.generation, models.student
    itemsize = _ITEMSIZE[generation.dtype]
    quantized = shape.fp8_checkpoint or (
        generation.kind == "vllm" and generation.quantization is not None
    )
    parts = student_parts(config)
    rows = [_weights_row("student", shape, itemsize, quantized, parts)]
    tuning = config.training.tuning
    if tuning.kind == "lora" and generation.kind == "vllm" and generation.adapters == "swap":
        adapter = shape.lora_parameters(tuning.rank, tuning.target_modules) * itemsize
        rows.append(_row("student", "adapter", adapter, f"rank {tuning.rank}"))
    how = f"{generation.max_sequences} rollouts of {prompt_tokens(config, models)} + "
    how += f"{config.sampling.max_new_tokens} tokens"
    if generation.kind == "vllm" and generation.kv_cache_gib is not None:
        how = "generation.kv_cache_gib"
    how += ", FP8" if student_cache_itemsize(config) == 1 else ""
    rows.append(_row("student", "key-value cache", student_cache_bytes(config, models), how))
    rows.append(_student_working_row(config, models))
    if generation.kind == "vllm":
        if device.kind != "cpu" and not generation.enforce_eager:
            graphs = graphs_over_own(generation.max_sequences, generation.engine_arguments)
            rows.append(_row("student", "CUDA graphs", graphs * _CUDA_GRAPH_BYTES, "estimate"))
        rows.append(_runtime_row("student", device))
    return rows


def _student_working_row(config: RunConfig, models: Models) -> PlanRow:
    generation, shape = config.generation, models.student
    itemsize = _ITEMSIZE[generation.dtype]
    batched = prompt_tokens(config, models) * generation.max_sequences
    if generation.kind == "vllm":
        batched = min(generation.max_batched_tokens or _VLLM_BATCHED_TOKENS, batched)
    activations = batched * _passing_elements(shape) * itemsize
    # float32 logits, their log-softmax, the noise, and one more.
    logits = 4 * generation.max_sequences * shape.vocab_size * 4
    return _row("student", "activations and logits", activations + logits, "estimate")


# --- Teacher ------------------------------------------------------------------------------------


def each_teacher(config: RunConfig, models: Models) -> list[tuple[NamedTeacher, RunConfig, Models]]:
    """List the loaded teachers in the order in which they start.

    Returns:
        Each with the config and the models of a run that has it alone.
    """
    return [
        (
            teacher,
            config.with_teacher(teacher),
            replace(models, teacher=models.teachers.get(teacher.name, models.teacher)),
        )
        for teacher in sorted(config.loaded_teachers, key=_start_rank)
    ]


def _start_rank(teacher: NamedTeacher) -> int:
    """Embedded teachers of this process load when they are built, SGLang starts before others."""
    section = teacher.section
    if section.kind == "embedded" and not section.own_process:
        return 0
    return 1 if section.kind == "sglang" else 2


def teacher_cache_tokens(config: RunConfig, models: Models) -> int:
    """Tokens of the scoring server's key-value cache."""
    scoring = config.teacher
    if scoring.kind == "embedded":
        return scoring.batch_tokens
    if scoring.max_total_tokens is not None:
        return scoring.max_total_tokens
    # Sequences leave the cache as soon as they are scored: two requests keep the server busy, and
    # one chunk is being computed. The longest sequence must fit in any case.
    tokens = min(scoring.max_in_flight, 2) * scoring.request_tokens + scoring.chunked_prefill_tokens
    tokens = max(tokens, 2 * longest_sequence_tokens(config, models))
    if scoring.kind == "vllm" and not scoring.urls:
        tokens = max(tokens, vllm_teacher_tokens(config, models) + 2 * _VLLM_CPU_BLOCK_TOKENS)
    return tokens


def vllm_teacher_tokens(config: RunConfig, models: Models) -> int:
    """Tokens of the longest sequence that vLLM's server must be able to score."""
    scoring, shape = config.teacher, _teacher_shape(models)
    stated = scoring.max_model_tokens if scoring.kind == "vllm" else None
    return min(stated or shape.context_length, shape.context_length) + 1


def teacher_cache_bytes(config: RunConfig, models: Models) -> int:
    """Bytes of the scoring server's key-value cache."""
    shape = _teacher_shape(models)
    per_token = shape.kv_bytes_per_token(_ITEMSIZE[config.teacher.dtype])
    parts = min(teacher_parts(config), shape.num_kv_heads)
    return teacher_cache_tokens(config, models) * per_token // parts


def teacher_parts(config: RunConfig) -> int:
    """Cards that a teacher's model is divided over."""
    fleet = None if config.cluster is None else config.cluster.teachers
    return 1 if fleet is None else max(1, fleet.cards)


def teacher_weight_bytes(config: RunConfig, models: Models) -> int:
    """Bytes of the teacher's weights as served, on each card."""
    scoring, shape = config.teacher, _teacher_shape(models)
    whole = _weight_bytes(shape, _ITEMSIZE[scoring.dtype], _teacher_is_quantized(config, shape))
    return whole // teacher_parts(config)


def teacher_loading_bytes(config: RunConfig, models: Models) -> int:
    """Bytes of the teacher's weights while loading: online quantization starts unquantized."""
    scoring, shape = config.teacher, _teacher_shape(models)
    if shape.fp8_checkpoint:
        return teacher_weight_bytes(config, models)
    return shape.weight_bytes(_ITEMSIZE[scoring.dtype]) // teacher_parts(config)


def teacher_static_bytes(config: RunConfig, models: Models, free_bytes: int) -> int:
    """Bytes that the memory fraction of a server started here covers: weights and cache."""
    scoring = config.teacher
    if scoring.kind == "sglang" and scoring.memory_fraction is not None:
        return int(scoring.memory_fraction * free_bytes)
    return teacher_weight_bytes(config, models) + teacher_cache_bytes(config, models)


def teacher_rows(config: RunConfig, models: Models, device: DeviceMemory) -> list[PlanRow]:
    """Rows of the teacher; none if it is not loaded, or its servers run elsewhere."""
    scoring, shape = config.loaded_teacher, models.teacher
    if scoring is None or shape is None:
        return []
    itemsize = _ITEMSIZE[scoring.dtype]
    quantized = _teacher_is_quantized(config, shape)
    weights = _weights_row("teacher", shape, itemsize, quantized, teacher_parts(config))
    if scoring.kind == "embedded":
        passing = scoring.batch_tokens * _passing_elements(shape) * itemsize
        logits = 2 * scoring.chunk_tokens * shape.vocab_size * 4
        working = _row("teacher", "activations and logits", passing + logits, "estimate")
        return [weights, working, *_teacher_sampling_rows(config, models, weights)]
    if scoring.urls:
        return []
    tokens = teacher_cache_tokens(config, models)
    cache = teacher_cache_bytes(config, models)
    how = f"{tokens} tokens"
    if scoring.kind == "sglang" and scoring.memory_fraction is not None:
        left = teacher_static_bytes(config, models, device.free_bytes) - weights.num_bytes
        cache = max(0, min(left, cache) if scoring.max_total_tokens is not None else left)
        how = "scoring.memory_fraction"
    rows = [
        weights,
        _row("teacher", "key-value cache", cache, how),
        _teacher_working_row(config, models),
        _runtime_row("teacher", device),
    ]
    if scoring.decode_graphs and device.kind != "cpu":
        rows.append(_row("teacher", "CUDA graphs", _DECODE_GRAPH_BYTES, "estimate"))
    return rows


def _teacher_sampling_rows(config: RunConfig, models: Models, weights: PlanRow) -> list[PlanRow]:
    """Rows of the embedded engine that samples from the teacher, if the run does."""
    if "teacher" not in config.rollouts.samplers:
        return []
    scoring = config.teacher
    per_token = _teacher_shape(models).kv_bytes_per_token(_ITEMSIZE[scoring.dtype])
    cache = decoded_tokens(config, models) * per_token
    how = f"rollouts.source={config.rollouts.source}"
    return [
        _row("teacher", "weights for sampling", weights.num_bytes, how),
        _row("teacher", "key-value cache", cache, how),
    ]


def _teacher_shape(models: Models) -> ModelShape:
    assert models.teacher is not None, "asked for a teacher that is loaded"
    return models.teacher


def _teacher_working_row(config: RunConfig, models: Models) -> PlanRow:
    scoring, shape = config.teacher, _teacher_shape(models)
    assert scoring.kind != "embedded"
    itemsize = _ITEMSIZE[scoring.dtype]
    passing = scoring.chunked_prefill_tokens * _passing_elements(shape) * itemsize
    # Logits in the model's dtype and in float32, and their log-softmax.
    rows = scoring.chunked_prefill_tokens  # vLLM computes those of a chunk at once
    if scoring.kind == "sglang":
        rows = min(scoring.chunk_tokens, rows)
    logits = rows * shape.vocab_size * (itemsize + 4 + 4)
    # The float32 head is a copy made for every chunk.
    head = 4 * shape.vocab_size * shape.hidden_size if scoring.float32_head else 0
    return _row("teacher", "activations and logits", passing + logits + head, "estimate")


def _teacher_is_quantized(config: RunConfig, shape: ModelShape) -> bool:
    scoring = config.teacher
    online = scoring.kind != "embedded" and scoring.quantization is not None
    return shape.fp8_checkpoint or online


# --- Learner ------------------------------------------------------------------------------------


def step_memory(config: RunConfig, models: Models, device: DeviceMemory) -> MemoryModel:
    """The memory model of the learner's steps, the same that the learner uses."""
    training = config.training
    on_gpu = device.kind != "cpu" and not (training.kind == "embedded" and training.device == "cpu")
    return MemoryModel.of(
        models.student,
        training,
        on_gpu=on_gpu,
        merges=_learner_merges(config),
        shards=_learner_shards(config),
    )


def _learner_shards(config: RunConfig) -> int:
    """Ranks that divide the layers' weights, gradients and moments."""
    learner = None if config.cluster is None else config.cluster.learner
    return learner.ranks if learner is not None and learner.sharded else 1


def checkpointing(
    config: RunConfig, models: Models, device: DeviceMemory, room_bytes: int
) -> Checkpointing:
    """Decide which layers are recomputed.

    Args:
        room_bytes: the most that the learner's process may use; decides for ``auto``.
    """
    training, layers = config.training, models.student.num_layers
    mode = training.gradient_checkpointing
    if mode == "auto":
        return step_memory(config, models, device).fewest_recomputed(
            micro_batch_tokens(config, models),
            allocator_bytes(room_bytes - replay_bytes(config)),
            may_offload=device.kind == "cuda",
        )
    if mode in (False, "off"):
        return Checkpointing(recomputed_layers=0, offload=False)
    offload = mode == "unsloth" and device.kind == "cuda"
    return Checkpointing(recomputed_layers=layers, offload=offload)


def replay_bytes(config: RunConfig) -> int:
    """Bytes of the replay buffer, on the learner's device."""
    if config.replay is None:
        return 0
    candidates = candidates_per_token(config.objective)
    return ReplayBuffer.memory_bytes(config.replay, candidates=candidates)


def link_bytes(config: RunConfig, device: DeviceMemory) -> int:
    """Bytes that a rank's process holds, outside of PyTorch's memory, to reach the others."""
    learner = None if config.cluster is None else config.cluster.learner
    alone = learner is None or learner.ranks == 1
    return 0 if alone or device.kind == "cpu" else int(_LINK_GIB * GIB)


def outside_bytes(config: RunConfig, device: DeviceMemory) -> int:
    """Bytes of a learner's process beyond PyTorch's memory and CUDA's context: links, host side."""
    host = 0.0
    if config.training.kind == "unsloth":
        host = _RUNTIME_GIB[device.kind]["learner"] - _RUNTIME_GIB["cuda"]["learner"]
    return link_bytes(config, device) + int(host * GIB)


def _learner_merges(config: RunConfig) -> bool:
    return config.generation.kind == "vllm" and config.generation.adapters == "merge"


def learner_rows(
    config: RunConfig, models: Models, device: DeviceMemory, choice: Checkpointing
) -> list[PlanRow]:
    """Rows of the learner that recomputes the layers of ``choice``."""
    training, shape = config.training, models.student
    tokens = micro_batch_tokens(config, models)
    model = step_memory(config, models, device)
    step = model.step_bytes(tokens, choice)
    how = f"{tokens} tokens, {choice.describe(shape)}; estimate"
    rows = [
        *_learner_state_rows(config, models, model),
        _row("learner", "activations and logits", step, how),
    ]
    lost = model.lost_bytes(tokens, choice)
    if step + lost < model.merged_bytes:
        how = "the next version's merged weights, beside this one's"
        rows.append(_row("learner", "to publish", model.merged_bytes - step, how))
    elif lost:
        rows.append(_row("learner", "lost to fragments", lost, "held, not usable; estimate"))
    if links := link_bytes(config, device):
        rows.append(_row("learner", "links between ranks", links, "NCCL; estimate"))
    if config.replay is not None:
        how = f"{config.replay.capacity_tokens} tokens"
        rows.append(_row("learner", "replay", replay_bytes(config), how))
    if training.kind == "unsloth":
        rows.append(_runtime_row("learner", device))
    return rows


def _learner_state_rows(config: RunConfig, models: Models, model: MemoryModel) -> list[PlanRow]:
    """Rows of weights, gradients and AdamW's two moments."""
    shape, training = models.student, config.training
    itemsize = _ITEMSIZE[training.dtype]
    weights = _weights_row("learner", shape, itemsize, quantized=False)
    if model.shards > 1:
        elsewhere = shape.linear_parameters - -(-shape.linear_parameters // model.shards)
        how = f"{weights.how}; 1/{model.shards} of the layers"
        weights = _row("learner", "weights", weights.num_bytes - itemsize * elsewhere, how)
    state = model.fixed_bytes - weights.num_bytes - model.merged_bytes - model.gathered_bytes
    if training.tuning.kind == "full":
        how = f"gradients and two moments, {training.dtype}"
        if model.shards > 1:
            how += f"; 1/{model.shards} of the layers'"
        elif model.arithmetic == "bfloat16" and training.dtype == "float32":
            how += ", and bfloat16 copies of the weights"
        rows = [weights, _row("learner", "optimizer", state, how)]
        if model.gathered_bytes:
            how = "gathered for a pass, and gradients on their way; estimate"
            rows.append(_row("learner", "layers of all ranks", model.gathered_bytes, how))
        return rows
    how = f"rank {training.tuning.rank}, float32: weights, gradients, two moments"
    rows = [weights, _row("learner", "adapters and optimizer", state, how)]
    if model.merged_bytes:
        how = "generation.adapters=merge"
        rows.append(_row("learner", "merged weights", model.merged_bytes, how))
    return rows


# --- Shared -------------------------------------------------------------------------------------


def _passing_elements(shape: ModelShape) -> int:
    """Values per token that exist at once in a forward pass without gradients."""
    queries = shape.num_heads * shape.head_dim
    return 4 * shape.hidden_size + 3 * shape.intermediate_size + 2 * queries


def _weight_bytes(shape: ModelShape, itemsize: int, quantized: bool) -> int:
    return shape.fp8_weight_bytes(itemsize) if quantized else shape.weight_bytes(itemsize)


def _weights_row(
    engine: Engine, shape: ModelShape, itemsize: int, quantized: bool, parts: int = 1
) -> PlanRow:
    dtype = "bfloat16" if itemsize == 2 else "float32"
    how = f"{_count(shape.num_parameters)} parameters, "
    how += f"FP8 with {dtype} embeddings" if quantized else dtype
    how += f", divided over {parts} cards" if parts > 1 else ""
    return _row(engine, "weights", _weight_bytes(shape, itemsize, quantized) / parts, how)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _runtime_row(engine: Engine, device: DeviceMemory) -> PlanRow:
    what = "process" if device.kind == "cpu" else "CUDA context"
    return _row(engine, what, _RUNTIME_GIB[device.kind][engine] * GIB, "estimate")


def _row(engine: Engine, what: str, num_bytes: float, how: str) -> PlanRow:
    return PlanRow(engine=engine, what=what, num_bytes=math.ceil(num_bytes), how=how)
