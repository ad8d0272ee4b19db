"""The mean of embedded teachers in probability space, over the whole vocabulary.

Shape letters: M members, N scored tokens of a batch, D hidden size, V vocabulary, C tokens of a
chunk, K candidates.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.head import logits_of, map_chunks
from qwen3_distill.scoring.embedded.teacher import (
    EmbeddedTeacher,
    check_candidates,
    chunk_outputs,
    given_candidates,
    score_record,
)
from qwen3_distill.scoring.ensemble import ensemble_id
from qwen3_distill.scoring.handshake import check_lengths
from qwen3_distill.types import (
    HiddenRequest,
    ModelIdentity,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TeacherScore,
)
from qwen3_distill.utils.batches import padded_batches
from qwen3_distill.utils.concurrency import forever


class EmbeddedEnsemble:
    """A `TeacherScorer` whose distribution is the mean of its members': sum_m w_m q_m.

    The mean is taken over the whole vocabulary before the most likely tokens are chosen, so both
    they and their logprobs are those of the mean.

    Args:
        members: teachers in this process, of one vocabulary and on one device.
        shares: weight of each, together 1.
        request: what is asked for.
        batch_tokens, chunk_tokens: as for a teacher; logits of a chunk exist once a member.

    Raises:
        ConfigError: hidden states are asked for, and a mean of distributions has none; or more
            candidates than the vocabulary has tokens.
    """

    def __init__(
        self,
        members: Sequence[EmbeddedTeacher],
        shares: Sequence[float],
        *,
        request: ScoreRequest,
        batch_tokens: int,
        chunk_tokens: int,
    ) -> None:
        if isinstance(request, HiddenRequest):
            raise ConfigError(
                "the objective asks for hidden states, and the mean of several distributions has "
                "none; use objective.kind=top_k"
            )
        check_candidates(request, members[0].identity)
        self.members = tuple(members)
        self._shares = tuple(shares)
        self._log_shares = [math.log(share) for share in shares]
        self._request = request
        self._batch_tokens, self._chunk_tokens = batch_tokens, chunk_tokens

    async def start(self) -> None:
        return None

    @property
    def counters(self) -> Mapping[str, float]:
        return {}

    @property
    def identity(self) -> ModelIdentity:
        """The first member's; what the student must share with it, all of them share."""
        return self.members[0].identity

    @property
    def teacher_id(self) -> str:
        return ensemble_id([member.teacher_id for member in self.members], self._shares)

    @property
    def max_dropped_fraction(self) -> float:
        return 0.0

    @property
    def starts_first(self) -> bool:
        return False

    async def memory_taken(self) -> None:
        await forever()

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        for member in self.members:
            check_lengths(jobs, member.identity)
        scores: dict[int, TeacherScore] = {}
        for group in padded_batches([job.token_ids.size for job in jobs], self._batch_tokens):
            scores.update(zip(group, self._score_batch([jobs[i] for i in group]), strict=True))
        return [scores[index] for index in range(len(jobs))]

    async def close(self) -> None:
        return None

    @torch.inference_mode()
    def _score_batch(self, jobs: Sequence[ScoringJob]) -> list[TeacherScore]:
        hidden = [member.predicting_hidden(jobs) for member in self.members]
        targets = np.concatenate([job.token_ids[job.scored_indices] for job in jobs])
        target_N = torch.from_numpy(targets.astype(np.int64)).to(hidden[0].device)
        given_NK = given_candidates(jobs, target_N.device)
        columns = map_chunks(
            self._chunk_scores, (target_N, given_NK, *hidden), chunk_tokens=self._chunk_tokens
        )
        sizes = [job.num_scored for job in jobs]
        per_job = zip(*(column.cpu().split(sizes) for column in columns), strict=True)
        return [score_record(self._request, self.teacher_id, parts) for parts in per_job]

    def _chunk_scores(
        self, target_C: Tensor, given_CK: Tensor, *hidden: Tensor
    ) -> tuple[Tensor, ...]:
        mean_CV: Tensor | None = None
        for member, share, hidden_CD in zip(self.members, self._log_shares, hidden, strict=True):
            own_CV = torch.log_softmax(logits_of(hidden_CD, member.output_head), dim=-1) + share
            mean_CV = own_CV if mean_CV is None else torch.logaddexp(mean_CV, own_CV)
        assert mean_CV is not None, "an ensemble has members"
        return chunk_outputs(self._request, mean_CV, target_C, hidden[0], given_CK)
