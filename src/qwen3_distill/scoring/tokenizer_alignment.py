"""Lines a student's sampled tokens up with the tokens of a teacher that has another tokenizer.

The teacher reads exactly the bytes that the student's tokens write, tokenized by itself. Where a
token of both ends at the same byte, a span ends. Bytes that no common end splits stay in one span.
A special token is one by itself, by its name.

Where the teacher has a longer token that begins with a span's last one, the student's next token
decided that the span ends there. It belongs to the action, so the span takes in the next one.
Otherwise that token would be credited with nothing for the end, and the student would learn to end
spans that should go on (docs/concepts/objective.md). At most two spans become one: in a text of
words nearly every token begins a longer one.

What cannot be aligned has no span: everything from a special token on that the teacher has nothing
for, or from bytes on that its tokens cannot write; of an answer cut at its length limit an
incomplete character and the teacher's last word, whose tokens the text after it might have changed.

Shape letters: R response tokens, P spans.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

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
    lengths: tuple[int, ...]
    """Bytes of each of the student's tokens; those of a special token count as one."""
    text: bytes
    teacher_id: int | None
    """The special token; None for text."""


@dataclass
class _Draft:
    """An alignment as it grows."""

    token_ids: list[int] = field(default_factory=list)
    is_scored: list[bool] = field(default_factory=list)
    student_tokens: list[int] = field(default_factory=list)
    teacher_tokens: list[int] = field(default_factory=list)
    takes_next: bool = False
    """Whether the next span becomes one with the last one."""

    def add_span(self, student_tokens: int, teacher_tokens: int, *, may_go_on: bool) -> None:
        """Add a span, or make it one with the last one.

        Args:
            may_go_on: whether the teacher has a longer token that begins with the span's last one.
        """
        if self.takes_next:
            self.student_tokens[-1] += student_tokens
            self.teacher_tokens[-1] += teacher_tokens
        else:
            self.student_tokens.append(student_tokens)
            self.teacher_tokens.append(teacher_tokens)
        self.takes_next = may_go_on and not self.takes_next

    def finished(self) -> Alignment:
        end = max((i + 1 for i, scored in enumerate(self.is_scored) if scored), default=0)
        if not end:
            raise UnalignableError("no token of it can be aligned with the teacher's")
        edges = np.flatnonzero(np.diff(np.array([0, *self.is_scored[:end], 0], dtype=np.int8)))
        return Alignment(
            token_ids=tuple(self.token_ids[:end]),
            scored=tuple(
                TokenSpan(start=int(start), stop=int(stop)) for start, stop in edges.reshape(-1, 2)
            ),
            student_tokens=np.array(self.student_tokens, dtype=np.int32),
            teacher_tokens=np.array(self.teacher_tokens, dtype=np.int32),
        )


class OwnTokens:
    """Aligns responses with a teacher of another tokenizer."""

    def __init__(
        self, student: ByteTokenizer, teacher: ByteTokenizer, special: SpecialTokens
    ) -> None:
        self._student = student
        self._teacher = teacher
        self.special = special

    def align(self, rollout: Rollout) -> Alignment:
        """Return the teacher's tokens of a response, and the spans.

        Raises:
            UnalignableError: there is no span, or the teacher's tokens would write other bytes.
        """
        parts, is_complete = self._parts(rollout)
        was_cut = rollout.finish_reason is not FinishReason.STOP and is_complete
        draft = _Draft()
        for index, part in enumerate(parts):
            is_open = was_cut and index == len(parts) - 1
            if not self._add(draft, part, is_open=is_open):
                break
        return draft.finished()

    def _parts(self, rollout: Rollout) -> tuple[list[_Part], bool]:
        """Return the response in parts, and whether they reach its end.

        A part ends where sampled tokens begin or end, too, so that no span holds both.
        """
        sampled_R = np.zeros(rollout.num_tokens, dtype=np.bool_)
        sampled_R[rollout.sampled_indices] = True
        is_sampled: list[bool] = sampled_R.tolist()  # read token by token, faster than an array
        parts: list[_Part] = []
        texts: list[bytes] = []
        start = 0

        def end_text() -> None:
            if texts:
                parts.append(
                    _Part(
                        is_sampled=is_sampled[start],
                        lengths=tuple(map(len, texts)),
                        text=b"".join(texts),
                        teacher_id=None,
                    )
                )
                texts.clear()

        for index, token_id in enumerate(rollout.response_ids.tolist()):
            if texts and is_sampled[index] != is_sampled[start]:
                end_text()
            teacher_id = self.special.to_teacher.get(token_id)
            if teacher_id is not None:
                end_text()
                parts.append(
                    _Part(
                        is_sampled=is_sampled[index],
                        lengths=(1,),
                        text=b"",
                        teacher_id=teacher_id,
                    )
                )
                continue
            written = self._student.bytes_of(token_id)
            written = self.special.as_text.get(token_id) if written is None else written
            if not written:
                end_text()
                return parts, False
            if not texts:
                start = index
            texts.append(written)
        end_text()
        return parts, True

    def _add(self, draft: _Draft, part: _Part, *, is_open: bool) -> bool:
        """Add a part to an alignment; return whether what follows it can be added too.

        Args:
            is_open: more text might have followed the part.
        """
        if part.teacher_id is not None:
            encoded = Encoded((part.teacher_id,), (1,), 1)
        else:
            text, lengths = part.text, part.lengths
            while is_open and lengths and ends_within_character(text):
                text, lengths = text[: len(text) - lengths[-1]], lengths[:-1]
            part = _Part(is_sampled=part.is_sampled, lengths=lengths, text=text, teacher_id=None)
            try:
                encoded = self._teacher.encode(text)
            except InexactTokensError as error:
                if not draft.student_tokens:
                    raise UnalignableError(str(error)) from None
                return False
        draft.token_ids += encoded.token_ids
        if not part.is_sampled:
            draft.is_scored += [False] * len(encoded.token_ids)
            draft.takes_next = False
            return True
        spans = [*_spans(part.lengths, encoded)]
        if is_open and part.teacher_id is None:
            spans = _closed(spans, encoded.stable_bytes)
        num_scored = 0
        for span in spans:
            num_scored += span.teacher_tokens
            last = encoded.token_ids[num_scored - 1]
            may_go_on = self._teacher.begins_longer(last)
            draft.add_span(span.student_tokens, span.teacher_tokens, may_go_on=may_go_on)
        draft.is_scored += [True] * num_scored
        draft.is_scored += [False] * (len(encoded.token_ids) - num_scored)
        return True


@dataclass(frozen=True)
class _Span:
    student_tokens: int
    teacher_tokens: int
    end: int
    """Bytes of the part up to here."""


def _spans(lengths: tuple[int, ...], encoded: Encoded) -> Iterator[_Span]:
    """Yield the spans between the ends that tokens of both have in common."""
    student_ends = np.cumsum(lengths, dtype=np.int64)
    teacher_ends = np.cumsum(encoded.lengths, dtype=np.int64)
    ends = np.intersect1d(student_ends, teacher_ends)
    students = np.searchsorted(student_ends, ends, side="right")
    teachers = np.searchsorted(teacher_ends, ends, side="right")
    for student, teacher, end in zip(
        np.diff(students, prepend=0).tolist(),
        np.diff(teachers, prepend=0).tolist(),
        ends.tolist(),
        strict=True,
    ):
        yield _Span(student, teacher, end)


def _closed(spans: list[_Span], stable_bytes: int) -> list[_Span]:
    """Leave out spans of the last word; of a text of one word, the last span."""
    return [span for span in spans if span.end <= stable_bytes] if stable_bytes else spans[:-1]


class SameTokens:
    """Aligns responses with a teacher that has the student's tokenizer: token by token.

    Nothing is tokenized again, so every sampled token is a span.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def align(self, rollout: Rollout) -> Alignment:
        """Return the response as it is.

        Raises:
            UnalignableError: a token is not in the teacher's vocabulary.
        """
        if int(rollout.response_ids.max()) >= self._vocab_size:
            raise UnalignableError(
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
