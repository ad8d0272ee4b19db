"""The engines that sample and train, and the memory plan. Teachers are in `scoring`."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import (
    Device,
    Dtype,
    Gib,
    PositiveInt,
    Schema,
)
from qwen3_distill.config.learning import FullTuning, LoraTuning, OptimizerConfig, TuningConfig
from qwen3_distill.config.processes import EmbeddedProcess, EngineProcess, Watched

VLLM_MAX_RANK = 512
"""The highest LoRA rank that vLLM has kernels for."""


VLLM_OPTIONS = {
    "tensor_parallel_size": "generation.tensor_parallel",
    "model": "student.model",
    "dtype": "generation.dtype",
    "max_model_len": "generation.max_model_tokens",
    "max_num_seqs": "generation.max_sequences",
    "max_num_batched_tokens": "generation.max_batched_tokens",
    "kv_cache_memory_bytes": "generation.kv_cache_gib",
    "kv_cache_dtype": "generation.kv_cache_dtype",
    "attention_backend": "generation.attention_backend",
    "quantization": "generation.quantization",
    "stream_interval": "generation.stream_interval",
    "enforce_eager": "generation.enforce_eager",
    "seed": "seed",
    "enable_lora": "training.tuning and generation.adapters",
    "max_loras": "this package: one adapter is served",
    "logprobs_mode": "this package: logprobs are those of the sampled distribution",
    "max_logprobs": "this package: as many as the objective's candidates",
    "generation_config": "this package: a model's file changes no sampling",
    "skip_tokenizer_init": "this package: only token ids travel",
    "worker_extension_cls": "this package: it loads the weights",
}
"""Arguments of vLLM that may not be in ``engine_arguments``, and what sets them."""


class EmbeddedGeneration(EmbeddedProcess):
    """Batched KV-cache sampling on PyTorch."""

    kind: Literal["embedded"]
    device: Device = "auto"
    dtype: Dtype = "float32"
    max_sequences: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Rollouts decoded concurrently."""
    batching: Literal["continuous", "static"] = "continuous"
    """``continuous``: a rollout that has finished makes room for the next at once. ``static``: the
    next ones begin when all have finished, and on CUDA a decode step is one captured graph. Faster
    for small models and answers of similar length: launching a step costs more than computing it.
    """


class VllmGeneration(EngineProcess, Watched):
    """vLLM in its own process (extra ``[vllm]``)."""

    kind: Literal["vllm"]
    dtype: Dtype = "bfloat16"
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Cards that one engine's model is divided over; above 1 the same number as
    ``cluster.rollouts.cards``. For a student that does not fit one card: where it fits, as many
    replicas of one card are faster."""
    max_sequences: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Rollouts decoded concurrently."""
    max_batched_tokens: PositiveInt | None = None
    """Maximum prompt plus new tokens per engine step; null: vLLM's default."""
    max_model_tokens: PositiveInt | None = None
    """Maximum prompt plus response tokens; null: the student's context length."""
    kv_cache_gib: Gib | None = None
    """Memory of the KV cache; null: planned, see ``qwen3-distill plan``."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of cached keys and values. ``auto``: as ``dtype``. ``fp8``: float8 (e4m3) without
    scales, one byte a value. Tokens are then sampled from a student that is a little another one:
    objectives of the sampled token correct by the importance ratio, and are refused without it;
    those over the teacher's candidates only visit other states."""
    attention_backend: Literal["flash_attn", "flashinfer", "triton"] | None = None
    """vLLM's attention on a GPU; null: what vLLM chooses. On Hopper ``flashinfer`` reads a cache
    in FP8 in about half of the time that others take. When it first starts it compiles, with
    CUDA's ``nvcc``, for a quarter of an hour on few cores: raise ``start_timeout_s`` for that.
    ``flash_attn`` takes a cache in FP8 on Hopper only."""
    quantization: Literal["fp8"] | None = None
    """``fp8``: the student's weights are quantized online for sampling, and what differs is
    corrected as with ``kv_cache_dtype``. It speeds up small decode batches only."""
    adapters: Literal["swap", "merge"] = "swap"
    """How LoRA training reaches the engine. ``swap``: the engine loads the adapter and applies it
    at every decode step; loads are small, decoding is slower. ``merge``: the engine loads whole
    weights with the adapter merged in; loads are large, decoding runs at full speed."""
    full_weights: Literal["auto", "ipc", "directory"] = "auto"
    """How whole weights reach the engine. ``auto``: CUDA IPC if the first load shows that it
    works, else files. Adapters always travel as files."""
    kv_cache_at_update: Literal["keep", "recompute"] = "keep"
    """The fate of the KV cache of running rollouts when weights are updated in flight.
    ``keep``: it stays as older weights computed it (PipelineRL, arXiv 2509.19128). ``recompute``:
    the new weights recompute it at every update. Either way a token's logprob is that of the
    distribution it was sampled from."""
    float32_head: bool = False
    """Compute the output head in float32: logprobs have less noise, decoding is slower."""
    enforce_eager: bool = False
    """Use no CUDA graphs: the engine starts sooner and decodes slower."""
    stream_interval: PositiveInt = 8
    """The engine reports a running rollout's prefix every this many tokens."""
    engine_arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of vLLM's ``AsyncEngineArgs``, under vLLM's names; lists and objects are
    allowed, e.g. ``{compilation_config: {cudagraph_capture_sizes: [64, 128, 256]}}``; without
    sizes, CUDA graphs reach `max_sequences`. Names are checked when vLLM starts."""

    @model_validator(mode="after")
    def _engine_arguments_have_no_setting(self) -> Self:
        options = VLLM_OPTIONS
        if self.float32_head:
            options = options | {"hf_overrides": "generation.float32_head"}
        for name in self.engine_arguments:
            if (plain := name.replace("-", "_")) in options:
                raise ValueError(
                    f"engine_arguments has {name!r}, which is set by {options[plain]}; write it "
                    "there"
                )
            if not name.isidentifier():
                raise ValueError(
                    f"engine_arguments has {name!r}, and vLLM's names have letters, digits and _ "
                    f"only; write {plain.strip('_')!r}"
                )
        attention = self.engine_arguments.get("attention_config")
        if isinstance(attention, dict) and "backend" in attention:
            raise ValueError(
                "engine_arguments has attention_config.backend, which is set by "
                "generation.attention_backend; write it there"
            )
        return self

    @model_validator(mode="after")
    def _attention_has_the_dtype(self) -> Self:
        if self.dtype == "float32" and self.attention_backend in ("flash_attn", "flashinfer"):
            raise ValueError(
                f"attention_backend={self.attention_backend} has no float32; set dtype=bfloat16, "
                "or attention_backend to triton or null"
            )
        return self


GenerationConfig: TypeAlias = Annotated[
    EmbeddedGeneration | VllmGeneration, Field(discriminator="kind")
]


class EmbeddedTraining(EmbeddedProcess):
    """PyTorch and peft."""

    kind: Literal["embedded"]
    device: Device = "auto"
    dtype: Dtype = "float32"
    """Dtype of the weights; trained weights should be float32."""
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    """``auto``: bfloat16 autocast on CUDA, none on the CPU."""
    tuning: TuningConfig = Field(default_factory=lambda: FullTuning(kind="full"))
    base_precision: Literal["as_loaded", "fp8_backward", "fp8"] = "as_loaded"
    """Precision of the frozen linear layers under adapters, with ``tuning.kind=lora``, on CUDA from
    compute capability 8.9 on. ``fp8_backward``: the gradient that passes through them is computed
    in float8, with a scale per row; ``fp8``: the forward pass too. On the trained
    lab student the gradient has a cosine of 0.9993 (``fp8_backward``) and 0.973 (``fp8``) with the
    one in float32; bfloat16 has 0.9997. Weights that are published or
    saved are not rounded."""
    compiled: bool = False
    """Compile every decoder layer with ``torch.compile``. The first step waits for it."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens per forward and backward pass. Changes memory and speed, not the step."""
    chunk_tokens: PositiveInt = 1024
    """Rows of logits held in memory at a time."""
    gradient_checkpointing: bool = False
    shared_prompts: bool = False
    """Compute a prompt once for all of its answers in a step (``samples_per_prompt`` above 1): the
    same gradient with fewer tokens. Not with ``replay``."""

    @model_validator(mode="after")
    def _fp8_base_is_frozen(self) -> Self:
        _check_base_is_frozen(self.base_precision, self.tuning)
        if self.base_precision == "fp8" and self.compiled:
            raise ValueError(
                "base_precision=fp8 with compiled=true: PyTorch 2.11's compiler gave gradients of "
                "another direction on an H200; use base_precision=fp8_backward, or compiled=false"
            )
        return self


def _check_base_is_frozen(base_precision: str, tuning: TuningConfig) -> None:
    if base_precision != "as_loaded" and tuning.kind == "full":
        raise ValueError(
            f"base_precision={base_precision} with tuning.kind=full: there no layer is frozen, and "
            "float8 would round the steps away; use tuning.kind=lora, or drop base_precision"
        )


class UnslothTraining(EngineProcess, Watched):
    """unsloth in its own process (extra ``[unsloth]``)."""

    kind: Literal["unsloth"]
    dtype: Dtype = "bfloat16"
    """Dtype of the weights. Adapters are always float32; ``tuning.kind=full`` needs ``float32``."""
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    """``auto``: bfloat16 autocast if float32 weights are trained in full on CUDA, else none."""
    tuning: TuningConfig = Field(default_factory=lambda: LoraTuning(kind="lora"))
    base_precision: Literal["as_loaded", "fp8_backward"] = "as_loaded"
    """Precision of the frozen linear layers under adapters, with ``tuning.kind=lora``, on CUDA from
    compute capability 8.9 on. ``fp8_backward``: the gradient that passes through them is computed
    in float8, with a scale per row. It needs a byte more for each of their weights. It is made for
    compiled layers; unsloth compiles none where it packs rows by a kernel of its own."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    max_model_tokens: PositiveInt | None = None
    """Maximum prompt plus response tokens; null: the student's context length. A longer rollout is
    an error."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens per forward and backward pass, padding included. Changes memory and speed, not the
    step."""
    shared_prompts: bool = False
    """Compute a prompt once for all of its answers in a step (``samples_per_prompt`` above 1): the
    same gradient with fewer tokens, checked with a few sequences at the start. ``packing`` then
    does not matter. Not with ``replay``."""
    packing: bool | Literal["auto"] = "auto"
    """Concatenate a micro-batch's sequences instead of padding them. ``auto``: if unsloth has an
    attention kernel for it and a probe at start gives the same result as padding. ``true``: also
    without such a kernel. On CUDA with LoRA PyTorch's kernel is then used; elsewhere the cost grows
    with the square of `micro_batch_tokens`. A failed probe is an error."""
    chunk_tokens: PositiveInt = 1024
    """Rows of logits held in memory at a time, in objectives over more than the sampled token."""
    gradient_checkpointing: Literal["auto", "off", "on", "unsloth"] = "auto"
    """``on`` recomputes every layer and costs a third more than ``off``; ``unsloth`` also moves
    activations to host memory. ``auto``: recomputes as few layers as the memory allows."""
    memory_gib: Gib | None = None
    """Memory that ``auto`` may use for weights and activations; null: planned, see
    ``qwen3-distill plan``."""

    @model_validator(mode="after")
    def _fp8_base_is_frozen(self) -> Self:
        _check_base_is_frozen(self.base_precision, self.tuning)
        drops = isinstance(self.tuning, LoraTuning) and self.tuning.dropout > 0
        if self.base_precision != "as_loaded" and drops:
            raise ValueError(
                f"base_precision={self.base_precision} with tuning.dropout: unsloth's fused layers "
                "with FP8 have none; use tuning.dropout=0, or base_precision=as_loaded"
            )
        return self

    @model_validator(mode="after")
    def _full_tuning_needs_float32(self) -> Self:
        if self.tuning.kind == "full" and self.dtype == "bfloat16":
            raise ValueError(
                "tuning.kind=full with dtype=bfloat16: a step smaller than 1/256 of a weight is "
                "rounded away, which at usual learning rates is nearly every step; use "
                "dtype=float32 (the computation is bfloat16 under autocast), or tuning.kind=lora"
            )
        return self


TrainingConfig: TypeAlias = Annotated[
    EmbeddedTraining | UnslothTraining, Field(discriminator="kind")
]


class PlanningConfig(Schema):
    """Assumptions of the memory plan."""

    device_memory_gib: Gib | None = None
    """Memory that student, teacher and learner share; null: the device's free memory."""
    reserve_gib: Annotated[float, Field(ge=0, le=1_000_000)] | None = None
    """Memory left free for the system and for what the plan does not count; null: 8, or an eighth
    of the memory if that is less."""
    prompt_tokens: PositiveInt = 256
    """Assumed prompt length, for sizing caches. Longer prompts work too: fewer rollouts then run
    concurrently."""
