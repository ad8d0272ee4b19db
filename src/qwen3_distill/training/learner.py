"""What every learner on PyTorch does alike: the step, its checks, weight versions, state.

What differs between engines is a `Student`: how the model is loaded and run.

Shape letters: B rows of a micro-batch, T positions, D hidden size.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from qwen3_distill.config import LoraTuning, OptimizerConfig, TuningConfig
from qwen3_distill.errors import CheckpointError, DataError, EngineError, NonFiniteError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_identity, load_tokenizer, output_head
from qwen3_distill.protocols import FullWeights, WeightChannel, WeightPayload
from qwen3_distill.training.batching import MicroBatch, micro_batches
from qwen3_distill.training.lora import adapter_weights, merged_parameters
from qwen3_distill.training.objectives import LossTerms, Objective, TensorMetric, read_scalars
from qwen3_distill.training.schedule import learning_rate_factor
from qwen3_distill.types import Batch, Metric, ModelIdentity, Update, WeightVersion
from qwen3_distill.utils.seeds import derive_seed

_GIB = 1 << 30


class Student(Protocol):
    """A model in training mode, with adapters inside it when tuning is LoRA."""

    @property
    def core(self) -> PreTrainedModel:
        """The plain Qwen3 model: parameters carry its names."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def packs(self) -> bool:
        """Whether micro-batches are packed rather than padded."""
        ...

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around the forward pass and the loss."""
        ...

    def hidden(self, micro: MicroBatch) -> Tensor:
        """[B, T, D]: what the output head is applied to."""
        ...

    def metrics(self) -> tuple[Metric, ...]:
        """What the engine has to say about a step, beyond the objective."""
        ...

    def memory_report(self) -> str:
        """What was planned and what is there, for an out-of-memory error."""
        ...


class TorchLearner:
    """A `Learner` on PyTorch.

    A step is: split the batch by tokens, accumulate the gradient of every micro-batch with the
    step's one denominator, check, clip, step. Numbers are read from the device once, before the
    optimizer's step needs them.

    Args:
        max_model_tokens: longest prompt plus response; None: the student's context length.
        publish_adapter: publish LoRA adapters by themselves, not merged into all weights.
    """

    def __init__(
        self,
        model_dir: str | Path,
        student: Student,
        *,
        objective: Objective,
        tuning: TuningConfig,
        optimizer: OptimizerConfig,
        micro_batch_tokens: int,
        max_model_tokens: int | None = None,
        total_steps: int,
        seed: int,
        publish_adapter: bool = False,
    ) -> None:
        self.student = student
        self._model_dir = Path(model_dir)
        self._objective = objective
        self._optimizer_config = optimizer
        self._micro_batch_tokens = micro_batch_tokens
        self._max_model_tokens = max_model_tokens
        self._total_steps = total_steps
        self._seed = seed
        self._adapter = tuning if publish_adapter and isinstance(tuning, LoraTuning) else None
        self._identity = load_identity(model_dir)
        self._trained = {
            name: parameter
            for name, parameter in student.core.named_parameters()
            if parameter.requires_grad
        }
        self._optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            # One kernel without temporaries: running out of memory cannot leave half a step.
            fused=True if student.device.type == "cuda" else None,
        )
        self._version = WeightVersion(step=0, digest=self._digest())

    async def start(self) -> None:
        return None

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def version(self) -> WeightVersion:
        return self._version

    async def update(self, batch: Batch) -> Update:
        step = self._version.step
        self._check_length(batch)
        lag_steps = batch.lag_steps(self._version)
        torch.manual_seed(derive_seed(self._seed, "dropout", step))
        self._optimizer.zero_grad(set_to_none=True)
        with self._memory_watched(step):
            loss, grad_norm, metrics = self._gradient(batch)
            self._require_finite(step, loss, grad_norm)
            learning_rate = self._set_learning_rate(step)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._version = WeightVersion(step=step + 1, digest=self._digest())
        return Update(
            version=self._version,
            loss=loss,
            grad_norm=grad_norm,
            num_loss_tokens=batch.num_loss_tokens,
            metrics=(
                *metrics,
                Metric.last("optim/learning_rate", learning_rate),
                Metric.max("weights/lag_steps", lag_steps),
                *self.student.metrics(),
                *self._memory_metrics(),
            ),
        )

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        channel.publish(self._version, self.payload())
        return self._version

    def payload(self) -> WeightPayload:
        """The current version's weights, on the learner's device."""
        core = self.student.core
        if self._adapter is not None:
            return adapter_weights(core, self._adapter)
        return FullWeights(tensors=dict(merged_parameters(core)))

    async def save_state(self, directory: Path) -> None:
        trained = {name: tensor.detach().contiguous() for name, tensor in self._trained.items()}
        save_file(trained, directory / "weights.safetensors")
        torch.save(self._optimizer.state_dict(), directory / "optimizer.pt")

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        try:
            saved = load_file(directory / "weights.safetensors")
            state = torch.load(directory / "optimizer.pt", weights_only=True, map_location="cpu")
        except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"{directory}: cannot be read: {error}") from error
        if _shapes(saved) != _shapes(self._trained):
            raise CheckpointError(f"{directory}: holds other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(saved[name])
        self._optimizer.load_state_dict(state)
        digest = self._digest()
        if digest != version.digest:
            raise CheckpointError(
                f"{directory}: weights have digest {digest}, its cursor says {version.digest}"
            )
        self._version = version

    async def save_student(self, directory: Path) -> None:
        # No second model is made: an engine may have patched the model's class in this process.
        weights = {name: tensor.cpu() for name, tensor in merged_parameters(self.student.core)}
        directory.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(weights, directory, metadata={"format": "pt"})
        config = AutoConfig.from_pretrained(self._model_dir)
        config.dtype = next(iter(weights.values())).dtype
        config.save_pretrained(directory)
        if (self._model_dir / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(self._model_dir).save_pretrained(directory)
        load_tokenizer(self._model_dir).save_pretrained(directory)

    async def close(self) -> None:
        return None

    def _gradient(self, batch: Batch) -> tuple[float, float, list[Metric]]:
        """Accumulate and clip the step's gradient; loss, gradient norm and metrics."""
        losses, pending = list[Tensor](), list[TensorMetric]()
        for micro in micro_batches(batch, self._micro_batch_tokens, packed=self.student.packs):
            terms = self._terms(micro.to(self.student.device), batch.denominator)
            terms.loss.backward()
            losses.append(terms.loss.detach())
            pending.extend(terms.metrics)
        norm = torch.nn.utils.clip_grad_norm_(
            self._trained.values(), self._optimizer_config.max_grad_norm
        )
        values = read_scalars([norm, *losses, *(metric.total for metric in pending)])
        totals = values[1 + len(losses) :]
        metrics = [metric.read(total) for metric, total in zip(pending, totals, strict=True)]
        return sum(values[1 : 1 + len(losses)]), values[0], metrics

    def _terms(self, micro: MicroBatch, denominator: float) -> LossTerms:
        with self.student.autocast():
            hidden_BTD = self.student.hidden(micro)
            head_VD = output_head(self.student.core)
            return self._objective.terms(micro, hidden_BTD, head_VD, denominator)

    @contextlib.contextmanager
    def _memory_watched(self, step: int) -> Iterator[None]:
        """Count the step's peak; turn a lack of memory into an error, with nothing left behind."""
        device = self.student.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        lack: str | None = None
        try:
            yield
        except torch.OutOfMemoryError as error:
            lack = str(error).partition("\n")[0]
        if lack is not None:  # only now is the failed pass's memory unreferenced
            self._optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            raise EngineError(
                f"step {step}: the learner ran out of memory; nothing was stepped. "
                f"Planned: {self.student.memory_report()}. Found: {lack} Lower "
                "training.micro_batch_tokens, or recompute more with "
                "training.gradient_checkpointing"
            )

    def _memory_metrics(self) -> tuple[Metric, ...]:
        device = self.student.device
        if device.type != "cuda":
            return ()
        peak = torch.cuda.max_memory_allocated(device) / _GIB
        return (Metric.max("train/peak_memory_gib", peak),)

    def _check_length(self, batch: Batch) -> None:
        limit, what = self._identity.context_length, "the student's context"
        if self._max_model_tokens is not None and self._max_model_tokens < limit:
            limit, what = self._max_model_tokens, "training.max_model_tokens"
        for scored in batch.scored:
            rollout = scored.rollout
            length = rollout.prompt.token_ids.size + rollout.num_tokens
            if length > limit:
                raise DataError(
                    f"rollout {rollout.rollout_id} has {length} tokens, more than {what} of {limit}"
                )

    def _require_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(
                f"step {step}: loss={loss}, grad_norm={grad_norm}; the optimizer was not stepped. "
                "A lower learning_rate or advantage_clip is the usual remedy"
            )

    def _set_learning_rate(self, step: int) -> float:
        optimizer = self._optimizer_config
        factor = learning_rate_factor(optimizer.schedule, step, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = optimizer.learning_rate * factor
        return optimizer.learning_rate * factor

    def _digest(self) -> str:
        """Of what `payload` gives, without a merged copy of the whole model."""
        if self._adapter is not None:
            return weights_digest(self.payload().tensors)
        return weights_digest(merged_parameters(self.student.core))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
