"""Lines a student's sampled tokens up with the tokens of a teacher that has another tokenizer.

The teacher reads exactly the bytes that the student's tokens write, tokenized by itself. Where a
token of both ends at the same byte, a span ends. Bytes that no common end splits stay in one span.
A special token is one by itself, by its name.

Where the teacher has a longer token that begins with a span's last one, the student's next token
decided that the span ends there. It belongs to the action, so the span takes in the next one.
Otherwise that token would be credited with nothing for the end, and the student would learn to end
spans that should go on (docs/concepts/objective.md). At most two spans become one: where
many tokens begin longer ones, a whole answer would be a single span.

What cannot be aligned has no span: everything from a special token on that the teacher has nothing
for, or from bytes on that its tokens cannot write; of an answer cut at its length limit an
incomplete character and the teacher's last word, whose tokens the text after it might have changed.

Shape letters: R response tokens, P spans.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.scoring.special_tokens import SpecialTokens
from qwen3_distill.scoring.token_bytes import (
    ByteTokenizer,
    Encoded,
    InexactTokensError,
    ends_within_character,
)
from qwen3_distill.types import FinishReason, IntArray, Rollout, TokenSpan


class UnalignableError(Exception):
    """Nothing of a rollout can be aligned, or the teacher's tokens would write other bytes."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """A response as the teacher reads it, with the spans that both models score."""

    token_ids: tuple[int, ...]
    """The teacher's tokens, up to the last one of a span."""
    scored: tuple[TokenSpan, ...]
    """The spans of `token_ids` that both models score."""
    student_tokens: IntArray
    """[P] sampled tokens of each span, from the first sampled token on."""
    teacher_tokens: IntArray
    """[P] tokens of the teacher of each span."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A run of the student's tokens: of text, or one special token."""

    is_sampled: bool
    lengths: list[int]
    """Bytes of each of the student's tokens; those of a special token count as one."""
    text: bytes
    teacher_id: int | None
    """The special token; None for text."""
    is_open: bool = False
    """Whether more text might have followed it."""


@dataclass(frozen=True)
class _Spans:
    """The spans of one part, in order."""

    student_tokens: IntArray
    """[P]"""
    teacher_tokens: IntArray
    """[P]"""
    ends: IntArray
    """[P] bytes of the part up to the span's end."""

    def first(self, count: int) -> "_Spans":
        return _Spans(self.student_tokens[:count], self.teacher_tokens[:count], self.ends[:count])


@dataclass
class _Draft:
    """An alignment as it grows."""

    token_ids: list[int] = field(default_factory=list)
    is_scored: list[NDArray[np.bool_]] = field(default_factory=list)
    student_tokens: list[IntArray] = field(default_factory=list)
    teacher_tokens: list[IntArray] = field(default_factory=list)
    may_go_on: list[NDArray[np.bool_]] = field(default_factory=list)
    """Per span, whether what the student sampled behind it decided that it ends."""

    def skip(self, token_ids: Sequence[int]) -> None:
        """Add tokens that the student did not sample."""
        self.token_ids += token_ids
        self.is_scored.append(np.zeros(len(token_ids), dtype=np.bool_))
        if self.may_go_on:
            self.may_go_on[-1][-1:] = False

    def add(self, token_ids: Sequence[int], spans: _Spans, may_go_on: NDArray[np.bool_]) -> None:
        """Add tokens of the teacher and the spans at their beginning."""
        self.token_ids += token_ids
        self.is_scored.append(np.arange(len(token_ids)) < spans.teacher_tokens.sum())
        self.student_tokens.append(spans.student_tokens)
        self.teacher_tokens.append(spans.teacher_tokens)
        self.may_go_on.append(may_go_on)

    def finished(self) -> Alignment:
        is_scored = np.concatenate([[False], *self.is_scored, [False]])
        edges = np.flatnonzero(is_scored[1:] != is_scored[:-1])
        if not edges.size:
            raise UnalignableError("no token of it can be aligned with the teacher's")
        first_P = _first_of_pairs(np.concatenate(self.may_go_on))
        return Alignment(
            token_ids=tuple(self.token_ids[: edges[-1]]),
            scored=tuple(
                TokenSpan(start=int(start), stop=int(stop)) for start, stop in edges.reshape(-1, 2)
            ),
            student_tokens=_summed(np.concatenate(self.student_tokens), first_P),
            teacher_tokens=_summed(np.concatenate(self.teacher_tokens), first_P),
        )


def _first_of_pairs(may_go_on_P: NDArray[np.bool_]) -> IntArray:
    """Return the indices of the spans that do not become one with the span before them.

    Of a run of spans that may go on, every other one takes in the next, beginning with the first.
    """
    index_P = np.arange(may_go_on_P.size)
    last_other_P = np.maximum.accumulate(np.where(may_go_on_P, -1, index_P))
    takes_next_P = may_go_on_P & ((index_P - last_other_P) % 2 == 1)
    return np.flatnonzero(~np.concatenate([[False], takes_next_P[:-1]]))


def _summed(tokens_P: IntArray, first_P: IntArray) -> IntArray:
    return np.add.reduceat(tokens_P, first_P).astype(np.int32)


class Aligner(ABC):
    """Lines responses up with the teacher's tokens."""

    @abstractmethod
    def align_all(self, rollouts: Sequence[Rollout]) -> list[Alignment | UnalignableError]:
        """Return the teacher's tokens of each response and the spans, or why there are none."""

    def align(self, rollout: Rollout) -> Alignment:
        """Return the teacher's tokens of a response, and the spans.

        Raises:
            UnalignableError: nothing of it can be aligned.
        """
        (found,) = self.align_all([rollout])
        if isinstance(found, UnalignableError):
            raise found
        return found


class OwnTokens(Aligner):
    """Aligns responses with a teacher of another tokenizer."""

    def __init__(
        self, student: ByteTokenizer, teacher: ByteTokenizer, special: SpecialTokens
    ) -> None:
        self._student = student
        self._teacher = teacher
        self.special = special

    def align_all(self, rollouts: Sequence[Rollout]) -> list[Alignment | UnalignableError]:
        """See `Aligner.align_all`: no span, or the teacher's tokens would write other bytes."""
        read = [self._read(rollout) for rollout in rollouts]
        texts = [part.text for parts in read for part in parts if part.teacher_id is None]
        encoded = iter(self._teacher.encode_all(texts))
        found: list[Alignment | UnalignableError] = []
        for parts in read:
            tokens = [
                next(encoded) if part.teacher_id is None else Encoded((part.teacher_id,), (1,), 1)
                for part in parts
            ]
            try:
                found.append(self._aligned(parts, tokens))
            except UnalignableError as error:
                found.append(error)
        return found

    def _aligned(
        self, parts: Sequence[_Part], tokens: Sequence[Encoded | InexactTokensError]
    ) -> Alignment:
        draft = _Draft()
        for part, encoded in zip(parts, tokens, strict=True):
            if isinstance(encoded, InexactTokensError):
                if not draft.student_tokens:
                    raise UnalignableError(str(encoded))
                break
            self._add(draft, part, encoded)
        return draft.finished()

    def _read(self, rollout: Rollout) -> list[_Part]:
        """Return the response in parts. Text that was cut ends with a whole character."""
        parts, is_complete = self._parts(rollout)
        was_cut = rollout.finish_reason is not FinishReason.STOP and is_complete
        if was_cut and parts and parts[-1].teacher_id is None:
            text, lengths = parts[-1].text, parts[-1].lengths
            while lengths and ends_within_character(text):
                text, lengths = text[: len(text) - lengths[-1]], lengths[:-1]
            parts[-1] = replace(parts[-1], text=text, lengths=lengths, is_open=True)
        return parts

    def _parts(self, rollout: Rollout) -> tuple[list[_Part], bool]:
        """Return the response in parts, and whether they reach its end.

        A part ends where sampled tokens begin or end, too, so that no span holds both.
        """
        ids: list[int] = rollout.response_ids.tolist()
        written = self._student.all_bytes_of(ids)
        odd = list[int]()  # special tokens, and those that write nothing
        for index in [index for index, text in enumerate(written) if not text]:
            written[index] = self.special.as_text.get(ids[index])
            if not written[index]:
                odd.append(index)
        sampled_R = np.zeros(rollout.num_tokens, dtype=np.bool_)
        sampled_R[rollout.sampled_indices] = True
        changes = (np.flatnonzero(sampled_R[1:] != sampled_R[:-1]) + 1).tolist()
        parts: list[_Part] = []
        start = 0
        for stop in [*odd, len(ids)]:
            edges = [start, *(edge for edge in changes if start < edge < stop), stop]
            for first, last in itertools.pairwise(edges):
                texts = [text or b"" for text in written[first:last]]
                if texts:
                    parts.append(
                        _Part(
                            is_sampled=bool(sampled_R[first]),
                            lengths=list(map(len, texts)),
                            text=b"".join(texts),
                            teacher_id=None,
                        )
                    )
            if stop == len(ids):
                break
            teacher_id = self.special.to_teacher.get(ids[stop])
            if teacher_id is None:
                return parts, False
            parts.append(
                _Part(
                    is_sampled=bool(sampled_R[stop]), lengths=[1], text=b"", teacher_id=teacher_id
                )
            )
            start = stop + 1
        return parts, True

    def _add(self, draft: _Draft, part: _Part, encoded: Encoded) -> None:
        """Add a part to an alignment, in the teacher's tokens."""
        if not part.is_sampled:
            draft.skip(encoded.token_ids)
            return
        spans = _spans(part.lengths, encoded)
        if part.is_open:
            spans = _closed(spans, encoded.stable_bytes)
        last_P = np.cumsum(spans.teacher_tokens) - 1
        may_go_on = self._teacher.begin_longer(encoded.token_ids)
        draft.add(encoded.token_ids, spans, np.array(may_go_on, dtype=np.bool_)[last_P])


def _spans(lengths: Sequence[int], encoded: Encoded) -> _Spans:
    """Return the spans between the ends that tokens of both have in common."""
    student_ends = np.cumsum(np.array(lengths, dtype=np.int64))
    teacher_ends = np.cumsum(np.array(encoded.lengths, dtype=np.int64))
    # Each end's number of tokens up to it; of the teacher's tokens, those that write nothing too.
    teachers = np.searchsorted(teacher_ends, student_ends, side="right")
    is_common = np.concatenate([[0], teacher_ends])[teachers] == student_ends
    students = np.flatnonzero(is_common) + 1
    return _Spans(_steps(students), _steps(teachers[is_common]), student_ends[is_common])


def _steps(counts: IntArray) -> IntArray:
    """Return how much each count adds to the one before it."""
    steps = counts.copy()
    steps[1:] -= counts[:-1]
    return steps


def _closed(spans: _Spans, stable_bytes: int) -> _Spans:
    """Leave out spans of the last word; of a text of one word, the last span."""
    if not stable_bytes:
        return spans.first(max(len(spans.ends) - 1, 0))
    return spans.first(int((spans.ends <= stable_bytes).sum()))


class SameTokens(Aligner):
    """Aligns responses with a teacher that has the student's tokenizer: token by token.

    Nothing is tokenized again, so every sampled token is a span.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def align_all(self, rollouts: Sequence[Rollout]) -> list[Alignment | UnalignableError]:
        """Return each response as it is, or that a token is not in the teacher's vocabulary."""
        return [self._aligned(rollout) for rollout in rollouts]

    def _aligned(self, rollout: Rollout) -> Alignment | UnalignableError:
        if int(rollout.response_ids.max()) >= self._vocab_size:
            return UnalignableError(
                f"token {int(rollout.response_ids.max())} is beyond the {self._vocab_size} of the "
                "teacher's vocabulary"
            )
        one_S = np.ones(rollout.num_loss_tokens, dtype=np.int32)
        last = rollout.sampled[-1].stop
        return Alignment(
            token_ids=tuple(rollout.response_ids[:last].tolist()),
            scored=rollout.sampled,
            student_tokens=one_S,
            teacher_tokens=one_S,
        )
