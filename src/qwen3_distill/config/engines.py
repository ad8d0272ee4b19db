"""The three engines (generation, scoring, training) and the memory that they share."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import Device, Dtype, Gib, PositiveFloat, PositiveInt, Schema
from qwen3_distill.config.learning import FullTuning, LoraTuning, OptimizerConfig, TuningConfig

VLLM_MAX_RANK = 512
"""The highest LoRA rank that vLLM has kernels for."""


class _Supervised(Schema):
    """What is said of a process that is started, watched and started again."""

    start_timeout_s: PositiveFloat = 900.0
    """Loading and compiling included."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a run the process may die and be started again."""


class _Watched(_Supervised):
    """A process that answers a heartbeat."""

    hang_timeout_s: PositiveFloat = 900.0
    """A process that gives no sign of life for so long is killed, and started again like one that
    died. Longer than the longest thing that keeps it from answering: a learner's step, a teacher's
    forward pass, a decode step of an embedded engine. The start has a limit of its own."""


class _Embedded(_Watched):
    """An engine on PyTorch, in the controller's process or in one of its own."""

    own_process: bool = False
    """Run in a process of its own: stages then compute at the same time, and one that dies is
    started again. The settings of the process count only then."""
    threads: PositiveInt | None = None
    """Threads of PyTorch in that process; null: PyTorch's default, which is one a core."""

    @model_validator(mode="after")
    def _threads_are_a_process_s_own(self) -> Self:
        if self.threads is not None and not self.own_process:
            raise ValueError(
                f"threads={self.threads} with own_process=false would hold for everything in the "
                "controller's process; set own_process=true, or drop threads"
            )
        return self


class _EngineProcess(_Supervised):
    """What every engine that runs in a process of its own has."""

    python: str | None = None
    """Interpreter of the engine's own environment; null: the one that runs this."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables set for the engine's process beside the inherited ones, e.g. a ``PYTHONPATH``."""


class EmbeddedGeneration(_Embedded):
    """Batched KV-cache sampling on PyTorch."""

    kind: Literal["embedded"]
    device: Device = "auto"
    dtype: Dtype = "float32"
    max_sequences: PositiveInt = 256
    """Rollouts decoded together."""


class VllmGeneration(_EngineProcess, _Watched):
    """vLLM in a process of its own (extra ``[vllm]``)."""

    kind: Literal["vllm"]
    dtype: Dtype = "bfloat16"
    max_sequences: PositiveInt = 256
    """Rollouts decoded together."""
    max_batched_tokens: PositiveInt | None = None
    """Prompt and new tokens of one engine step; null: vLLM's own default."""
    max_model_tokens: PositiveInt | None = None
    """Longest prompt plus response; null: the student's context length."""
    kv_cache_gib: Gib | None = None
    """Memory of the key-value cache; null: planned, see ``qwen3-distill plan``."""
    quantization: Literal["fp8"] | None = None
    """``fp8``: the student's weights are quantized online for sampling. The importance ratio then
    corrects for it; helps small decode batches only."""
    adapters: Literal["swap", "merge"] = "swap"
    """With LoRA training. ``swap``: the engine serves the adapter beside the student's weights; a
    push is small, every decode step pays for the adapter. ``merge``: whole weights with the
    adapter merged in are pushed; decoding runs at full speed."""
    full_weights: Literal["auto", "ipc", "directory"] = "auto"
    """How whole weights reach the engine. ``auto``: CUDA IPC where the first push shows that it
    works, else files. Adapters always travel as files."""
    kv_cache_at_update: Literal["keep", "recompute"] = "keep"
    """Of running rollouts, when weights come in flight. ``keep``: their keys and values stay those
    of older weights (PipelineRL, arXiv 2509.19128). ``recompute``: the new weights read everything
    in flight again, at every update. Either way a token's logprob is that of the distribution it
    was sampled from."""
    float32_head: bool = False
    """Compute the output head in float32: less noise in logprobs, some speed lost."""
    enforce_eager: bool = False
    """No CUDA graphs: starts sooner, decodes slower."""
    stream_interval: PositiveInt = 8
    """Tokens after which a running rollout's prefix is refreshed."""
    engine_arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of vLLM's ``AsyncEngineArgs``, by its names; lists and objects too, e.g.
    ``{compilation_config: {cudagraph_capture_sizes: [64, 128, 256]}}``."""


GenerationConfig: TypeAlias = Annotated[
    EmbeddedGeneration | VllmGeneration, Field(discriminator="kind")
]


class EmbeddedScoring(_Embedded):
    """The teacher on PyTorch."""

    kind: Literal["embedded"]
    model: str
    """Directory of the teacher (Hugging Face layout)."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    batch_tokens: PositiveInt = 16384
    """Padded tokens of one forward pass."""
    chunk_tokens: PositiveInt = 1024
    """Rows of logits that exist at a time."""


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
"""Options of SGLang's server that have a setting of their own."""


class SglangScoring(_EngineProcess):
    """The teacher in SGLang servers: one that is started here, or some that run elsewhere."""

    kind: Literal["sglang"]
    model: str
    """Directory of the teacher (Hugging Face layout). Tokenizer, vocabulary and the known answer
    are read from it, also when the server runs elsewhere."""
    urls: tuple[str, ...] = ()
    """Servers to connect to, e.g. ``http://10.0.0.2:30000``; none: one is started here, on
    loopback. Requests are balanced over several."""
    api_key_file: str | None = None
    """File with the key of the servers in `urls`; a server started here gets a random one."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the server started here; null: a free one."""
    device: Device = "auto"
    dtype: Dtype = "bfloat16"
    quantization: Literal["fp8"] | None = "fp8"
    """``fp8``: quantized online from a bfloat16 directory. null: as the directory says, which may
    be an FP8 checkpoint."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the memory free at the server's start for weights and cache; null: planned, see
    ``qwen3-distill plan``."""
    max_total_tokens: PositiveInt | None = None
    """Tokens of the server's key-value cache; null: planned."""
    attention_backend: str | None = None
    """SGLang's name of an attention kernel, e.g. ``triton``; null: SGLang chooses."""
    float32_head: bool = False
    """Compute the output head in float32: less noise in scores, some speed lost."""
    chunked_prefill_tokens: PositiveInt = 8192
    """Tokens that the server takes through the layers at a time."""
    chunk_tokens: PositiveInt = 2048
    """Rows of logits that exist at a time."""
    decode_graphs: bool = False
    """CUDA graphs for decoding: the teacher's own answers, in evaluations, come faster; the start
    takes longer, and some memory more."""
    server_arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further options of ``sglang.launch_server`` by their names without the dashes in front, e.g.
    ``{watchdog-timeout: 600}``."""
    request_tokens: PositiveInt = 16384
    """Tokens of one scoring request."""
    max_in_flight: PositiveInt = 4
    """Requests that one server has at a time."""
    request_timeout_s: PositiveFloat = 300.0
    max_attempts: PositiveInt = 4
    """How often a rollout's score is asked for before the rollout is dropped."""
    max_dropped_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Of the rollouts of one step; more stops the run."""
    readiness_tolerance_nats: PositiveFloat = 0.5
    """Mean difference from the known answer up to which a server counts as the teacher."""
    cache: str | None = None
    """Folder of a score cache, kept between runs; null: none."""

    @model_validator(mode="after")
    def _an_argument_has_one_place(self) -> Self:
        twice = sorted(SGLANG_OPTIONS.keys() & self.server_arguments.keys())
        if twice:
            raise ValueError(
                f"server_arguments has {twice[0]!r}, which is set by "
                f"{SGLANG_OPTIONS[twice[0]]}; write it there"
            )
        return self

    @model_validator(mode="after")
    def _remote_servers_are_configured_where_they_run(self) -> Self:
        bad = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if bad:
            raise ValueError(f"urls: {bad[0]!r} is no address; expected e.g. http://10.0.0.2:30000")
        if self.urls and self.port is not None:
            raise ValueError("port is for a server started here, and urls names others: drop one")
        if self.api_key_file is not None and not self.urls:
            raise ValueError(
                "api_key_file is for the servers in urls; one started here gets a random key"
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
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens of one forward and backward pass. Changes memory and speed, not the step."""
    chunk_tokens: PositiveInt = 1024
    """Rows of logits that exist at a time."""
    gradient_checkpointing: bool = False


class UnslothTraining(_EngineProcess, _Watched):
    """unsloth in a process of its own (extra ``[unsloth]``)."""

    kind: Literal["unsloth"]
    dtype: Dtype = "bfloat16"
    """Dtype of the weights. Adapters are float32 whatever it is; ``tuning.kind=full`` needs
    ``float32``."""
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    """``auto``: bfloat16 autocast where float32 weights are trained in full on CUDA, else none."""
    tuning: TuningConfig = Field(default_factory=lambda: LoraTuning(kind="lora"))
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    max_model_tokens: PositiveInt | None = None
    """Longest prompt plus response; null: the student's context length. Longer is an error."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens of one forward and backward pass, padding included. Changes memory and speed, not
    the step."""
    packing: bool | Literal["auto"] = "auto"
    """Put a micro-batch's sequences behind one another instead of padding them. ``auto``: where
    unsloth has an attention kernel for it and a probe at start gives what padding gives. ``true``:
    also without such a kernel, at a cost that grows with the square of `micro_batch_tokens`; a
    failed probe is an error."""
    chunk_tokens: PositiveInt = 1024
    """Rows of logits that exist at a time, in objectives beyond the sampled token's."""
    gradient_checkpointing: Literal["auto", "off", "on", "unsloth"] = "auto"
    """``on`` costs a third more than ``off``: it recomputes every layer, ``unsloth`` also moves
    activations to host memory. ``auto``: the fewest layers that the memory at hand demands."""
    memory_gib: Gib | None = None
    """What ``auto`` may use for weights and activations; null: planned, see
    ``qwen3-distill plan``."""

    @model_validator(mode="after")
    def _bfloat16_weights_forget_small_steps(self) -> Self:
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
    """What the memory plan may assume."""

    device_memory_gib: Gib | None = None
    """Memory that student, teacher and learner share; null: what is free on the device now."""
    reserve_gib: Annotated[float, Field(ge=0, le=1_000_000)] | None = None
    """Left free: the system, and what nobody accounts for. null: 8, or an eighth of the memory
    where that is less."""
    prompt_tokens: PositiveInt = 256
    """How long prompts are, for sizing caches. Longer ones work too: fewer rollouts then run at
    a time."""
