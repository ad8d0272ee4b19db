"""The teacher in this process.

Shape letters: B rows of a padded batch, T positions, N scored tokens of a batch, D hidden size,
V vocabulary, C tokens of a chunk, K candidates, S scored tokens of one job.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen3_distill.errors import AlignmentError, ConfigError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.head import logits_of, map_chunks
from qwen3_distill.modeling.hub import model_label
from qwen3_distill.modeling.loading import (
    load_identity,
    load_model,
    output_head,
    resolve_device,
    resolve_dtype,
)
from qwen3_distill.scoring.handshake import check_lengths
from qwen3_distill.types import (
    GivenCandidatesRequest,
    HiddenRequest,
    HiddenScore,
    ModelIdentity,
    SampledRequest,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TeacherScore,
    TopKRequest,
    TopKScore,
)
from qwen3_distill.utils.batches import padded_batches
from qwen3_distill.utils.concurrency import forever


class EmbeddedTeacher:
    """A `TeacherScorer` on PyTorch: one forward pass over a job's tokens; no logits are kept."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        request: ScoreRequest,
        device: str,
        dtype: str,
        batch_tokens: int,
        chunk_tokens: int,
    ) -> None:
        self._identity = load_identity(model_dir)
        self._device = resolve_device(device)
        self._model = load_model(model_dir, device=self._device, dtype=resolve_dtype(dtype))
        self._model.requires_grad_(False)
        check_candidates(request, self._identity)
        self._request = request
        self._batch_tokens = batch_tokens
        self._chunk_tokens = chunk_tokens
        self._model_dir, self._name, self._dtype = model_dir, model_label(model_dir), dtype
        self._teacher_id = ""
        self.weights_changed()

    async def start(self) -> None:
        return None

    @property
    def counters(self) -> Mapping[str, float]:
        return {}

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def teacher_id(self) -> str:
        return self._teacher_id

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters in use, by name. Whoever changes them calls `weights_changed` then."""
        return {name: each.detach() for name, each in self._model.named_parameters()}

    def stored_weights(self) -> dict[str, Tensor]:
        """Read the weights of the teacher's directory again."""
        model = load_model(self._model_dir, device=self._device, dtype=resolve_dtype(self._dtype))
        return {name: each.detach() for name, each in model.named_parameters()}

    def weights_changed(self) -> None:
        """Read the weights in use, and name the teacher by them from now on."""
        self._teacher_id = f"{self._name}#{weights_digest(self.weights)}@{self._dtype}"

    @property
    def max_dropped_fraction(self) -> float:
        return 0.0

    @property
    def starts_first(self) -> bool:
        return False

    async def memory_taken(self) -> None:
        await forever()

    @property
    def output_head(self) -> Tensor:
        """[V, D]: turns a `HiddenScore` back into the full distribution."""
        return output_head(self._model)

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        check_lengths(jobs, self._identity)
        scores: dict[int, TeacherScore] = {}
        for group in padded_batches([job.token_ids.size for job in jobs], self._batch_tokens):
            group_scores = self._score_batch([jobs[index] for index in group])
            scores.update(zip(group, group_scores, strict=True))
            await asyncio.sleep(0)  # others may be waiting for this event loop
        return [scores[index] for index in range(len(jobs))]

    async def close(self) -> None:
        return None

    @torch.inference_mode()
    def _score_batch(self, jobs: Sequence[ScoringJob]) -> list[TeacherScore]:
        hidden_ND = self.predicting_hidden(jobs)
        target_N = torch.from_numpy(
            np.concatenate([job.token_ids[job.scored_indices] for job in jobs]).astype(np.int64)
        ).to(self._device)
        columns = map_chunks(
            self._chunk_scores,
            (hidden_ND, target_N, given_candidates(jobs, self._device)),
            chunk_tokens=self._chunk_tokens,
        )
        sizes = [job.num_scored for job in jobs]
        per_job = zip(*(column.cpu().split(sizes) for column in columns), strict=True)
        return [score_record(self._request, self.teacher_id, parts) for parts in per_job]

    def predicting_hidden(self, jobs: Sequence[ScoringJob]) -> Tensor:
        """[N, D] hidden states from which the scored tokens are predicted."""
        longest = max(job.token_ids.size for job in jobs)
        input_BT = torch.zeros(len(jobs), longest, dtype=torch.long)
        predicts_BT = torch.zeros(len(jobs), longest, dtype=torch.bool)
        for b, job in enumerate(jobs):
            input_BT[b, : job.token_ids.size] = torch.from_numpy(job.token_ids.astype(np.int64))
            # Token t is predicted from position t - 1.
            predicts_BT[b, torch.from_numpy(job.scored_indices - 1)] = True
        # Right padding needs no attention mask: causal attention never looks at what follows.
        hidden_BTD = self._model.model(
            input_ids=input_BT.to(self._device), use_cache=False
        ).last_hidden_state
        return hidden_BTD[predicts_BT.to(self._device)]

    def _chunk_scores(
        self, hidden_CD: Tensor, target_C: Tensor, given_CK: Tensor
    ) -> tuple[Tensor, ...]:
        logprob_CV = torch.log_softmax(logits_of(hidden_CD, self.output_head), dim=-1)
        return chunk_outputs(self._request, logprob_CV, target_C, hidden_CD, given_CK)


def given_candidates(jobs: Sequence[ScoringJob], device: torch.device) -> Tensor:
    """Return the candidates of jobs that have any, [N, K]; else [N, 0].

    Raises:
        AlignmentError: some of the jobs have candidates and some have none, or other numbers.
    """
    given = [job.candidate_ids for job in jobs]
    counts = {0 if ids is None else ids.shape[1] for ids in given}
    if len(counts) > 1:
        raise AlignmentError(
            f"scoring jobs with {sorted(counts)} candidates a token, expected one number for all"
        )
    rows = [
        np.empty((job.num_scored, 0), dtype=np.int64) if ids is None else ids
        for job, ids in zip(jobs, given, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(device)


def check_candidates(request: ScoreRequest, identity: ModelIdentity) -> None:
    """Raise ConfigError if more candidates are asked for than the vocabulary has tokens."""
    if not isinstance(request, TopKRequest | GivenCandidatesRequest):
        return
    if request.k > identity.vocab_size:
        raise ConfigError(
            f"the objective asks for the top {request.k} tokens, and the teacher's vocabulary "
            f"has {identity.vocab_size}; lower k"
        )


def chunk_outputs(
    request: ScoreRequest,
    logprob_CV: Tensor,
    target_C: Tensor,
    hidden_CD: Tensor,
    given_CK: Tensor,
) -> tuple[Tensor, ...]:
    """Return what is asked for of whole distributions: [C] logprobs, and more as [C, ...].

    Args:
        given_CK: candidates of a `GivenCandidatesRequest`.
    """
    logprob_C = logprob_CV.gather(-1, target_C.unsqueeze(-1)).squeeze(-1)
    match request:
        case TopKRequest(k=k):
            top = logprob_CV.topk(k, dim=-1)
            return logprob_C, top.indices, top.values
        case GivenCandidatesRequest(k=k):
            if given_CK.shape[-1] != k:
                raise AlignmentError(
                    f"scoring jobs with {given_CK.shape[-1]} candidates a token, expected {k}"
                )
            return logprob_C, given_CK, logprob_CV.gather(-1, given_CK)
        case HiddenRequest():
            return logprob_C, hidden_CD.float()
        case SampledRequest():
            return (logprob_C,)


def score_record(request: ScoreRequest, teacher_id: str, parts: tuple[Tensor, ...]) -> TeacherScore:
    """Return `chunk_outputs` of one job's tokens as a score."""
    logprobs_S = parts[0].numpy()
    match request:
        case TopKRequest() | GivenCandidatesRequest():
            return TopKScore(
                teacher_id=teacher_id,
                logprobs=logprobs_S,
                candidate_ids=parts[1].numpy(),
                candidate_logprobs=parts[2].numpy(),
            )
        case HiddenRequest():
            return HiddenScore(teacher_id=teacher_id, logprobs=logprobs_S, hidden=parts[1].numpy())
        case SampledRequest():
            return TeacherScore(teacher_id=teacher_id, logprobs=logprobs_S)
