"""The learner on PyTorch that all engines share: step, checks, weight versions, state.

Engines differ in their `Student`: how the model is loaded and run.

Shape letters: B rows of a micro-batch, T positions, D hidden size.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_distill.errors import (
    AlignmentError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    ModelError,
    NonFiniteError,
)
from qwen3_distill.modeling.device_to_host import to_host
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.host_to_device import to_device
from qwen3_distill.modeling.loading import load_identity, output_head
from qwen3_distill.modeling.student_directory import read_student_files, write_student
from qwen3_distill.ports import FullWeights, WeightChannel, WeightPayload
from qwen3_distill.replay.buffer import ReplayBuffer
from qwen3_distill.training.batching import MicroBatch, flat_micro_batches, micro_batches
from qwen3_distill.training.device_metrics import device_metrics
from qwen3_distill.training.finite import FiniteCheck, remedy
from qwen3_distill.training.learner_state import read_state, write_state
from qwen3_distill.training.lora import adapter_weights
from qwen3_distill.training.memory_lack import memory_lack
from qwen3_distill.training.objectives.base import (
    LossTerms,
    Objective,
    check_samplers,
    read_scalars,
    require_samplers,
)
from qwen3_distill.training.pass_counts import PassCounts
from qwen3_distill.training.rank_place import StepShare, deal
from qwen3_distill.training.ranks import Ranks
from qwen3_distill.training.room import Room
from qwen3_distill.training.schedule import learning_rate_factor
from qwen3_distill.training.settings import AnyLearnerSettings
from qwen3_distill.training.step import (
    MicroBatches,
    Passed,
    Step,
    StepGradient,
    no_micro_batches,
)
from qwen3_distill.training.student import Student
from qwen3_distill.training.trained import TrainedWeights
from qwen3_distill.types import (
    Batch,
    Metric,
    ModelIdentity,
    ScoredRollout,
    TrainingRollout,
    Update,
    WeightVersion,
)
from qwen3_distill.utils.seeds import derive_seed


class TorchLearner:
    """A `ReplayingLearner` on PyTorch.

    A step is: split the batch by tokens, accumulate the gradient of every micro-batch with the
    step's one denominator, check, clip, step. Numbers are read from the device once, before the
    optimizer's step needs them.

    Args:
        student: the model of ``settings``, loaded.
        objective: that of ``settings``, built.
        replay: keeps rollouts on the student's device; None: `update` alone trains.
        weights: the student's trained weights; None: they are whole on this rank.
    """

    def __init__(
        self,
        settings: AnyLearnerSettings,
        student: Student,
        objective: Objective,
        replay: ReplayBuffer | None = None,
        weights: TrainedWeights | None = None,
    ) -> None:
        self.student = student
        self._settings = settings
        self._objective = objective
        self._replay = replay
        self._identity = load_identity(settings.model_dir)
        self._files = read_student_files(settings.model_dir)
        embedding: Any = student.core.get_input_embeddings()
        self._files.check_tied(output_head(student.core) is embedding.weight)
        self._weights = weights or TrainedWeights(student.core)
        optimizer = settings.training.optimizer
        self._optimizer = torch.optim.AdamW(
            self._weights.named.values(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            # One kernel without temporaries: running out of memory cannot leave half a step.
            fused=True if student.device.type == "cuda" else None,
        )
        self._spoiled: str | None = None
        """Why the weights may not be used any more."""
        self._room = Room(
            settings.training.micro_batch_tokens,
            self._drop_pass,
            may_begin_again=self._weights.part.count == 1,
        )
        try:
            self._version = WeightVersion(step=0, digest=self._digest())
        except NonFiniteError as error:
            raise ModelError(
                f"{settings.model_dir}: {error}; restore the files from where the model came from"
            ) from None
        self._ranks: Ranks | None = None

    def join(self, ranks: Ranks) -> None:
        """Take all further steps together with other ranks, which hold the same weights."""
        self._ranks = ranks

    async def start(self) -> None:
        return None

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def version(self) -> WeightVersion:
        return self._version

    @property
    def max_restarts(self) -> int:
        return 0

    async def update(self, batch: Batch) -> Update:
        self._check_lengths(batch.scored)
        check_samplers(self._settings.objective, batch.scored)
        return self._step(
            Step(
                micros=self._split(batch),
                denominator=batch.denominator,
                num_loss_tokens=batch.num_loss_tokens,
                lag_steps=batch.lag_steps(self._version),
            )
        )[0]

    async def update_share(self, share: StepShare) -> Update:
        """Take an optimizer step together with all ranks, each on its share of the rollouts.

        The update's loss, norm and token count are the whole step's; its metrics this rank's.
        """
        batch = share.batch
        self._check_length(share.longest_id, share.longest_tokens)
        require_samplers(self._settings.objective, share.example_of)
        return self._step(
            Step(
                micros=no_micro_batches if batch is None else self._split(batch),
                denominator=share.denominator,
                num_loss_tokens=share.num_loss_tokens,
                lag_steps=share.lag_steps,
            )
        )[0]

    async def admit(self, scored: Sequence[ScoredRollout]) -> None:
        self._check_lengths(scored)
        check_samplers(self._settings.objective, scored)
        with self._memory_watched("new rollouts", "they were not kept"):
            self._kept.add(scored)

    async def update_replayed(self, num_rollouts: int) -> Update:
        replay, step = self._kept, self._version.step
        replay.evict_by_age(step)
        live = len(replay)
        if live == 0:
            raise DataError(
                f"step {step}: the replay buffer has no rollout to train on: none was admitted, or "
                "all are older than replay.max_age_steps or used replay.reuse_cap times"
            )
        sample = replay.sample(min(num_rollouts, live), step)
        flat = replay.gather(sample)
        weights_S = sample.weights_S.astype(np.float64)
        on_device_S = torch.from_numpy(sample.weights_S).to(flat.token_id_F.device)
        rows = self._own_rows(flat.tokens_S)
        update, magnitude_S = self._step(
            Step(
                micros=partial(flat_micro_batches, flat, on_device_S, rows=rows),
                denominator=float(weights_S @ flat.loss_tokens_S),
                num_loss_tokens=int(flat.loss_tokens_S.sum()),
                lag_steps=step - int(flat.oldest_step_S.min()),
            )
        )
        replay.mark_used(sample, self._of_all_ranks(magnitude_S, rows, sample.num_rollouts))
        effective = weights_S.sum() ** 2 / (weights_S @ weights_S)
        metrics = (
            *replay.metrics(step),
            Metric.last("replay/drawn_rollouts", sample.num_rollouts),
            Metric.last("replay/effective_sample_fraction", effective / sample.num_rollouts),
        )
        return replace(update, metrics=(*update.metrics, *metrics))

    def _split(self, batch: Batch) -> MicroBatches:
        return partial(micro_batches, batch, shared_prompts=self.student.shares_prompts)

    def _own_rows(self, tokens_S: NDArray[np.int64]) -> Sequence[int]:
        """The drawn rollouts that this rank trains on; all ranks draw the same ones."""
        if self._ranks is None:
            return range(len(tokens_S))
        place = self._ranks.place
        return deal(tokens_S.tolist(), place.count)[place.index]

    def _of_all_ranks(self, values: Tensor, rows: Sequence[int], count: int) -> Tensor:
        """[count] values of all ranks' rows, from this rank's."""
        if self._ranks is None:
            return values
        everywhere = torch.zeros(count, dtype=values.dtype, device=values.device)
        everywhere[list(rows)] = values
        return self._ranks.add(everywhere)

    @property
    def _kept(self) -> ReplayBuffer:
        if self._replay is None:
            raise ConfigError("this learner keeps no rollouts; add a `replay` section")
        return self._replay

    def _step(self, work: Step) -> tuple[Update, Tensor]:
        """Take an optimizer step; also [S], each rollout's mean magnitude."""
        self._require_unspoiled()
        step = self._version.step
        self._weights.drop_gradients()
        if self.student.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.student.device)
        with self._memory_watched(f"step {step}", "nothing was stepped"):
            gradient = self._gradient(work)
            self._require_finite(step, gradient.loss, gradient.norm)
            learning_rate = self._set_learning_rate(step)
            self._optimizer.step()
            self._weights.drop_gradients()
        with self._memory_watched(f"step {step}", "it was stepped, but cannot be published"):
            self._version = WeightVersion(step=step + 1, digest=self._stepped_digest(step))
        update = Update(
            version=self._version,
            loss=gradient.loss,
            grad_norm=gradient.norm,
            num_loss_tokens=work.num_loss_tokens,
            metrics=(
                *gradient.metrics,
                Metric.last("optim/learning_rate", learning_rate),
                Metric.max("weights/lag_steps", work.lag_steps),
                *self.student.metrics(),
                *self._room.metrics(),
                *device_metrics(self.student.device),
            ),
        )
        return update, gradient.magnitude_S

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        with self._memory_watched(f"{self._version}", "it was not published"):
            channel.publish(self._version, self.payload())
        return self._version

    def payload(self) -> WeightPayload:
        """The current version's weights, on the learner's device."""
        self._require_unspoiled()
        adapter = self._settings.published_adapter
        if adapter is not None:
            return adapter_weights(self.student.core, adapter)
        if self._weights.part.count > 1:  # never whole on the device
            return FullWeights(tensors=to_host(self._weights.published()))
        return FullWeights(tensors=dict(self._weights.published(lent=True)))

    def gather(self) -> None:
        """Take part in the gathering of whole weights, which another rank publishes or saves."""
        self._require_unspoiled()
        for _ in self._weights.published():
            pass

    async def save_state(self, directory: Path) -> None:
        self._require_unspoiled()
        weights = self._weights
        write_state(directory, weights.named, self._optimizer, self._replay, weights.part)

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        weights, with_replay = self._weights, self._replay is not None
        saved, state, kept = read_state(
            directory, weights.shapes, with_replay=with_replay, part=weights.part
        )
        with torch.no_grad():
            for name, parameter in weights.named.items():
                parameter.copy_(saved[name])
        self._spoiled = None
        self._optimizer.load_state_dict(state)
        if self._replay is not None and kept is not None:
            self._replay.load_state_dict(kept)
        try:
            digest = self._digest()
        except NonFiniteError as error:
            raise CheckpointError(f"{directory}: {error}") from None
        if digest != version.digest:
            raise CheckpointError(
                f"{directory}: weights have digest {digest}, its cursor says {version.digest}"
            )
        self._version = version

    async def save_student(self, directory: Path) -> None:
        self._require_unspoiled()
        check = FiniteCheck()
        # No second model is made: an engine may have patched the model's class in this process.
        merged = check.passing(self._weights.published())
        weights = {name: tensor.cpu() for name, tensor in merged}
        check.require()
        write_student(self._files, weights, directory)

    async def close(self) -> None:
        if self._ranks is not None:
            self._ranks.leave()

    def _gradient(self, work: Step) -> StepGradient:
        """Accumulate and clip the step's gradient."""
        passed = self._room.find(lambda room: self._passes(work, room))
        self._reduce()
        losses = self._losses_of_all_ranks(passed.losses)
        max_norm = self._settings.training.optimizer.max_grad_norm
        norm = self._weights.clip_gradients(max_norm)
        values = read_scalars([norm, *losses, *(metric.total for metric in passed.metrics)])
        totals = values[1 + len(losses) :]
        metrics = [m.read(total) for m, total in zip(passed.metrics, totals, strict=True)]
        return StepGradient(
            loss=sum(values[1 : 1 + len(losses)]),
            norm=values[0],
            metrics=[*metrics, *passed.counts.metrics()],
            magnitude_S=self._in_order(passed.magnitudes, passed.rollouts),
        )

    def _passes(self, work: Step, room: Room) -> Passed:
        """Pass all micro-batches forward and backward, from the beginning."""
        step = self._version.step
        rank = () if self._ranks is None else (self._ranks.place.index,)
        torch.manual_seed(derive_seed(self._settings.seed, "dropout", step, *rank))
        passed = Passed(counts=PassCounts(self._settings.training.chunk_tokens))
        micros = work.micros(room.micro_batch_tokens, packed=self.student.packs)
        for micro in self._weights.passes(micros):
            room.num_rollouts = len(micro.rollouts)
            terms = self._terms(micro.to(self.student.device), work.denominator)
            terms.loss.backward()
            passed.counts.add(micro)
            passed.losses.append(terms.loss.detach())
            passed.metrics.extend(terms.metrics)
            passed.rollouts.extend(micro.rollouts)
            magnitude_N = terms.magnitude_N
            passed.magnitudes.append(_mean_per_rollout(magnitude_N, micro.loss_tokens))
        return passed

    def _in_order(self, magnitudes: Sequence[Tensor], rollouts: Sequence[int]) -> Tensor:
        if not magnitudes:
            return torch.zeros(0, device=self.student.device)
        return torch.cat(list(magnitudes))[np.argsort(rollouts).tolist()]

    def _reduce(self) -> None:
        """Add up the accumulated gradients of several ranks, in place.

        Called once per step, between the last micro-batch's backward pass and the clipping, which
        needs the whole step's gradient. Every rank divides by the whole step's denominator, so
        ranks add up their gradients and do not average them.
        """
        self._weights.add_up_gradients(self._ranks)

    def _losses_of_all_ranks(self, losses: list[Tensor]) -> list[Tensor]:
        """The step's loss, so that all ranks refuse a step whose loss is not finite, or none."""
        if self._ranks is None:
            return losses
        own = torch.stack(losses).sum() if losses else torch.zeros((), device=self.student.device)
        return [self._ranks.add(own.float())]

    def _terms(self, micro: MicroBatch, denominator: float) -> LossTerms:
        with self.student.autocast():
            hidden_BTD = self.student.hidden(micro)
            head_VD = output_head(self.student.core)
            return self._objective.terms(micro, hidden_BTD, head_VD, denominator)

    @contextlib.contextmanager
    def _memory_watched(self, what: str, outcome: str) -> Iterator[None]:
        """Turn a lack of memory into an error, and free what the failed pass had allocated."""
        with memory_lack() as lack:
            yield
        if lack.text is not None:
            self._drop_pass()
            raise EngineError(
                f"{what}: the learner ran out of memory; {outcome}. "
                f"Planned: {self.student.memory_report()}. Found: {lack.text} Lower "
                "training.micro_batch_tokens, recompute more with "
                "training.gradient_checkpointing, or raise the share that the learner keeps to "
                "(training.memory_gib, planning)"
            )

    def _drop_pass(self) -> None:
        """Free what a pass that failed has left."""
        self._weights.drop_gradients()
        if self.student.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_lengths(self, scored: Sequence[TrainingRollout]) -> None:
        for rollout in (entry.rollout for entry in scored):
            length = rollout.prompt.token_ids.size + rollout.num_tokens
            self._check_length(rollout.rollout_id, length)

    def _check_length(self, rollout_id: str, length: int) -> None:
        limit, what = self._identity.context_length, "the student's context"
        configured = self._settings.max_model_tokens
        if configured is not None and configured < limit:
            limit, what = configured, "training.max_model_tokens"
        if length > limit:
            raise DataError(
                f"rollout {rollout_id} has {length} tokens, more than {what} of {limit}"
            )

    def _require_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._weights.drop_gradients()
            raise NonFiniteError(
                f"step {step}: loss={loss}, grad_norm={grad_norm}; the optimizer was not stepped. "
                + remedy(
                    "A lower learning_rate or advantage_clip, in a new output_dir, is the usual "
                    "remedy"
                )
            )

    def _set_learning_rate(self, step: int) -> float:
        optimizer = self._settings.training.optimizer
        factor = learning_rate_factor(optimizer.schedule, step, self._settings.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = optimizer.learning_rate * factor
        return optimizer.learning_rate * factor

    def _digest(self) -> str:
        """The digest of `payload`, without a merged copy of the whole model.

        Raises:
            NonFiniteError: the weights that would be published are not finite.
        """
        check = FiniteCheck()
        if self._settings.published_adapter is not None:
            digest = weights_digest(check.passing(self.payload().tensors.items()))
        else:
            digest = weights_digest(check.passing(self._weights.published()))
        check.require()  # computed with the digest, which waited for the device
        return digest

    def _stepped_digest(self, step: int) -> str:
        """The digest after a step; weights that the step spoiled are never used."""
        try:
            return self._digest()
        except NonFiniteError as error:
            self._spoiled = (
                f"step {step}: {error} after the optimizer's step. Nothing of it was published or "
                "saved: the newest checkpoint is from before. Lower training.optimizer's "
                "learning_rate or weight_decay, in a new output_dir"
            )
            raise NonFiniteError(self._spoiled) from None

    def _require_unspoiled(self) -> None:
        if self._spoiled is not None:
            raise NonFiniteError(self._spoiled)


def _mean_per_rollout(values_N: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return per-rollout means over tokens, [rollouts of the micro-batch]."""
    if sum(tokens) != values_N.numel():
        raise AlignmentError(f"{values_N.numel()} values for rollouts of {list(tokens)} tokens")
    lengths = to_device(torch.tensor(tokens), values_N.device)
    # "unsafe" leaves out that check, with which it waits for the device.
    return torch.segment_reduce(values_N.float(), "mean", lengths=lengths, unsafe=True)
