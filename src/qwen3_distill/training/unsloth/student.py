"""unsloth's model under the shared learner. Imported in the worker's process only.

Two paths, by device. On CUDA, LoRA runs unsloth's fused kernels and its own attention; on a CPU,
and where all weights are trained, unsloth prepares Hugging Face's model and that one runs. The
logprobs of sampled tokens come from unsloth's fused output head on both.

Shape letters: B rows of a micro-batch, T positions, N loss tokens, D hidden size, V vocabulary.
"""
# pyright: reportAttributeAccessIssue=false

import contextlib
import gc
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import unsloth  # pyright: ignore[reportMissingImports] - its patches must come first

# isort: split
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from unsloth_zoo.fused_losses.fused_linear import (  # pyright: ignore[reportMissingImports]
    fused_linear_logprobs,
)

from qwen3_distill.config import LoraTuning, ObjectiveConfig, ReplayConfig, UnslothTraining
from qwen3_distill.errors import EngineStartError, ModelError
from qwen3_distill.modeling.cpu_warmup import settle_vector_math
from qwen3_distill.modeling.directory import weight_files
from qwen3_distill.modeling.head import TokenStats
from qwen3_distill.modeling.loading import (
    allow_cudnn_attention,
    load_identity,
    resolve_device,
    resolve_dtype,
)
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.modeling.step_memory import (
    GIB,
    Checkpointing,
    MemoryModel,
    allocator_bytes,
    autocasts,
)
from qwen3_distill.replay.buffer import ReplayBuffer, build_replay
from qwen3_distill.training.batching import MicroBatch, SharedPrompt
from qwen3_distill.training.fp8_base import check_fp8_layers, check_gradient, freeze_in_fp8
from qwen3_distill.training.gradient_probe import probe_rows
from qwen3_distill.training.learner import TorchLearner
from qwen3_distill.training.lora import check_targets, initialise_adapters
from qwen3_distill.training.memory_lack import memory_lack
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.training.prompt_attention import (
    PromptAttention,
    hidden_states,
    share_prompts,
    without_answers,
)
from qwen3_distill.training.segments import describe_segments, lendable
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.training.unsloth.attention import arguments_with, patch_attention
from qwen3_distill.training.unsloth.compiled_layers import (
    compiler_errors,
    describe_layers,
    uncompiled_layers,
)
from qwen3_distill.training.unsloth.fp8_layers import round_fused_gradients
from qwen3_distill.training.unsloth.packing_probe import (
    Gap,
    packing_gap,
    recompute_first_layers,
    shared_prompts_gap,
)
from qwen3_distill.types import Metric

_PROBE_TOLERANCE = {
    "float32": Gap(hidden=1e-3, gradient=1e-3),
    "bfloat16": Gap(hidden=0.2, gradient=0.5),
}
"""Largest `packing_gap` with which sequences are packed; likewise `shared_prompts_gap`. Random
models of 36 layers have up to 0.08 and 0.19 in bfloat16, with FP8; what is wrong has about 1."""
_HEAD_TOLERANCE_NATS = 5e-3
"""Rounded logits are off by ten times as much, sums in another order by a hundredth."""


def open_learner(settings: LearnerSettings[UnslothTraining]) -> TorchLearner:
    """Load the student and put the shared learner on top.

    Raises:
        EngineStartError: the device's memory does not even hold the weights, or the replay buffer.
    """
    config, budget = settings.training, settings.memory_bytes
    _forget_the_model_before()
    if budget is None and config.memory_gib is not None:
        budget = int(config.memory_gib * GIB)
    _keep_to(budget)
    buffer = None
    if settings.replay is not None:  # before the plan, which looks at what is free
        buffer = _build_replay(settings.replay, settings.objective, settings.seed)
        budget = None if budget is None else max(budget - buffer.num_bytes, 1)
    merges = isinstance(config.tuning, LoraTuning) and not settings.publish_adapter
    plan = CheckpointingPlan(settings.model_dir, config, budget, merges=merges)
    with memory_lack() as lack:
        student = UnslothStudent(settings.model_dir, config, settings.seed, plan)
        objective = build_objective(
            settings.objective,
            teacher_head_VD=None,
            chunk_tokens=config.chunk_tokens,
            token_statistics=fused_token_stats,
            has_exact_statistics=student.has_exact_head,
        )
        return TorchLearner(settings, student, objective, buffer)
    raise EngineStartError(
        f"unsloth learner: no memory for the weights. Planned: {plan.report()}. Found: {lack.text} "
        "Give the learner more (training.memory_gib, planning), or train adapters of lower rank"
    )


def _build_replay(config: ReplayConfig, objective: ObjectiveConfig, seed: int) -> ReplayBuffer:
    with memory_lack() as lack:
        return build_replay(config, objective, device=resolve_device("auto"), seed=seed)
    raise EngineStartError(
        f"unsloth learner: no memory for the replay buffer. Found: {lack.text} Lower "
        "replay.capacity_tokens, or give the learner more (training.memory_gib, planning)"
    )


def fused_token_stats(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> TokenStats:
    """Logprobs and entropies from one pass without [N, V] logits.

    The backward pass has none either where the head is frozen.
    """
    logprob_N, entropy_N = fused_linear_logprobs(
        hidden_ND, head_VD, target_N, return_entropy=True, entropy_requires_grad=False
    )
    return TokenStats(logprob_N, entropy_N)


@torch.no_grad()
def head_rounding(device: torch.device, dtype: torch.dtype) -> float:
    """Return how far, in nats, the fused head's logprobs are from those of float32 logits.

    It makes float32 logits from matrices in 16 bits where the device can. Where it cannot, logits
    of 16 and more are rounded to 0.1.
    """
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(64, 256, generator=generator).to(device, dtype)
    head_VD = torch.randn(1024, 256, generator=generator).to(device, dtype)
    target_N = torch.randint(1024, (64,), generator=generator).to(device)
    fused_N = fused_token_stats(hidden_ND, head_VD, target_N).logprob_N
    exact_NV = torch.log_softmax(hidden_ND.float() @ head_VD.float().T, dim=-1)
    return float((fused_N - exact_NV.gather(1, target_N[:, None]).squeeze(1)).abs().max())


class CheckpointingPlan:
    """The choice of layers that are recomputed, made before loading, which depends on it.

    Args:
        memory_bytes: the memory this process may use; None: all that is free on the device.
        merges: weights are published with the adapters merged in.
    """

    def __init__(
        self, model_dir: Path, config: UnslothTraining, memory_bytes: int | None, *, merges: bool
    ) -> None:
        self._device = resolve_device("auto")
        self._shape = read_shape(model_dir)
        self._micro_batch_tokens = config.micro_batch_tokens
        self._mode = config.gradient_checkpointing
        self._budget = memory_bytes
        if memory_bytes is None and self._device.type == "cuda":
            self._budget = _free_bytes(self._device)
        self._model = MemoryModel.of(
            self._shape, config, on_gpu=self._device.type == "cuda", merges=merges
        )
        self.choice = self._choose()

    def report(self) -> str:
        """The choice with its figures."""
        peak = self._model.peak_bytes(self._micro_batch_tokens, self.choice) / GIB
        have = "unknown" if self._budget is None else f"{self._budget / GIB:.1f} GiB"
        return (
            f"{self.choice.describe(self._shape)} "
            f"(gradient_checkpointing={self._mode}), a peak of {peak:.1f} GiB with "
            f"micro-batches of {self._micro_batch_tokens} tokens, of {have}"
        )

    def _choose(self) -> Checkpointing:
        layers = self._shape.num_layers
        if self._mode == "off" or (self._mode == "auto" and self._budget is None):
            return Checkpointing(recomputed_layers=0, offload=False)  # host memory is unplanned
        if self._mode != "auto" or self._budget is None:
            return Checkpointing(recomputed_layers=layers, offload=self._mode == "unsloth")
        return self._model.fewest_recomputed(
            self._micro_batch_tokens,
            allocator_bytes(self._budget),
            may_offload=self._device.type == "cuda" and not _shares_memory(self._device),
        )


class UnslothStudent:
    """A student that unsloth loaded."""

    def __init__(
        self, model_dir: Path, config: UnslothTraining, seed: int, plan: CheckpointingPlan
    ) -> None:
        self._config = config
        self._plan = plan
        self.device = resolve_device("auto")
        self._fused = self.device.type == "cuda" and isinstance(config.tuning, LoraTuning)
        if self._fused:  # its attention pads lengths to multiples of 128 for cuDNN
            allow_cudnn_attention()
        with lendable():  # what the adapters do not change is published where it is
            self.core: PreTrainedModel = _load(model_dir, config, seed, plan.choice)
        _check_weights(model_dir, self.core)
        recompute_first_layers(self.core, plan.choice.recomputed_layers)
        self._attends_itself = self._fused and not _has_varlen_kernel()
        """Packed rows are attended to as shared prompts are: unsloth has no kernel for them."""
        if self._fused and (
            config.shared_prompts or (config.packing is True and self._attends_itself)
        ):
            patch_attention(self.core.model.layers)  # before anything is compiled
        self._base = self._round_gradients(model_dir)
        self.shares_prompts, self._sharing = self._decide_sharing()
        self.packs, self._packing = self._decide_packing()
        dtype = torch.bfloat16 if self._computes_in_bfloat16 else resolve_dtype(config.dtype)
        self.has_exact_head = head_rounding(self.device, dtype) < _HEAD_TOLERANCE_NATS
        """Whether the fused head's logits are not rounded."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        on = autocasts(self._config, on_gpu=self.device.type == "cuda")
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def hidden(self, micro: MicroBatch) -> Tensor:
        if micro.shared is not None:
            return self._shared_hidden(micro.input_BT, micro.position_BT, micro.shared)
        if self.packs:
            return self._packed_hidden(micro.input_BT, micro.position_BT, micro.sequence_tokens)
        # Padded on the right, without a mask: causal attention never sees what follows, and unsloth
        # would drop the mask.
        return self.core.model(input_ids=micro.input_BT, use_cache=False)[0]

    def metrics(self) -> tuple[Metric, ...]:
        return (Metric.last("train/recomputed_layers", self._plan.choice.recomputed_layers),)

    def memory_report(self) -> str:
        return self._plan.report()

    def describe(self) -> dict[str, str]:
        return {
            "unsloth": str(unsloth.__version__),
            "device": str(self.device),
            "kernels": "unsloth's fused ones" if self._fused else "Hugging Face's",
            "frozen layers": self._base,
            "layers": describe_layers(self.core),
            "candidates": "by the fused head" if self.has_exact_head else "in chunks of logits",
            "memory": self._plan.report(),
            **({"segments": describe_segments()} if self.device.type == "cuda" else {}),
            "packing": self._packing,
            "shared prompts": self._sharing,
        }

    def _packed_hidden(
        self, input_1T: Tensor, position_1T: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        if self._attends_itself:
            return self._shared_hidden(input_1T, position_1T, without_answers(lengths))
        known: dict[str, Any] = {}
        if self._fused:
            # Lengths on the host spare unsloth a wait for the device to find them in positions.
            known["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        return self.core.model(
            input_ids=input_1T, position_ids=position_1T, use_cache=False, **known
        )[0]

    def _shared_hidden(
        self, input_1T: Tensor, position_1T: Tensor, shared: Sequence[SharedPrompt]
    ) -> Tensor:
        attention = PromptAttention(shared, self.device)
        if not self._fused:
            return hidden_states(self.core, input_1T, position_1T, attention)
        return self.core.model(
            input_ids=input_1T,
            position_ids=position_1T,
            use_cache=False,
            **arguments_with(attention, input_1T.shape[1]),
        )[0]

    def _round_gradients(self, model_dir: Path) -> str:
        """Compute the gradients that pass through frozen layers in FP8, if asked, and say so."""
        precision = self._config.base_precision
        if precision == "as_loaded":
            return "as loaded"
        check_fp8_layers(self.core, precision)
        with self.autocast(), uncompiled_layers():
            expected = probe_rows(self.core)
        fused = round_fused_gradients(self.core) if self._fused else set[str]()
        freeze_in_fp8(self.core, model_dir, precision, done=fused)
        with self.autocast(), compiler_errors():
            gap = check_gradient(probe_rows(self.core), expected, precision)
        how = f"input gradients in FP8, {len(fused)} of them in fused functions"
        return f"{how}; gradients moved by {gap:.1e} of their norms at most"

    def _decide_sharing(self) -> tuple[bool, str]:
        """Whether prompts are shared, and why.

        Raises:
            EngineStartError: it is asked for, and answers behind a prompt have other hidden states.
        """
        if not self._config.shared_prompts:
            return False, "off"
        if not self._fused:
            share_prompts(self.core)
        with self.autocast():
            gap = shared_prompts_gap(self.core, self._shared_hidden, compiles=self._fused)
        if gap.exceeds(self._tolerance):
            raise EngineStartError(
                "unsloth learner: training.shared_prompts=true, but answers behind a shared prompt "
                f"differ from single sequences by {gap}, more than {self._tolerance}; set "
                "training.shared_prompts=false"
            )
        return True, f"on: differs from single sequences by {gap}"

    @property
    def _tolerance(self) -> Gap:
        """Largest gap to single sequences with which rows are packed or prompts shared."""
        exact = _PROBE_TOLERANCE["float32"]
        rounded = _PROBE_TOLERANCE["bfloat16"]
        if self._computes_in_bfloat16 or self._config.dtype == "bfloat16":
            return rounded
        # The sum of rounded gradients is not the rounded sum.
        is_exact = self._config.base_precision == "as_loaded"
        return exact if is_exact else exact._replace(gradient=rounded.gradient)

    @property
    def _computes_in_bfloat16(self) -> bool:
        """Whether products are in bfloat16 whatever the weights are."""
        return autocasts(self._config, on_gpu=self.device.type == "cuda")

    def _decide_packing(self) -> tuple[bool, str]:
        """Whether micro-batches are packed, and why."""
        wanted = self._config.packing
        if wanted is False:
            return False, "off"
        if wanted == "auto" and not self._fused:
            where = f"{self._config.tuning.kind} tuning on {self.device.type}"
            return False, f"off: unsloth has no attention kernel for it with {where}"
        if wanted == "auto" and not _has_varlen_kernel():
            return False, (
                "off: neither flash-attn nor xformers is installed, and unsloth takes PyTorch's "
                "kernel for packed rows from 2.12 on; packing=true uses it here"
            )
        with self.autocast():
            gap = packing_gap(self.core, self._packed_hidden, compiles=self._attends_itself)
        if not gap.exceeds(self._tolerance):
            return True, f"on: differs from single sequences by {gap}"
        reason = (
            f"packed sequences differ from single ones by {gap}, more than {self._tolerance}: they "
            "may see one another"
        )
        if wanted is True:
            raise EngineStartError(f"unsloth learner: training.packing=true, but {reason}")
        return False, f"off: {reason}"


def _has_varlen_kernel() -> bool:
    """Whether unsloth found a kernel for several sequences in one row."""
    dispatch: Any = importlib.import_module("unsloth.utils.attention_dispatch")
    installed = dispatch.HAS_FLASH_ATTENTION or dispatch.HAS_XFORMERS
    # What unsloth loaded of torch.nn.attention.varlen; a private name, absent in older versions.
    return bool(installed or getattr(dispatch, "_TORCH_VARLEN_ATTN", None) is not None)


def _load(
    model_dir: Path, config: UnslothTraining, seed: int, choice: Checkpointing
) -> PreTrainedModel:
    """Load with unsloth and return the plain model inside, in training mode."""
    mode: Any = "unsloth" if choice.offload else choice.recomputed_layers > 0
    settle_vector_math()
    tuning = config.tuning
    full = not isinstance(tuning, LoraTuning)
    # unsloth keeps what kind of training the last load was for in this variable.
    os.environ["UNSLOTH_ENABLE_FULL_FINETUNING"] = "0"
    context = load_identity(model_dir).context_length
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(model_dir),
        max_seq_length=min(context, config.max_model_tokens or context),
        dtype=resolve_dtype(config.dtype),
        load_in_4bit=False,
        load_in_16bit=not full,
        full_finetuning=full,
        use_gradient_checkpointing=mode,
        use_exact_model_name=True,
        offload_embedding=False,
        fast_inference=False,
    )
    if isinstance(tuning, LoraTuning):
        check_targets(model, tuning)
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=tuning.rank,
            lora_alpha=tuning.alpha,
            lora_dropout=tuning.dropout,
            bias="none",
            target_modules=list(tuning.target_modules),
            use_gradient_checkpointing=mode,
            random_state=0,
        )
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=mode)
    core = model if full else model.base_model.model
    if not full:
        initialise_adapters(core, seed)
    return core


def _check_weights(model_dir: Path, core: PreTrainedModel) -> None:
    """Check that every parameter is in the files: transformers draws missing ones at random."""
    stored = set[str]()
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as handle:
            stored.update(handle.keys())
    names = (
        name.replace(".base_layer.", ".")
        for name, _ in core.named_parameters()
        if ".lora_" not in name
    )
    missing = sorted(set(names) - stored)
    if missing:
        raise ModelError(f"{model_dir}: weights are missing: {', '.join(missing[:5])} ...")


def _forget_the_model_before() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _keep_to(memory_bytes: int | None) -> None:
    """Bound the allocator by this process's share of the device; None: no bound.

    The allocator keeps what it once took, even in pieces too small for later tensors, and without a
    bound may grow until the device is full. At its bound it frees unused pieces first.
    """
    if not torch.cuda.is_available():
        return
    share = 1.0
    if memory_bytes is not None:
        share = min(allocator_bytes(memory_bytes) / torch.cuda.mem_get_info()[1], 1.0)
    torch.cuda.set_per_process_memory_fraction(share)


def _free_bytes(device: torch.device) -> int:
    """Free memory of the device, including what the host could free where they share memory."""
    free = torch.cuda.mem_get_info(device)[0]
    if _shares_memory(device):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return max(free, 1024 * int(line.split()[1]))
    return free


def _shares_memory(device: torch.device) -> bool:
    properties = torch.cuda.get_device_properties(device)
    return bool(getattr(properties, "is_integrated", False))
