"""The teachers: on PyTorch, or in servers."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, model_validator
from typing_extensions import Self

from qwen3_distill.config.addresses import checked_url, has_user
from qwen3_distill.config.base import Device, Dtype, PathText, PositiveFloat, PositiveInt, Seconds
from qwen3_distill.config.processes import EmbeddedProcess, EngineProcess
from qwen3_distill.config.teacher_context import TeacherConfig
from qwen3_distill.config.tokenizer import TeacherTokenizer


class EmbeddedScoring(EmbeddedProcess, TeacherConfig, TeacherTokenizer):
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

    @property
    def channel_scales_refused(self) -> str | None:
        """Why no FP8 checkpoint with a scale per channel can be the teacher."""
        return (
            "which a teacher of kind=embedded does not compute with; use kind sglang or vllm, or "
            "give the unquantized model"
        )


class ServedScoring(EngineProcess, TeacherConfig, TeacherTokenizer):
    """A teacher in servers that are asked over HTTP: one that the run starts, or existing ones."""

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
    max_total_tokens: PositiveInt | None = None
    """Tokens in the server's KV cache; null: planned."""
    float32_head: bool = False
    """Compute the output head in float32: scores have less noise, scoring is slower."""
    decode_graphs: bool = False
    """Use CUDA graphs for decoding: the teacher's evaluation is faster; the start takes longer and
    more memory."""
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

    @property
    def channel_scales_refused(self) -> str | None:
        """Why no FP8 checkpoint with a scale per channel can be the teacher; None: it can."""
        if self.quantization is None or self.urls:
            return None
        return (
            f"and this teacher's quantization={self.quantization} quantizes a bfloat16 model; set "
            "its quantization=null"
        )

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


def check_server_arguments(arguments: dict[str, JsonValue], options: dict[str, str]) -> None:
    """Refuse arguments that a setting gives, or that are not written as a name and its value.

    Args:
        options: options that settings give, each with the setting.

    Raises:
        ValueError: says what to write.
    """
    words = {"no": "false", "off": "false", "false": "false"}
    words |= {"yes": "true", "on": "true", "true": "true"}
    for name, value in arguments.items():
        plain = name.lstrip("-").replace("_", "-")
        # The servers take the beginning of an option's name for the option.
        option = next((known for known in options if known.startswith(plain)), None)
        if option is not None:
            raise ValueError(
                f"server_arguments has {name!r}, which is set by {options[option]}; write it there"
            )
        if name.startswith("-") or "=" in name or not name.isprintable() or " " in name:
            raise ValueError(
                f"server_arguments has {name!r}; write the option's name alone, without "
                f"leading dashes, e.g. {{{plain.partition('=')[0].strip()}: value}}"
            )
        if isinstance(value, str) and (meant := words.get(value.lower())):
            raise ValueError(
                f"server_arguments has {name}: {value!r}, which is text; write {name}: "
                f"{meant}, without quotes (in YAML 1.2 yes, no, on and off are text)"
            )


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


class SglangScoring(ServedScoring):
    """The teacher in SGLang servers: one that the run starts, or existing ones."""

    kind: Literal["sglang"]
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the memory that is free when the server starts, for its weights and KV cache; null:
    planned, see ``qwen3-distill plan``."""
    attention_backend: str | None = None
    """Attention kernel under SGLang's name, e.g. ``triton``; null: SGLang chooses."""
    chunked_prefill_tokens: PositiveInt = 8192
    """Tokens that the server prefills at a time."""
    chunk_tokens: PositiveInt = 2048
    """Rows of logits held in memory at a time."""
    server_arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further options of ``sglang.launch_server``, named without the leading dashes, e.g.
    ``{watchdog-timeout: 600}``."""

    @model_validator(mode="after")
    def _server_arguments_have_no_setting(self) -> Self:
        check_server_arguments(dict(self.server_arguments), SGLANG_OPTIONS)
        return self


VLLM_SERVER_OPTIONS = {
    "model": "scoring.model",
    "host": "this package: loopback only",
    "port": "scoring.port",
    "api-key": "this package: a random one",
    "dtype": "scoring.dtype",
    "quantization": "scoring.quantization",
    "kv-cache-memory-bytes": "scoring.max_total_tokens",
    "gpu-memory-utilization": "scoring.max_total_tokens",
    "max-model-len": "scoring.max_model_tokens",
    "max-num-seqs": "scoring.max_sequences",
    "max-num-batched-tokens": "scoring.chunked_prefill_tokens",
    "enforce-eager": "scoring.decode_graphs",
    "max-logprobs": "this package: as many as the objective needs",
    "logprobs-mode": "this package: logprobs are those of the sampled distribution",
    "generation-config": "this package: a model's file changes no sampling",
    "skip-tokenizer-init": "this package: only token ids travel",
    "enable-chunked-prefill": "this package: on, except on a CPU",
}
"""Options of vLLM's server that may not be in ``server_arguments``, and what sets them."""


class VllmScoring(ServedScoring):
    """The teacher in vLLM servers: one that the run starts, or existing ones."""

    kind: Literal["vllm"]
    max_model_tokens: PositiveInt | None = None
    """Maximum tokens of a scored sequence; null: the teacher's context length. vLLM's KV cache
    must hold one sequence of this length."""
    max_sequences: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Sequences that the server computes concurrently."""
    chunked_prefill_tokens: PositiveInt = 2048
    """Tokens that the server prefills at a time. Their logits are held in memory together: at a
    vocabulary of 152,000, 1.5 MB a token."""
    server_arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Further options of ``vllm serve``, named without the leading dashes, e.g.
    ``{tensor-parallel-size: 2}``; lists and objects are allowed."""

    @model_validator(mode="after")
    def _server_arguments_have_no_setting(self) -> Self:
        options = VLLM_SERVER_OPTIONS
        if self.float32_head:
            options = options | {"hf-overrides": "scoring.float32_head"}
        # `no-` before a flag's name and a dotted path below an option set the option too.
        plain = {
            name.removeprefix("no-").partition(".")[0]: value
            for name, value in self.server_arguments.items()
        }
        check_server_arguments(self.server_arguments, options)
        check_server_arguments(plain, options)
        return self


ScoringConfig: TypeAlias = Annotated[
    EmbeddedScoring | SglangScoring | VllmScoring, Field(discriminator="kind")
]
