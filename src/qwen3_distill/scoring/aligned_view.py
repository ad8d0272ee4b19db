"""The view of a teacher that has a tokenizer and a chat template of its own.

It reads the conversation in its own template and the response's bytes in its own tokens
(`tokenizer_alignment`). Its scores come back as one value per span (`AlignedScore`).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from qwen3_distill.data.prompt_view import end_of_turn
from qwen3_distill.data.prompts import check_roles
from qwen3_distill.data.rendering import apply_template
from qwen3_distill.data.sources import RawPrompt
from qwen3_distill.data.template_arguments import check_template_arguments, template_of
from qwen3_distill.errors import AlignmentError, DataError, HandshakeError
from qwen3_distill.modeling.loading import load_identity, load_tokenizer
from qwen3_distill.scoring.special_tokens import SpecialTokens, TurnEnds, map_special_tokens
from qwen3_distill.scoring.token_bytes import ByteTokenizer
from qwen3_distill.scoring.tokenizer_alignment import (
    Aligner,
    Alignment,
    OwnTokens,
    SameTokens,
    UnalignableError,
)
from qwen3_distill.scoring.views import TeacherView
from qwen3_distill.types import (
    LOGPROB_SLACK_NATS,
    AlignedRollout,
    AlignedScore,
    ModelIdentity,
    Prompt,
    Rollout,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    TokenSpan,
    UnalignedRollout,
)
from qwen3_distill.utils.shown import shortened, shown

_KEPT_PROMPTS = 1024
_KEPT_ALIGNMENTS = 4096
_TOGETHER = 256
"""Responses that are tokenized together: all cores have work, and memory is bounded."""


class TeacherPrompts:
    """Renders prompts with the teacher's chat template.

    Raises:
        ConfigError: the template does not read one of ``template_arguments``.
        HandshakeError: the teacher has no chat template.
    """

    def __init__(self, tokenizer: Any, name: str, template_arguments: Mapping[str, Any]) -> None:
        if not tokenizer.chat_template:
            raise HandshakeError(
                f"teacher {name} has no chat template, so it cannot read the prompts; use an "
                "instruction-tuned teacher, or put chat_template.jinja into its directory"
            )
        check_template_arguments(template_of(tokenizer), template_arguments)
        self._tokenizer = tokenizer
        self._name = name
        self._arguments = dict(template_arguments)
        self._kept = lru_cache(maxsize=_KEPT_PROMPTS)(self._render)

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the prompt's tokens, up to where the response begins.

        Raises:
            DataError: its messages are not known, or the template refuses them.
        """
        if not prompt.messages:
            raise DataError(
                f"prompt {prompt.prompt_id} has its student's tokens only, as one from a rollout "
                "file has, and a teacher with a tokenizer of its own needs the messages; sample "
                "the rollouts in the run"
            )
        return self.ids_of(prompt.prompt_id, prompt.messages)

    def ids_of(self, prompt_id: str, messages: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        """Return the tokens of messages, as pairs of a role and a text.

        Raises:
            DataError: the template refuses them.
        """
        return self._kept(prompt_id, messages)

    def check_roles(self, raw: RawPrompt) -> None:
        """Check that the template leaves out no message.

        Raises:
            DataError: it does.
        """
        check_roles(raw, self._tokenizer, self._arguments, who="teacher")

    def _render(self, prompt_id: str, messages: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        try:
            ids = apply_template(
                self._tokenizer,
                [{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._arguments,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"prompt {prompt_id}: the chat template of teacher {self._name} refuses messages "
                f"of the roles {shown([role for role, _ in messages])} "
                f"({shortened(str(error))}); change the messages, "
                "unset prompts.system, or change scoring.template_arguments"
            ) from error
        if not ids:
            raise DataError(
                f"prompt {prompt_id}: the chat template of teacher {self._name} renders nothing"
            )
        return tuple(ids)


class AlignedView(TeacherView):
    """A `TeacherView`: the teacher reads its own prompt and its own tokens of the response."""

    def __init__(self, prompts: TeacherPrompts, aligner: Aligner, context_length: int) -> None:
        self._prompts = prompts
        self._aligner = aligner
        self.context_length = context_length
        """The teacher's: prompt and response together."""
        self._alignments: dict[str, tuple[Rollout, Alignment]] = {}

    def check(self, student: ModelIdentity, teacher: ModelIdentity) -> None:
        """Accept any pair: `own_tokenizer_view` has refused those that cannot be aligned."""

    def num_prompt_tokens(self, raw: RawPrompt) -> int:
        """Return the length of a prompt in the teacher's template and tokens.

        Raises:
            DataError: the template cannot render it.
        """
        messages = tuple((message.role, message.content) for message in raw.messages)
        return len(self._prompts.ids_of(raw.prompt_id, messages))

    def check_roles(self, raw: RawPrompt) -> None:
        """Check that the teacher's template leaves out no message of a prompt.

        Raises:
            DataError: it does.
        """
        self._prompts.check_roles(raw)

    def job(self, rollout: Rollout) -> ScoringJob | UnalignedRollout:
        """Return the teacher's prompt and its tokens of the response; those of spans are scored.

        Raises:
            DataError: the teacher's template cannot render the prompt.
        """
        (job,) = self.jobs([rollout])
        return job

    def jobs(self, rollouts: Sequence[Rollout]) -> list[ScoringJob | UnalignedRollout]:
        """Return `job` of each rollout; the responses are tokenized together.

        Raises:
            DataError: the teacher's template cannot render a prompt.
        """
        found: list[ScoringJob | UnalignedRollout] = []
        for first in range(0, len(rollouts), _TOGETHER):
            part = rollouts[first : first + _TOGETHER]
            prompts = [self._prompt(rollout) for rollout in part]
            alignments = self._aligner.align_all(part)
            found += map(self._job, part, prompts, alignments)
        return found

    def _prompt(self, rollout: Rollout) -> tuple[int, ...]:
        if rollout.continues_at or rollout.sampled_by != "student":
            raise DataError(
                f"rollout {rollout.rollout_id} is a piece of an answer, or the teacher's own: "
                "scoring.tokenizer=own takes whole answers of the student only"
            )
        return self._prompts.ids(rollout.prompt)

    def _job(
        self, rollout: Rollout, prompt: tuple[int, ...], alignment: Alignment | UnalignableError
    ) -> ScoringJob | UnalignedRollout:
        if isinstance(alignment, UnalignableError):
            return UnalignedRollout(rollout_id=rollout.rollout_id, reason=str(alignment))
        num_tokens = len(prompt) + len(alignment.token_ids)
        if num_tokens > self.context_length:
            return UnalignedRollout(
                rollout_id=rollout.rollout_id,
                reason=f"it has {num_tokens} tokens of the teacher's, prompt included, and the "
                f"teacher's context is {self.context_length}",
            )
        self._keep(rollout, alignment)
        return ScoringJob(
            rollout_id=rollout.rollout_id,
            token_ids=np.array([*prompt, *alignment.token_ids]),
            scored=tuple(
                TokenSpan(start=len(prompt) + span.start, stop=len(prompt) + span.stop)
                for span in alignment.scored
            ),
        )

    def scored(self, rollout: Rollout, result: ScoreResult) -> AlignedRollout | ScoreFailure:
        """Return the rollout with a score per span, or the failure unchanged.

        Raises:
            AlignmentError: the result has another number of tokens than were asked about.
        """
        if isinstance(result, ScoreFailure):
            self._alignments.pop(rollout.rollout_id, None)
            return result
        alignment = self._alignment(rollout)
        counts = alignment.teacher_tokens
        if int(counts.sum()) != result.logprobs.size:
            raise AlignmentError(
                f"rollout {rollout.rollout_id}: {int(counts.sum())} tokens of the teacher's were "
                f"asked about, but {result.logprobs.size} have a score of {result.teacher_id}"
            )
        sums = np.add.reduceat(result.logprobs.astype(np.float64), np.cumsum(counts) - counts)
        return AlignedRollout(
            rollout=rollout,
            score=AlignedScore(
                teacher_id=result.teacher_id,
                span_tokens=alignment.student_tokens,
                # Each may lie above 0 by rounding, and so may their sum.
                logprobs=np.minimum(sums, LOGPROB_SLACK_NATS),
            ),
        )

    def _keep(self, rollout: Rollout, alignment: Alignment) -> None:
        """Keep an alignment for the answer; the oldest make room for it."""
        while len(self._alignments) >= _KEPT_ALIGNMENTS:
            del self._alignments[next(iter(self._alignments))]
        self._alignments[rollout.rollout_id] = (rollout, alignment)

    def _alignment(self, rollout: Rollout) -> Alignment:
        kept, alignment = self._alignments.pop(rollout.rollout_id, (None, None))
        if alignment is None or kept is not rollout:
            return self._aligner.align(rollout)
        return alignment


def own_tokenizer_view(
    student_dir: str | Path,
    teacher_dir: str | Path,
    *,
    special_tokens: Mapping[str, str],
    template_arguments: Mapping[str, Any],
    context_length: int | None = None,
) -> AlignedView:
    """Build the view of a teacher from the files of both models, without their weights.

    Args:
        context_length: The teacher's positions; None: those of its model.

    Raises:
        HandshakeError: the tokenizers cannot be aligned, or a special token has no counterpart.
        ModelError: a file is missing or damaged.
        ConfigError: the teacher's template does not read one of ``template_arguments``.
    """
    teacher = load_identity(teacher_dir, weights=False)
    special = special_tokens_of(student_dir, teacher_dir, special_tokens, template_arguments)
    tokenizer = load_tokenizer(teacher_dir, weights=False)
    aligner: Aligner = SameTokens(teacher.vocab_size)
    if special is not None:
        aligner = OwnTokens(_byte_tokenizer(student_dir), _byte_tokenizer(teacher_dir), special)
    prompts = TeacherPrompts(tokenizer, teacher.name, template_arguments)
    return AlignedView(prompts, aligner, context_length or teacher.context_length)


def special_tokens_of(
    student_dir: str | Path,
    teacher_dir: str | Path,
    given: Mapping[str, str],
    template_arguments: Mapping[str, Any],
) -> SpecialTokens | None:
    """Map special tokens from the files of both models; None where their tokenizers are the same.

    Raises:
        HandshakeError: see `own_tokenizer_view`.
    """
    student = load_identity(student_dir, weights=False)
    teacher = load_identity(teacher_dir, weights=False)
    if student.tokenizer_digest == teacher.tokenizer_digest:
        if given:
            raise HandshakeError(
                "scoring.special_tokens is set, and student and teacher have the same tokenizer: "
                "every token is the teacher's too; drop it"
            )
        return None
    return map_special_tokens(
        _byte_tokenizer(student_dir),
        _byte_tokenizer(teacher_dir),
        student_ends=_turn_ends(student_dir, student, {}),
        teacher_ends=_turn_ends(teacher_dir, teacher, template_arguments),
        given=given,
    )


def _byte_tokenizer(model_dir: str | Path) -> ByteTokenizer:
    return ByteTokenizer(load_tokenizer(model_dir, weights=False).backend_tokenizer, str(model_dir))


def _turn_ends(
    model_dir: str | Path, identity: ModelIdentity, template_arguments: Mapping[str, Any]
) -> TurnEnds:
    end = end_of_turn(load_tokenizer(model_dir, weights=False), template_arguments)
    token = None if end is None else end.token
    return TurnEnds(of_template=None if token is None else token.token_id, eos_ids=identity.eos_ids)
