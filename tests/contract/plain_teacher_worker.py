"""A teacher of one's own and its worker: the example of docs/extend/your-own-engine.md."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qwen3_distill.errors import ConfigError, EngineError
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_identity, load_model
from qwen3_distill.scoring.handshake import check_lengths
from qwen3_distill.types import (
    GivenCandidatesRequest,
    HiddenRequest,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TeacherScore,
    TopKRequest,
    TopKScore,
)


class PlainTeacherWorker:
    """The served object: a transformers model that scores one job at a time."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None

    def open(self, model_dir: str, request: ScoreRequest) -> str:
        """Load the teacher; return its id."""
        self._identity = load_identity(model_dir)
        if isinstance(request, HiddenRequest):
            raise ConfigError("the plain teacher sends no hidden states; use objective.kind=top_k")
        if isinstance(request, GivenCandidatesRequest):
            raise ConfigError(
                "the plain teacher scores no given tokens; use objective.support=teacher"
            )
        if isinstance(request, TopKRequest) and request.k > self._identity.vocab_size:
            raise ConfigError(
                f"the objective asks for the top {request.k} tokens, and the teacher's vocabulary "
                f"has {self._identity.vocab_size}; lower k"
            )
        self._request = request
        self._model = load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32)
        digest = weights_digest(dict(self._model.named_parameters()))
        self._teacher_id = f"{Path(model_dir).name}#{digest}@float32"
        return self._teacher_id

    def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        if self._model is None:
            raise EngineError("the teacher is not open: start it first")
        check_lengths(jobs, self._identity)
        return [self._score(job, self._model) for job in jobs]

    @torch.inference_mode()
    def _score(self, job: ScoringJob, model: PreTrainedModel) -> TeacherScore:
        ids_J = torch.from_numpy(job.token_ids).long()
        scored_S = torch.from_numpy(job.scored_indices)
        logits_JV = model(input_ids=ids_J[None], use_cache=False).logits[0]
        # Token t is predicted from position t - 1.
        logprob_SV = torch.log_softmax(logits_JV[scored_S - 1].float(), dim=-1)
        logprobs_S = logprob_SV.gather(-1, ids_J[scored_S][:, None])[:, 0].numpy()
        if not isinstance(self._request, TopKRequest):
            return TeacherScore(teacher_id=self._teacher_id, logprobs=logprobs_S)
        top = logprob_SV.topk(self._request.k, dim=-1)
        return TopKScore(
            teacher_id=self._teacher_id,
            logprobs=logprobs_S,
            candidate_ids=top.indices.numpy(),
            candidate_logprobs=top.values.numpy(),
        )


if __name__ == "__main__":
    serve_worker(PlainTeacherWorker())
