"""Which token of a teacher stands for which special token of a student, by name.

Special tokens write no text, so no bytes line them up. The student's end of a turn is the teacher's
end of a turn, whatever the two are called; every other one is the teacher's token of the same name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qwen3_distill.errors import HandshakeError
from qwen3_distill.scoring.token_bytes import ByteTokenizer

_NAMED = 4
"""Tokens without a counterpart that are named one by one."""


@dataclass(frozen=True, kw_only=True)
class TurnEnds:
    """The tokens that end an answer of one model."""

    of_template: int | None
    """The token that its chat template writes after an answer; None: there is none."""
    eos_ids: frozenset[int]

    def end(self) -> int | None:
        """Return the token that ends an answer; None where it is not plain."""
        if self.of_template in self.eos_ids:
            return self.of_template
        return next(iter(self.eos_ids)) if len(self.eos_ids) == 1 else None


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The student's added tokens, as the teacher reads them."""

    to_teacher: Mapping[int, int]
    """By the student's id, the teacher's."""
    as_text: Mapping[int, bytes]
    """By the student's id, what is read as text: added tokens that are no special ones, such as
    ``<think>``, of which the teacher has none."""
    unmapped: frozenset[int]
    """The student's special tokens that the teacher has nothing for: what follows one cannot be
    aligned."""
    lines: tuple[str, ...]
    """The whole for people, a mapping each."""

    def text(self) -> str:
        """Return the whole in one line."""
        return "; ".join(self.lines)


def map_special_tokens(
    student: ByteTokenizer,
    teacher: ByteTokenizer,
    *,
    student_ends: TurnEnds,
    teacher_ends: TurnEnds,
    given: Mapping[str, str],
) -> SpecialTokens:
    """Map the student's added tokens to the teacher's.

    Args:
        given: names of the student's tokens to names of the teacher's, which go before all rules.

    Raises:
        HandshakeError: a given name is no added token, or the end of a turn has no counterpart.
    """
    ids_of_teacher = {name: index for index, name in sorted(teacher.added.items(), reverse=True)}
    _check_given(given, student, ids_of_teacher)
    end = student_ends.end()
    to_teacher: dict[int, int] = {}
    as_text: dict[int, bytes] = {}
    for index, name in student.added.items():
        if name in given:
            to_teacher[index] = ids_of_teacher[given[name]]
        elif index == end:
            to_teacher[index] = _end_of(teacher, teacher_ends, name)
        elif name in ids_of_teacher:
            to_teacher[index] = ids_of_teacher[name]
        elif index not in student.special_ids:
            as_text[index] = name.encode()
    unmapped = frozenset(student.added) - set(to_teacher) - set(as_text)
    lost_ends = [student.added.get(i, str(i)) for i in sorted(student_ends.eos_ids & unmapped)]
    if student_ends.eos_ids and not student_ends.eos_ids - unmapped:
        raise HandshakeError(
            f"none of the student's tokens that end an answer ({', '.join(lost_ends)}) has a "
            "counterpart in the teacher's tokenizer, so the student would not learn to stop; name "
            "one in scoring.special_tokens, e.g. {" + f'"{lost_ends[0]}": "<|eot_id|>"' + "}"
        )
    return SpecialTokens(
        to_teacher=to_teacher,
        as_text=as_text,
        unmapped=unmapped,
        lines=_lines(student, teacher, to_teacher, as_text, unmapped),
    )


def _check_given(
    given: Mapping[str, str], student: ByteTokenizer, ids_of_teacher: Mapping[str, int]
) -> None:
    for name, other in given.items():
        if name not in student.added.values():
            raise HandshakeError(
                f"scoring.special_tokens names {name!r}, which is no added token of the student; "
                f"it has {_some(student.added.values())}"
            )
        if other not in ids_of_teacher:
            raise HandshakeError(
                f"scoring.special_tokens maps {name!r} to {other!r}, which is no added token of "
                f"the teacher; it has {_some(ids_of_teacher)}"
            )


def _end_of(teacher: ByteTokenizer, ends: TurnEnds, name: str) -> int:
    found = ends.end()
    if found is None or found not in teacher.added:
        raise HandshakeError(
            f"the student ends an answer with {name}, and the teacher's end of a turn is not plain "
            f"(its end-of-sequence ids: {sorted(ends.eos_ids)}, its chat template writes "
            f"{ends.of_template} after an answer); name it in scoring.special_tokens, e.g. "
            "{" + f'"{name}": "<|eot_id|>"' + "}"
        )
    return found


def _lines(
    student: ByteTokenizer,
    teacher: ByteTokenizer,
    to_teacher: Mapping[int, int],
    as_text: Mapping[int, bytes],
    unmapped: frozenset[int],
) -> tuple[str, ...]:
    lines = [
        f"{student.added[index]} ({index}) -> {teacher.added[other]} ({other})"
        for index, other in to_teacher.items()
    ]
    lines += [f"{student.added[index]} ({index}) -> read as text" for index in as_text]
    if unmapped:
        names = [student.added[index] for index in sorted(unmapped)]
        lines.append(f"no counterpart, what follows is dropped: {_some(names)}")
    return tuple(lines)


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    more = len(found) - _NAMED
    return ", ".join(found[:_NAMED]) + (f" and {more} more" if more > 0 else "") or "none"
