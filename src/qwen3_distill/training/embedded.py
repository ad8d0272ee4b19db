"""The learner in this process: full or LoRA training on PyTorch and peft.

Shape letters: B sequences of a micro-batch, T positions, D hidden size, V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.config import EmbeddedTraining, LoraTuning
from qwen3_distill.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import (
    load_identity,
    load_model,
    load_tokenizer,
    output_head,
    resolve_device,
    resolve_dtype,
)
from qwen3_distill.protocols import FullWeights, WeightChannel
from qwen3_distill.training.batching import MicroBatch, micro_batches
from qwen3_distill.training.objectives import LossTerms, Objective
from qwen3_distill.training.schedule import learning_rate_factor
from qwen3_distill.types import Batch, Metric, ModelIdentity, Update, WeightVersion
from qwen3_distill.utils.seeds import derive_seed

_LORA_INIT_SEED = "lora_init"


class EmbeddedLearner:
    """A `Learner` on PyTorch.

    A step is: split the batch by padded tokens, accumulate the gradient of every micro-batch with
    the step's one denominator, check, clip, step.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        config: EmbeddedTraining,
        objective: Objective,
        total_steps: int,
        seed: int,
    ) -> None:
        self._model_dir = Path(model_dir)
        self._config = config
        self._objective = objective
        self._total_steps = total_steps
        self._seed = seed
        self._identity = load_identity(model_dir)
        self._device = resolve_device(config.device)
        base = load_model(model_dir, device=self._device, dtype=resolve_dtype(config.dtype))
        self._core: PreTrainedModel = base
        """The plain Qwen3 model, with adapters inside it when tuning is LoRA."""
        if isinstance(config.tuning, LoraTuning):
            self._core = _with_lora(base, config.tuning, derive_seed(seed, _LORA_INIT_SEED))
        if config.gradient_checkpointing:
            self._core.gradient_checkpointing_enable({"use_reentrant": False})
            self._core.enable_input_require_grads()
        self._core.train()
        self._trained = {
            name: parameter
            for name, parameter in self._core.named_parameters()
            if parameter.requires_grad
        }
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self._version = WeightVersion(step=0, digest=weights_digest(self._named_weights()))

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
        self._check_context(batch)
        lag_steps = batch.lag_steps(self._version)
        torch.manual_seed(derive_seed(self._seed, "dropout", step))
        self._optimizer.zero_grad(set_to_none=True)
        loss, metrics = 0.0, list[Metric]()
        for micro in micro_batches(batch, self._config.micro_batch_tokens):
            terms = self._terms(micro.to(self._device), batch.denominator)
            terms.loss.backward()
            loss += float(terms.loss.detach())
            metrics.extend(terms.metrics)
        grad_norm = self._clip_gradient()
        self._require_finite(step, loss, grad_norm)
        learning_rate = self._set_learning_rate(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._version = WeightVersion(step=step + 1, digest=weights_digest(self._named_weights()))
        return Update(
            version=self._version,
            loss=loss,
            grad_norm=grad_norm,
            num_loss_tokens=batch.num_loss_tokens,
            metrics=(
                *metrics,
                Metric.last("optim/learning_rate", learning_rate),
                Metric.max("weights/lag_steps", lag_steps),
            ),
        )

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        channel.publish(self._version, FullWeights(tensors=self._named_weights()))
        return self._version

    async def save_state(self, directory: Path) -> None:
        trained = {name: tensor.detach().contiguous() for name, tensor in self._trained.items()}
        save_file(trained, directory / "weights.safetensors")
        torch.save(self._optimizer.state_dict(), directory / "optimizer.pt")

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        try:
            saved = load_file(directory / "weights.safetensors")
            state = torch.load(directory / "optimizer.pt", weights_only=True)
        except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"{directory}: cannot be read: {error}") from error
        if _shapes(saved) != _shapes(self._trained):
            raise CheckpointError(f"{directory}: holds other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(saved[name])
        self._optimizer.load_state_dict(state)
        digest = weights_digest(self._named_weights())
        if digest != version.digest:
            raise CheckpointError(
                f"{directory}: weights have digest {digest}, its cursor says {version.digest}"
            )
        self._version = version

    async def save_student(self, directory: Path) -> None:
        plain = load_model(self._model_dir, device=torch.device("cpu"), dtype=self._dtype)
        weights = self._named_weights()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(weights[name])
        plain.save_pretrained(directory)
        load_tokenizer(self._model_dir).save_pretrained(directory)

    async def close(self) -> None:
        return None

    @property
    def _dtype(self) -> torch.dtype:
        return resolve_dtype(self._config.dtype)

    def _terms(self, micro: MicroBatch, denominator: float) -> LossTerms:
        with self._autocast():
            # Right padding needs no attention mask: causal attention never looks at what follows,
            # and positions after the response carry no loss.
            hidden_BTD = self._core.model(
                input_ids=micro.input_BT, use_cache=False
            ).last_hidden_state
            head_VD = output_head(self._core)
            return self._objective.terms(micro, hidden_BTD, head_VD, denominator)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        setting = self._config.autocast
        on = setting == "bfloat16" or (setting == "auto" and self._device.type == "cuda")
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=on)

    def _check_context(self, batch: Batch) -> None:
        for scored in batch.scored:
            rollout = scored.rollout
            length = rollout.prompt.token_ids.size + rollout.num_tokens
            if length > self._identity.context_length:
                raise DataError(
                    f"rollout {rollout.rollout_id} has {length} tokens, more than the student's "
                    f"context of {self._identity.context_length}"
                )

    def _clip_gradient(self) -> float:
        limit = self._config.optimizer.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(self._trained.values(), limit))

    def _require_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(
                f"step {step}: loss={loss}, grad_norm={grad_norm}; the optimizer was not stepped. "
                "A lower learning_rate or advantage_clip is the usual remedy"
            )

    def _set_learning_rate(self, step: int) -> float:
        optimizer = self._config.optimizer
        factor = learning_rate_factor(optimizer.schedule, step, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = optimizer.learning_rate * factor
        return optimizer.learning_rate * factor

    def _named_weights(self) -> Mapping[str, Tensor]:
        """Every parameter under its plain Hugging Face name, adapters merged into copies."""
        return dict(_plain_parameters(self._core))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _with_lora(base: PreTrainedModel, tuning: LoraTuning, seed: int) -> PreTrainedModel:
    """Put adapters into the model, initialised from the seed alone; the base is frozen."""
    # Only layers inside the blocks: an adapter on a tied embedding or on the head would not be in
    # the weight that the head is applied with.
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in base.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    unknown = sorted(set(tuning.target_modules) - linear)
    if unknown:
        raise ConfigError(
            f"training.tuning.target_modules: {', '.join(unknown)} is no linear layer of the "
            f"student's blocks; they are {', '.join(sorted(linear))}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        get_peft_model(  # changes `base` in place
            base,
            LoraConfig(
                r=tuning.rank,
                lora_alpha=tuning.alpha,  # pyright: ignore[reportArgumentType] - annotated int
                lora_dropout=tuning.dropout,
                target_modules=list(tuning.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
    return base


@torch.no_grad()
def _plain_parameters(core: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values as in a model without adapters.

    An adapter's change is added to a copy: merging in place and taking it out again would round
    the base weights a little at every step.
    """
    adapted: dict[str, Any] = {
        name: module for name, module in core.named_modules() if isinstance(module, LoraLayer)
    }
    for name, parameter in core.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.partition(".base_layer.")
        if leaf != "weight" or owner not in adapted:
            yield name.replace(".base_layer.", "."), parameter.detach()
            continue
        delta = adapted[owner].get_delta_weight("default")
        yield f"{owner}.weight", parameter.detach() + delta.to(parameter.dtype)
