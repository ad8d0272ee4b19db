"""The configuration schema. Values live in ``configs/``; pydantic only, no torch.

Every class is frozen, strict (no coercion) and refuses unknown keys. A choice between kinds is a
union discriminated by ``kind``. Cross-field rules are validators named for what they protect.
Nothing is filled in or adjusted after validation: what is saved in the run folder is what was
written plus the defaults below.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator
from typing_extensions import Self

from qwen3_distill.types import SamplingSpec

PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Gib: TypeAlias = Annotated[float, Field(gt=0, le=1_000_000)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Schema(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


# --- Prompts ------------------------------------------------------------------------------------


class _FilePrompts(Schema):
    prompt_field: str = "prompt"
    """Column with the prompt: a string, or a list of ``{"role", "content"}`` messages."""
    answer_field: str | None = None
    """Column with the reference answer that the verifier compares with."""
    system: str | None = None
    """System message put before every prompt."""
    suffix: str = ""
    """Text appended to every last user message, e.g. an instruction about the answer's form."""
    limit: PositiveInt | None = None
    """Use only the first so many rows."""


class JsonlPrompts(_FilePrompts):
    """Prompts from a JSON Lines file."""

    kind: Literal["jsonl"]
    path: str


class ParquetPrompts(_FilePrompts):
    """Prompts from a Parquet file."""

    kind: Literal["parquet"]
    path: str


class HuggingFacePrompts(_FilePrompts):
    """Prompts from a Hugging Face dataset: a hub id or a directory."""

    kind: Literal["hf"]
    path: str
    """Hub id (``openai/gsm8k``) or local directory."""
    name: str | None = None
    """Configuration of the dataset, e.g. ``main``."""
    split: str = "train"
    revision: str | None = None
    """Commit of the dataset; pin it for a run that can be made again."""


class TaskPrompts(Schema):
    """Problems of a procedural task. Training and evaluation never share a problem."""

    kind: Literal["task"]
    task: Literal["chain"] = "chain"
    split: Literal["train", "eval"] = "train"
    limit: PositiveInt | None = None
    """Cycle over the first so many problems instead of an endless supply."""


PromptsConfig: TypeAlias = Annotated[
    JsonlPrompts | ParquetPrompts | HuggingFacePrompts | TaskPrompts, Field(discriminator="kind")
]


class TaskVerifier(Schema):
    """Exact check of a procedural task's final answer."""

    kind: Literal["task"]
    task: Literal["chain"] = "chain"


class MathVerifier(Schema):
    """Mathematical equality with the reference answer, by math-verify."""

    kind: Literal["math"]


VerifierConfig: TypeAlias = Annotated[TaskVerifier | MathVerifier, Field(discriminator="kind")]


# --- Sampling, engines --------------------------------------------------------------------------


class SamplingConfig(Schema):
    """How rollouts are sampled."""

    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """0: no limit."""
    max_new_tokens: PositiveInt = 512

    def spec(self, seed: int) -> SamplingSpec:
        """One rollout's `SamplingSpec`."""
        return SamplingSpec(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
        )


Device: TypeAlias = Literal["auto", "cpu", "cuda"]
"""``auto``: CUDA where there is a GPU, else the CPU."""
Dtype: TypeAlias = Literal["float32", "bfloat16"]
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


class EmbeddedGeneration(_Embedded):
    """Batched KV-cache sampling on PyTorch."""

    kind: Literal["embedded"]
    device: Device = "auto"
    dtype: Dtype = "float32"
    max_sequences: PositiveInt = 256
    """Rollouts decoded together."""


class _EngineProcess(_Supervised):
    """What every engine that runs in a process of its own has."""

    python: str | None = None
    """Interpreter of the engine's own environment; null: the one that runs this."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables set for the engine's process beside the inherited ones, e.g. a ``PYTHONPATH``."""


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


# --- Objective ----------------------------------------------------------------------------------


class NoBaseline(Schema):
    """b = 0."""

    kind: Literal["none"]


class TopKBaseline(Schema):
    """b = KL(student || teacher) over the teacher's k most likely tokens and one tail outcome."""

    kind: Literal["top_k"]
    k: PositiveInt = 16


class FullBaseline(Schema):
    """b = KL(student || teacher), exact, from the teacher's hidden states."""

    kind: Literal["full"]


BaselineConfig: TypeAlias = Annotated[
    NoBaseline | TopKBaseline | FullBaseline, Field(discriminator="kind")
]


class SampledReverseKL(Schema):
    """Policy gradient of KL(student || teacher) on the sampled tokens."""

    kind: Literal["sampled_reverse_kl"]
    ratio_cap: PositiveFloat | None = 2.0
    """Cap c of the importance ratio min(pi/mu, c); null: no ratio (mu is taken for pi)."""
    advantage_clip: PositiveFloat | None = 5.0
    """Clip a of the advantage to [-a, a] nats; null: no clip."""
    kl_baseline: BaselineConfig = Field(default_factory=lambda: NoBaseline(kind="none"))
    """Per-token baseline b. Leaves the expected gradient as it is, where the clip does not bite,
    and lowers its variance."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of later tokens' signals in a token's advantage. 0: each token answers for itself."""
    task_reward_weight: NonNegativeFloat = 0.0
    """Weight of the verifier's group-centred reward, added to every token's advantage."""

    @model_validator(mode="after")
    def _a_baseline_cancels_discounted_signals(self) -> Self:
        if self.discount > 0 and self.kl_baseline.kind != "none":
            raise ValueError(
                f"discount={self.discount} with kl_baseline.kind={self.kl_baseline.kind}: the "
                "baselines of later tokens depend on this token's action and cancel what the "
                "discount adds; use kl_baseline.kind=none or discount=0"
            )
        return self


class _Divergence(Schema):
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """``reverse_kl``: KL(student || teacher); ``forward_kl``: KL(teacher || student); ``jsd``:
    the mixture M = beta teacher + (1 - beta) student, beta KL(teacher || M) + (1 - beta)
    KL(student || M)."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Weight of the teacher in the mixture; for ``jsd`` only, and needed by it."""

    @model_validator(mode="after")
    def _beta_belongs_to_jsd(self) -> Self:
        if (self.beta is None) == (self.divergence == "jsd"):
            raise ValueError(
                f"divergence={self.divergence} with beta={self.beta}: "
                "set beta (e.g. 0.5) with divergence=jsd and only with it"
            )
        return self


class TopKDivergence(_Divergence):
    """A divergence over the teacher's k most likely tokens at every position."""

    kind: Literal["top_k"]
    k: Annotated[int, Field(ge=1)] = 16
    tail: Literal["renormalize", "bin"] = "bin"
    """``bin``: one more outcome holds the rest of both; ``renormalize``: both are divided by
    their mass on the k."""

    @model_validator(mode="after")
    def _renormalized_top_1_has_no_gradient(self) -> Self:
        if self.k == 1 and self.tail == "renormalize":
            raise ValueError(
                "k=1 with tail=renormalize: both distributions become 1 on the one token, so the "
                "gradient is zero everywhere; use tail=bin or k >= 2"
            )
        return self


class FullDivergence(_Divergence):
    """A divergence over the whole vocabulary, from the teacher's hidden states."""

    kind: Literal["full"]


ObjectiveConfig: TypeAlias = Annotated[
    SampledReverseKL | TopKDivergence | FullDivergence, Field(discriminator="kind")
]


def needs_hidden_states(objective: ObjectiveConfig) -> bool:
    """Whether the teacher's full distribution is compared with."""
    return objective.kind == "full" or (
        objective.kind == "sampled_reverse_kl" and objective.kl_baseline.kind == "full"
    )


def candidates_per_token(objective: ObjectiveConfig) -> int:
    """K: how many of the teacher's most likely tokens every position has; 0 for none."""
    if objective.kind == "top_k":
        return objective.k
    if objective.kind == "sampled_reverse_kl" and objective.kl_baseline.kind == "top_k":
        return objective.kl_baseline.k
    return 0


# --- Training -----------------------------------------------------------------------------------


class FullTuning(Schema):
    """Every weight of the student is trained."""

    kind: Literal["full"]


class LoraTuning(Schema):
    """Low-rank adapters (peft) on the named linear layers."""

    kind: Literal["lora"]
    rank: PositiveInt = 32
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


TuningConfig: TypeAlias = Annotated[FullTuning | LoraTuning, Field(discriminator="kind")]


class ConstantSchedule(Schema):
    """The learning rate stays."""

    kind: Literal["constant"]


class WarmupCosineSchedule(Schema):
    """Linear warm-up, then a cosine down to a share of the peak at the run's last step."""

    kind: Literal["warmup_cosine"]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1


ScheduleConfig: TypeAlias = Annotated[
    ConstantSchedule | WarmupCosineSchedule, Field(discriminator="kind")
]


class OptimizerConfig(Schema):
    """AdamW."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0e-5
    betas: tuple[
        Annotated[float, Field(ge=0, lt=1)],
        Annotated[float, Field(ge=0, lt=1)],
    ] = (0.9, 0.98)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    schedule: ScheduleConfig = Field(default_factory=lambda: ConstantSchedule(kind="constant"))


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


# --- Replay -------------------------------------------------------------------------------------


class UniformLaw(Schema):
    """Every rollout that is young enough is drawn alike."""

    kind: Literal["uniform"]


class _PriorityLaw(Schema):
    age_decay_steps: PositiveFloat | None = None
    """tau: a rollout's priority counts exp(-age / tau), its age in optimizer steps; null: its age
    does not matter."""
    uniform_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the probability that is spread over all rollouts alike."""


class ProportionalLaw(_PriorityLaw):
    """Drawn in proportion to priority^alpha (arXiv 1511.05952)."""

    kind: Literal["proportional"]
    alpha: Annotated[float, Field(gt=0, le=2)] = 0.6


class RankLaw(_PriorityLaw):
    """Drawn in proportion to rank^-alpha, rank 1 for the largest priority (arXiv 1511.05952)."""

    kind: Literal["rank"]
    alpha: Annotated[float, Field(gt=0, le=2)] = 0.7


ReplayLaw: TypeAlias = Annotated[
    UniformLaw | ProportionalLaw | RankLaw, Field(discriminator="kind")
]

MIN_PRIORITY_NATS = 1e-3
"""What is learned stays drawable."""


class ReplayConfig(Schema):
    """Rollouts with their teacher's scores, kept on the learner's device and trained on again."""

    capacity_tokens: PositiveInt
    """Prompt and response tokens that are kept; 12 bytes each, and 8 more per candidate of the
    teacher. The oldest rollouts make room."""
    capacity_rollouts: PositiveInt | None = None
    """Rollouts that are kept; null: one for every 32 tokens, so that the tokens decide."""
    max_age_steps: Annotated[int, Field(ge=0)] = 4
    """Rollouts whose oldest token is older, in optimizer steps, are dropped."""
    law: ReplayLaw = Field(default_factory=lambda: UniformLaw(kind="uniform"))
    """Which rollouts are drawn."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps for each batch of fresh rollouts."""
    reuse_cap: PositiveInt | None = None
    """A rollout is dropped when it was trained on so often; null: no limit but its age."""
    coverage_first: bool = False
    """Rollouts that were never trained on are drawn before any that were."""
    priority_clip_nats: PositiveFloat = 2.0
    """Largest priority, which is the mean over a rollout's tokens of the advantage's absolute
    value, or of the divergence."""
    beta_start: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Exponent of the importance weight (1 / (N P))^beta at step 0. 0: no correction, 1: the
    expected gradient is that of uniform drawing. Uniform drawing needs none, whatever it is."""
    beta_end: Annotated[float, Field(ge=0, le=1)] = 1.0
    beta_steps: PositiveInt = 500
    """Steps in which it goes, linearly, from `beta_start` to `beta_end`."""

    @model_validator(mode="after")
    def _the_largest_priority_is_above_the_least(self) -> Self:
        if self.priority_clip_nats <= MIN_PRIORITY_NATS:
            raise ValueError(
                f"priority_clip_nats={self.priority_clip_nats}: expected more than the least "
                f"priority of {MIN_PRIORITY_NATS}, or all rollouts have the same"
            )
        return self

    @model_validator(mode="after")
    def _every_update_finds_rollouts(self) -> Self:
        if self.reuse_cap is not None and self.reuse_cap < self.updates_per_batch:
            raise ValueError(
                f"reuse_cap={self.reuse_cap} with updates_per_batch={self.updates_per_batch}: "
                "rollouts would be used up before the next ones come; raise reuse_cap or lower "
                "updates_per_batch"
            )
        if self.max_age_steps < self.updates_per_batch - 1:
            raise ValueError(
                f"max_age_steps={self.max_age_steps} with updates_per_batch="
                f"{self.updates_per_batch}: a batch would be too old before its last update; "
                "raise max_age_steps or lower updates_per_batch"
            )
        return self


# --- The run ------------------------------------------------------------------------------------


_TEMPLATE_CALL = {
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}
"""Arguments of `apply_chat_template` that are none of the template's."""


class StudentConfig(Schema):
    """The model that is distilled into."""

    model: str
    """Directory of the student (Hugging Face layout)."""
    template_arguments: dict[str, bool | int | str] = Field(default_factory=dict)
    """Passed to the chat template, e.g. ``{enable_thinking: false}`` for Qwen3."""

    @field_validator("template_arguments")
    @classmethod
    def _are_the_templates_own(
        cls, arguments: dict[str, bool | int | str]
    ) -> dict[str, bool | int | str]:
        if taken := _TEMPLATE_CALL & arguments.keys():
            raise ValueError(
                f"{', '.join(sorted(taken))} may not be set: the template does not take it, "
                "and prompts are always rendered up to where the answer begins"
            )
        return arguments


class EvaluationConfig(Schema):
    """Held-out accuracy before, during and after the run."""

    prompts: PromptsConfig
    """Held-out problems, always the same first ones."""
    verifier: VerifierConfig
    """What counts as correct."""
    every_steps: PositiveInt = 25
    num_problems: PositiveInt = 500
    """At most; fewer where there are fewer. Every result says over how many."""
    final_num_problems: PositiveInt | None = None
    """Problems before, after and for the teacher; null: `num_problems`."""
    samples_per_problem: PositiveInt = 1
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    teacher: bool = True
    """Also measure the teacher, once, before the run."""


class CheckpointConfig(Schema):
    """What a crash can cost: at most ``every_steps`` steps."""

    every_steps: PositiveInt = 25
    keep_last: PositiveInt = 2


class WandbTracker(Schema):
    """Weights & Biases (extra ``[wandb]``)."""

    kind: Literal["wandb"]
    project: str
    offline: bool = False


class TrackioTracker(Schema):
    """trackio (extra ``[trackio]``)."""

    kind: Literal["trackio"]
    project: str


TrackerConfig: TypeAlias = Annotated[WandbTracker | TrackioTracker, Field(discriminator="kind")]


class LoggingConfig(Schema):
    """What a run writes beside ``metrics.jsonl``."""

    tensorboard: bool = True
    rollouts_every_steps: PositiveInt = 10
    """Save rollouts of every so many steps, with their scores."""
    rollouts_per_save: PositiveInt = 16
    """Rollouts kept of such a step."""
    trackers: tuple[TrackerConfig, ...] = ()
    trace: bool = True
    """Write ``trace.json``: what every stage did when, for ui.perfetto.dev and the report."""


class _Pipeline(Schema):
    mps: bool = False
    """Have the engines' processes share the GPU through an MPS daemon of the run's own, so that
    their kernels run side by side, those of vLLM after the others'. Where there is none to be had,
    the run says so and goes on."""


class SequentialPipeline(_Pipeline):
    """Generate, score, train, publish: one after another. Strictly on-policy."""

    kind: Literal["sequential"]


class PrefixBudget(Schema):
    """Train on the first tokens of most answers; the rest of those is never sampled."""

    tokens: PositiveInt
    """New tokens of a shortened rollout, where `sampling.max_new_tokens` allows more."""
    full_length_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of rollouts, drawn by their numbers, that are sampled to their end: only they show
    the student where to stop."""


class Harvest(Schema):
    """Train on what there is of running rollouts when a step's time is up."""

    deadline_s: PositiveFloat
    """Seconds after the step before, at which a step takes the prefixes of running rollouts."""
    min_tokens: PositiveInt = 32
    """A rollout with fewer tokens that were not harvested before is left alone."""
    full_length_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of rollouts, drawn by their numbers, that are never harvested."""


class StreamingPipeline(_Pipeline):
    """Generate, score and train at the same time: rollouts run on across steps."""

    kind: Literal["streaming"]
    max_staleness_steps: Annotated[int, Field(ge=0)] = 4
    """Age in optimizer steps up to which a rollout is trained on, judged by its oldest token; an
    older one is dropped and counted. 0 is strictly on-policy."""
    max_steps_ahead: Annotated[int, Field(ge=0)] | None = None
    """How far generation runs ahead of training: rollouts for at most so many steps beyond the
    coming one are out at a time; null: max_staleness_steps. Where a few answers are much longer
    than the rest, a small number here and a large max_staleness_steps keep the rest fresh and do
    not drop the few."""
    max_in_flight: PositiveInt | None = None
    """Rollouts that are sampled at a time; null: generation.max_sequences."""
    pause_at_ready_steps: PositiveInt | None = None
    """While the learner steps, decoding pauses once rollouts for so many further steps have ended:
    a decode batch that runs empty costs the device as much as a full one. What is paused ages, so
    leave max_staleness_steps some room. Null: it never pauses."""
    weight_updates: Literal["in_flight", "boundary"] = "in_flight"
    """``in_flight``: running rollouts go on with the new weights, and their tokens keep the
    version that sampled them. ``boundary``: a version is loaded when no rollout is running, and
    until then none is begun."""
    scoring_calls: PositiveInt = 2
    """Calls to the teacher under way at a time; each takes all rollouts that wait for a score."""
    harvest: Harvest | None = None
    """Null: only finished rollouts are trained on."""
    prefix: PrefixBudget | None = None
    """Null: every rollout is sampled to its end."""
    stall_timeout_s: PositiveFloat = 1800.0
    """With no rollout finished and none scored for so long, or a call of a stage (scores, a step,
    new weights) that takes so long, the run stops and says what it waited for."""


PipelineConfig: TypeAlias = Annotated[
    SequentialPipeline | StreamingPipeline, Field(discriminator="kind")
]


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
