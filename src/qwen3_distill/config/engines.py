"""The engines of the three stages (generation, scoring, training) and their memory plan."""

import json
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, field_validator, model_validator
from typing_extensions import Self

from qwen3_distill.config.addresses import checked_url, has_user
from qwen3_distill.config.base import (
    Device,
    Dtype,
    Gib,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Schema,
    Seconds,
    Threads,
)
from qwen3_distill.config.learning import FullTuning, LoraTuning, OptimizerConfig, TuningConfig
from qwen3_distill.config.teacher_context import TeacherConfig
from qwen3_distill.config.tokenizer import TeacherTokenizer
from qwen3_distill.utils.secrets import is_secret_name

VLLM_MAX_RANK = 512
"""The highest LoRA rank that vLLM has kernels for."""


VLLM_OPTIONS = {
    "model": "student.model",
    "dtype": "generation.dtype",
    "max_model_len": "generation.max_model_tokens",
    "max_num_seqs": "generation.max_sequences",
    "max_num_batched_tokens": "generation.max_batched_tokens",
    "kv_cache_memory_bytes": "generation.kv_cache_gib",
    "quantization": "generation.quantization",
    "stream_interval": "generation.stream_interval",
    "enforce_eager": "generation.enforce_eager",
    "seed": "seed",
    "enable_lora": "training.tuning and generation.adapters",
    "max_loras": "this package: one adapter is served",
    "logprobs_mode": "this package: logprobs are those of the sampled distribution",
    "generation_config": "this package: a model's file changes no sampling",
    "skip_tokenizer_init": "this package: only token ids travel",
    "worker_extension_cls": "this package: it loads the weights",
}
"""Arguments of vLLM that may not be in ``engine_arguments``, and what sets them."""


class _Supervised(Schema):
    """Settings of a supervised process: its start timeout and restart limit."""

    start_timeout_s: Seconds = 900.0
    """Limit for the start, loading and compiling included."""
    max_restarts: NonNegativeInt = 3
    """How often per run the process is restarted after it died."""


class _Watched(_Supervised):
    """A process that answers a heartbeat."""

    hang_timeout_s: Seconds = 900.0
    """A process that does not answer the heartbeat for this long is killed and restarted. Set it
    above the longest call that keeps it from answering: a learner's step, a teacher's forward
    pass, a decode step of an embedded engine. The start has its own limit."""


class _Embedded(_Watched):
    """A PyTorch engine, in the controller's process or in its own."""

    own_process: bool = False
    """Run in its own process: stages then compute concurrently, and a process that dies is
    restarted. The process settings apply only then."""
    threads: Threads | None = None
    """PyTorch threads in that process; null: PyTorch's default, one per core."""

    @property
    def interpreter(self) -> str | None:
        """Interpreter of an environment of the engine's own: the embedded engines have none."""
        return None

    @model_validator(mode="after")
    def _threads_need_own_process(self) -> Self:
        if self.threads is not None and not self.own_process:
            raise ValueError(
                f"threads={self.threads} with own_process=false would apply to everything in the "
                "controller's process; set own_process=true, or drop threads"
            )
        return self


class _EngineProcess(_Supervised):
    """Settings of an engine that always runs in its own process."""

    python: PathText | None = None
    """Python interpreter of an environment that has the engine; null: the environment that
    ``qwen3-distill engines install`` made on this machine. Name an interpreter that has the engine
    among its own packages, e.g. ``python3``."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the engine's process, added to the inherited ones, e.g.
    ``PYTHONPATH``."""

    @property
    def interpreter(self) -> str | None:
        """The interpreter that is named; None: that of the environment installed here."""
        return self.python

    @field_validator("environment", mode="before")
    @classmethod
    def _variables_are_names_and_texts(cls, environment: object) -> object:
        if not isinstance(environment, dict):
            return environment  # its type is refused next
        for name, value in environment.items():
            if not name or "=" in name or "\0" in name:
                raise ValueError(f"{name!r} is no name of a variable: it is empty or has a `=`")
            if not isinstance(value, str):
                hides = is_secret_name(name) or isinstance(value, dict | list)
                found = "no text" if hides else f"{value!r} ({type(value).__name__})"
                written = "VALUE" if hides else json.dumps(value)
                raise ValueError(
                    f'{name} is {found}, and variables are text; write {name}: "{written}"'
                )
            if "\0" in value:
                raise ValueError(f"{name} holds a NUL character, which no variable may")
        return environment


class EmbeddedGeneration(_Embedded):
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


class VllmGeneration(_EngineProcess, _Watched):
    """vLLM in its own process (extra ``[vllm]``)."""

    kind: Literal["vllm"]
    dtype: Dtype = "bfloat16"
    max_sequences: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Rollouts decoded concurrently."""
    max_batched_tokens: PositiveInt | None = None
    """Maximum prompt plus new tokens per engine step; null: vLLM's default."""
    max_model_tokens: PositiveInt | None = None
    """Maximum prompt plus response tokens; null: the student's context length."""
    kv_cache_gib: Gib | None = None
    """Memory of the KV cache; null: planned, see ``qwen3-distill plan``."""
    quantization: Literal["fp8"] | None = None
    """``fp8``: the student's weights are quantized online for sampling, and the importance ratio
    corrects for the difference. It speeds up small decode batches only."""
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
    allowed, e.g. ``{compilation_config: {cudagraph_capture_sizes: [64, 128, 256]}}``. Names are
    checked when vLLM starts."""

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
        return self


GenerationConfig: TypeAlias = Annotated[
    EmbeddedGeneration | VllmGeneration, Field(discriminator="kind")
]


class EmbeddedScoring(_Embedded, TeacherConfig, TeacherTokenizer):
    """The teacher on PyTorch."""

    kind: Literal["embedded"]
    model: PathText
    """The teacher: a directory (Hugging Face layout) or a hub id, as ``student.model``; or the word
    ``student``, see `refresh`."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    batch_tokens: PositiveInt = 16384
    """Padded tokens per forward pass."""
    chunk_tokens: PositiveInt = 1024
    """Rows of logits held in memory at a time."""

    @property
    def cache_folder(self) -> Path | None:
        """Folder of the score cache: the embedded teacher has none."""
        return None


SGLANG_OPTIONS = {
    "model-path": "scoring.model",
    "host": "this package: loopback only",
    "port": "scoring.port",
    "api-key": "this package: a random one",
    "device": "scoring.device",
    "dtype": "scoring.dtype",
    "quantization": "scoring.quantization",
    "mem-fraction-static": "scoring.memory_fraction",
    "max-total-tokens": "scoring.max_total_tokens",
    "attention-backend": "scoring.attention_backend",
    "chunked-prefill-size": "scoring.chunked_prefill_tokens",
    "enable-fp32-lm-head": "scoring.float32_head",
    "disable-decode-cuda-graph": "scoring.decode_graphs",
    "skip-tokenizer-init": "this package: only token ids travel",
}
"""Options of SGLang's server that may not be in ``server_arguments``, and what sets them."""


class SglangScoring(_EngineProcess, TeacherConfig, TeacherTokenizer):
    """The teacher in SGLang servers: one that the run starts, or existing ones."""

    kind: Literal["sglang"]
    model: PathText
    """The teacher: a directory (Hugging Face layout) or a hub id, as ``student.model``; or the word
    ``student``, see `refresh`. Tokenizer, vocabulary and the known answer are read from it, also
    for the servers in `urls`."""
    urls: tuple[str, ...] = ()
    """Existing servers, e.g. ``http://10.0.0.2:30000``; requests are balanced over them. Empty:
    the run starts one on loopback."""
    api_key_file: PathText | None = None
    """File with the API key of the servers in `urls`; a server that the run starts gets a random
    key."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the server that the run starts; null: a free one."""
    device: Device = "auto"
    dtype: Dtype = "bfloat16"
    quantization: Literal["fp8"] | None = "fp8"
    """``fp8``: the server quantizes a bfloat16 directory online. null: the directory decides; it
    may be an FP8 checkpoint."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the memory that is free when the server starts, for its weights and KV cache; null:
    planned, see ``qwen3-distill plan``."""
    max_total_tokens: PositiveInt | None = None
    """Tokens in the server's KV cache; null: planned."""
    attention_backend: str | None = None
    """Attention kernel under SGLang's name, e.g. ``triton``; null: SGLang chooses."""
    float32_head: bool = False
    """Compute the output head in float32: scores have less noise, scoring is slower."""
    chunked_prefill_tokens: PositiveInt = 8192
    """Tokens that the server prefills at a time."""
    chunk_tokens: PositiveInt = 2048
    """Rows of logits held in memory at a time."""
    decode_graphs: bool = False
    """Use CUDA graphs for decoding: the teacher's evaluation is faster; the start takes longer and
    more memory."""
    server_arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further options of ``sglang.launch_server``, named without the leading dashes, e.g.
    ``{watchdog-timeout: 600}``."""
    request_tokens: PositiveInt = 16384
    """Maximum tokens per scoring request."""
    max_in_flight: PositiveInt = 4
    """Maximum concurrent requests per server."""
    request_timeout_s: Seconds = 300.0
    max_attempts: PositiveInt = 4
    """Attempts to score a rollout before it is dropped."""
    max_dropped_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Maximum share of a step's rollouts that may be dropped without a score; more stops the
    run."""
    readiness_tolerance_nats: PositiveFloat = 0.5
    """Maximum mean difference from the known answer at which a server is accepted as the
    teacher."""
    cache: PathText | None = None
    """Folder of a score cache that is kept between runs; null: no cache."""

    @property
    def cache_folder(self) -> Path | None:
        """Folder of the score cache; None: no cache."""
        return None if self.cache is None else Path(self.cache)

    @model_validator(mode="after")
    def _server_arguments_have_no_setting(self) -> Self:
        for name in self.server_arguments:
            plain = name.lstrip("-").replace("_", "-")
            # SGLang takes the beginning of an option's name for the option.
            option = next((known for known in SGLANG_OPTIONS if known.startswith(plain)), None)
            if option is not None:
                raise ValueError(
                    f"server_arguments has {name!r}, which is set by {SGLANG_OPTIONS[option]}; "
                    "write it there"
                )
            if name.startswith("-") or "=" in name or not name.isprintable() or " " in name:
                raise ValueError(
                    f"server_arguments has {name!r}; write the option's name alone, without "
                    f"leading dashes, e.g. {{{plain.partition('=')[0].strip()}: value}}"
                )
        return self

    @model_validator(mode="after")
    def _server_flags_are_true_or_false(self) -> Self:
        words = {"no": "false", "off": "false", "false": "false"}
        words |= {"yes": "true", "on": "true", "true": "true"}
        for name, value in self.server_arguments.items():
            if isinstance(value, str) and (meant := words.get(value.lower())):
                raise ValueError(
                    f"server_arguments has {name}: {value!r}, which is text; write {name}: "
                    f"{meant}, without quotes (in YAML 1.2 yes, no, on and off are text)"
                )
        return self

    @model_validator(mode="after")
    def _urls_exclude_port_and_need_no_key(self) -> Self:
        for url in self.urls:
            try:
                checked_url(url)
            except ValueError as error:
                raise ValueError(f"urls: {error}") from None
        if self.api_key_file is not None and any(has_user(url) for url in self.urls):
            raise ValueError(
                "urls has user:password@ and api_key_file is set, and a request carries one of "
                "them only; drop one"
            )
        if self.urls and self.port is not None:
            raise ValueError(
                "port is for a server that the run starts, and urls names existing ones: drop one"
            )
        if self.api_key_file is not None and not self.urls:
            raise ValueError(
                "api_key_file is for the servers in urls, and there are none: drop it; a server "
                "that the run starts gets a random key"
            )
        return self


ScoringConfig: TypeAlias = Annotated[EmbeddedScoring | SglangScoring, Field(discriminator="kind")]


class EmbeddedTraining(_Embedded):
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
        if self.base_precision != "as_loaded" and self.tuning.kind == "full":
            raise ValueError(
                f"base_precision={self.base_precision} with tuning.kind=full: there no layer is "
                "frozen, and float8 would round the steps away; use tuning.kind=lora, or drop "
                "base_precision"
            )
        if self.base_precision == "fp8" and self.compiled:
            raise ValueError(
                "base_precision=fp8 with compiled=true: PyTorch 2.11's compiler gave gradients of "
                "another direction on an H200; use base_precision=fp8_backward, or compiled=false"
            )
        return self


class UnslothTraining(_EngineProcess, _Watched):
    """unsloth in its own process (extra ``[unsloth]``)."""

    kind: Literal["unsloth"]
    dtype: Dtype = "bfloat16"
    """Dtype of the weights. Adapters are always float32; ``tuning.kind=full`` needs ``float32``."""
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    """``auto``: bfloat16 autocast if float32 weights are trained in full on CUDA, else none."""
    tuning: TuningConfig = Field(default_factory=lambda: LoraTuning(kind="lora"))
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
    without such a kernel, at a cost that grows with the square of `micro_batch_tokens`; a failed
    probe is an error."""
    chunk_tokens: PositiveInt = 1024
    """Rows of logits held in memory at a time, in objectives over more than the sampled token."""
    gradient_checkpointing: Literal["auto", "off", "on", "unsloth"] = "auto"
    """``on`` recomputes every layer and costs a third more than ``off``; ``unsloth`` also moves
    activations to host memory. ``auto``: recomputes as few layers as the memory allows."""
    memory_gib: Gib | None = None
    """Memory that ``auto`` may use for weights and activations; null: planned, see
    ``qwen3-distill plan``."""

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
