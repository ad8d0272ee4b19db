"""Alignment: spans between the byte ends that both tokenizers share, and what is dropped."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qwen3_distill.errors import HandshakeError
from qwen3_distill.scoring.special_tokens import TurnEnds, map_special_tokens
from qwen3_distill.scoring.token_bytes import ByteTokenizer
from qwen3_distill.scoring.tokenizer_alignment import (
    Alignment,
    SameTokens,
    UnalignableError,
)
from qwen3_distill.types import FinishReason, Rollout, TokenSpan
from tests.own_tokenizers import (
    STUDENT_SPECIAL,
    TEACHER_SPECIAL,
    THINK,
    byte_fallback,
    byte_level,
    own_tokens,
    rollout_of,
)
from tests.unit.scoring.test_token_bytes import FAMILY, pieces

CUT = FinishReason.LENGTH


student_of = byte_level
teacher_of = partial(byte_level, special=TEACHER_SPECIAL)


def sizes(alignment: Alignment) -> list[tuple[int, int]]:
    """(student tokens, teacher tokens) of each span."""
    pairs = zip(alignment.student_tokens, alignment.teacher_tokens, strict=True)
    return [(int(ours), int(theirs)) for ours, theirs in pairs]


def written_by(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """Return the bytes of each token; special tokens and unknown ones have none."""
    known = ByteTokenizer(tokenizer, "t")
    return [known.bytes_of(index) or b"" for index in ids]


def sampled_anyhow(rollout: Rollout, flags: Sequence[bool]) -> Rollout:
    """The rollout with some of its tokens sampled."""
    edges = np.flatnonzero(np.diff(np.array([0, *flags, 0], dtype=np.int8))).reshape(-1, 2)
    count = sum(flags)
    return replace(
        rollout,
        sampled=tuple(TokenSpan(start=int(a), stop=int(b)) for a, b in edges),
        behavior_logprobs=rollout.behavior_logprobs[:count],
        versions=(replace(rollout.versions[0], stop=count),),
    )


@settings(max_examples=80, deadline=None)
@given(st.data(), st.lists(st.integers(0, 270), min_size=1, max_size=24))
def test_spans_have_the_same_bytes_on_both_sides_and_end_where_the_next_token_decides_nothing(
    data: st.DataObject, drawn: list[int]
) -> None:
    student, teacher = student_of(pieces(data, 8)), teacher_of(pieces(data, 8))
    ids = [index for index in drawn if index < 256 or _is_piece(student, index)]
    flags = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    if not any(flags):
        return
    alignment = own_tokens(student, teacher).align(sampled_anyhow(rollout_of(ids), flags))
    ours = written_by(student, [index for index, flag in zip(ids, flags, strict=True) if flag])
    scored = [i for span in alignment.scored for i in range(span.start, span.stop)]
    theirs = written_by(teacher, [alignment.token_ids[i] for i in scored])
    assert sum(alignment.student_tokens) == len(ours)  # nothing is dropped, and nothing twice
    assert sum(alignment.teacher_tokens) == len(theirs)
    vocabulary = written_by(teacher, range(258 + 8 + len(TEACHER_SPECIAL)))
    for mine, yours in zip(_groups(ours, alignment, 0), _groups(theirs, alignment, 1), strict=True):
        assert b"".join(mine) == b"".join(yours) != b""
        inner = [list(accumulate(map(len, side)))[:-1] for side in (mine, yours)]
        common = set(inner[0]) & set(inner[1])
        assert len(common) <= 1
        for end in common:
            before = yours[inner[1].index(end)]
            assert any(v.startswith(before) and v != before for v in vocabulary)
    read = b"".join(written_by(teacher, alignment.token_ids))
    assert b"".join(written_by(student, ids)).startswith(read)


def _is_piece(tokenizer: Tokenizer, index: int) -> bool:
    return ByteTokenizer(tokenizer, "t").bytes_of(index) is not None


def _groups(tokens: list[bytes], alignment: Alignment, side: int) -> list[list[bytes]]:
    ends = list(accumulate(pair[side] for pair in sizes(alignment)))
    return [tokens[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


def test_merged_pairs_become_spans_and_the_end_of_turn_one_of_its_own() -> None:
    aligner = own_tokens(student_of(), teacher_of([(b"a", b"b"), (b"ab", b"c")]))
    end = 256 + STUDENT_SPECIAL.index("<|end|>")
    alignment = aligner.align(rollout_of([*b"abcxabc", end]))
    assert sizes(alignment) == [(3, 1), (1, 1), (3, 1), (1, 1)]
    assert alignment.token_ids[-1] == 258 + TEACHER_SPECIAL.index("<|eot|>")
    assert alignment.scored == (TokenSpan(start=0, stop=4),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"abx", [(3, 2), (1, 1)]),  # "ab" could have become "abc"
        (b"ax", [(2, 2), (1, 1)]),
        (b"xa", [(1, 1), (2, 2)]),  # the end of turn decided it
        (b"aax", [(2, 2), (1, 1), (1, 1)]),  # two at most
        (b"xabc", [(1, 1), (3, 1), (1, 1)]),
    ],
)
def test_what_decided_that_a_span_ends_is_a_part_of_it(
    text: bytes, expected: list[tuple[int, int]]
) -> None:
    aligner = own_tokens(student_of(), teacher_of([(b"a", b"b"), (b"ab", b"c")]))
    end = 256 + STUDENT_SPECIAL.index("<|end|>")
    assert sizes(aligner.align(rollout_of([*text, end]))) == expected


def test_tokens_that_were_not_sampled_decide_nothing() -> None:
    aligner = own_tokens(student_of(), teacher_of([(b"a", b"b")]))
    rollout = sampled_anyhow(rollout_of(list(b"axay"), CUT), [True, False, True, True])
    assert sizes(aligner.align(replace(rollout, finish_reason=FinishReason.STOP))) == [
        (1, 1),
        (2, 2),
    ]


def test_an_emoji_that_tokens_of_both_split_elsewhere_is_one_span() -> None:
    emoji = "\U0001f600".encode()
    aligner = own_tokens(
        student_of([(emoji[:1], emoji[1:2]), (emoji[2:3], emoji[3:])]),
        teacher_of([(emoji[1:2], emoji[2:3])]),
    )
    response = [257 - 1, 257]  # the student's two merged pieces
    assert sizes(aligner.align(rollout_of(response))) == [(2, 3)]
    whole = FAMILY.encode()
    alignment = aligner.align(rollout_of(list(whole)))
    assert sum(alignment.student_tokens) == len(whole)


def test_tokens_that_spell_a_special_token_are_text_to_the_teacher() -> None:
    aligner = own_tokens(student_of(), teacher_of())
    spelled = list(b"<|eot|><s><|end|>")
    alignment = aligner.align(rollout_of(spelled))
    assert list(alignment.token_ids) == spelled
    assert max(alignment.token_ids) < 256


def test_thinking_tags_are_mapped_by_name_or_read_as_text() -> None:
    student = student_of(added=THINK)
    think = student.token_to_id("<think>")
    assert think is not None
    by_name = own_tokens(student, teacher := teacher_of(added=THINK))
    assert by_name.align(rollout_of([think, *b"a"])).token_ids[0] == teacher.token_to_id("<think>")
    as_text = own_tokens(student, teacher_of()).align(rollout_of([think, *b"a"]))
    assert bytes(as_text.token_ids) == b"<think>a"
    assert sizes(as_text)[0] == (1, 7)


def test_what_follows_a_token_without_counterpart_is_dropped() -> None:
    aligner = own_tokens(student_of(), teacher_of())
    alone = 256 + STUDENT_SPECIAL.index("<|only the student|>")
    alignment = aligner.align(rollout_of([*b"ab", alone, *b"cd"]))
    assert bytes(alignment.token_ids) == b"ab"
    assert sizes(alignment) == [(1, 1), (1, 1)]
    with pytest.raises(UnalignableError, match="no token of it can be aligned"):
        aligner.align(rollout_of([alone, *b"cd"]))


def test_ids_that_are_no_tokens_are_dropped_like_them() -> None:
    alignment = own_tokens(student_of(), teacher_of()).align(rollout_of([*b"ab", 5000, *b"c"]))
    assert bytes(alignment.token_ids) == b"ab"


def test_an_answer_cut_within_a_character_loses_it_and_its_last_word() -> None:
    aligner = own_tokens(student_of(), teacher_of(words=True))
    cut = aligner.align(rollout_of([*b"one two thr", *"你".encode()[:2]], CUT))
    assert bytes(cut.token_ids) == b"one two"
    ended = aligner.align(rollout_of(list(b"one two thr"), FinishReason.STOP))
    assert bytes(ended.token_ids) == b"one two thr"


def test_an_incomplete_character_of_an_answer_that_ended_is_scored_byte_by_byte() -> None:
    end = 256 + STUDENT_SPECIAL.index("<|end|>")
    aligner = own_tokens(student_of(), teacher_of())
    alignment = aligner.align(rollout_of([*b"a", *"你".encode()[:2], end]))
    assert sizes(alignment) == [(1, 1)] * 4


def test_a_cut_answer_of_one_word_loses_its_last_span_only() -> None:
    aligner = own_tokens(student_of(), teacher_of([(b"b", b"c")]))
    assert sizes(aligner.align(rollout_of(list(b"abcbc"), CUT))) == [(1, 1), (2, 1)]
    with pytest.raises(UnalignableError):
        aligner.align(rollout_of(list(b"a"), CUT))
    end = 256 + STUDENT_SPECIAL.index("<|end|>")
    assert sizes(aligner.align(rollout_of([*b"a", end], CUT))) == [(1, 1), (1, 1)]


def test_bytes_that_the_teacher_cannot_write_end_the_alignment() -> None:
    end = 256 + STUDENT_SPECIAL.index("<|end|>")
    aligner = own_tokens(student_of(), byte_fallback(), teacher_end="<s>")
    response = [*b"a", end, *"▁".encode(), end]
    assert sizes(aligner.align(rollout_of(response))) == [(1, 1), (1, 1)]
    with pytest.raises(UnalignableError, match="becomes tokens of teacher that write"):
        aligner.align(rollout_of(list("▁".encode())))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.lists(st.integers(0, 270), min_size=1, max_size=9), max_size=5))
def test_many_responses_are_aligned_as_each_alone(
    data: st.DataObject, drawn: list[list[int]]
) -> None:
    aligner = own_tokens(student_of(pieces(data, 8)), teacher_of(pieces(data, 8)))
    reasons = st.sampled_from([FinishReason.STOP, CUT])
    rollouts = [rollout_of(ids, data.draw(reasons)) for ids in drawn]
    for rollout, found in zip(rollouts, aligner.align_all(rollouts), strict=True):
        if isinstance(found, UnalignableError):
            with pytest.raises(UnalignableError, match=re.escape(str(found))):
                aligner.align(rollout)
            continue
        alone = aligner.align(rollout)
        assert (found.token_ids, found.scored) == (alone.token_ids, alone.scored)
        assert sizes(found) == sizes(alone)


def test_the_same_tokenizer_scores_every_sampled_token_by_itself() -> None:
    rollout = sampled_anyhow(rollout_of([1, 2, 3, 4], CUT), [True, False, True, False])
    alignment = SameTokens(10).align(rollout)
    assert alignment.token_ids == (1, 2, 3)
    assert alignment.scored == rollout.sampled
    assert sizes(alignment) == [(1, 1), (1, 1)]
    with pytest.raises(UnalignableError, match="token 4 is beyond the 4"):
        SameTokens(4).align(rollout)


# --- Special tokens -------------------------------------------------------------------------------


def mapped(
    student_special: Sequence[str] = STUDENT_SPECIAL,
    teacher_special: Sequence[str] = TEACHER_SPECIAL,
    *,
    eos: Sequence[str] = ("<|end|>",),
    teacher_eos: Sequence[str] = ("<|eot|>",),
    teacher_template: str | None = None,
    given: dict[str, str] | None = None,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The mapping by names, and its lines."""
    student = byte_level(special=student_special)
    teacher = byte_level(special=teacher_special)

    def ends(tokenizer: Tokenizer, template: str | None, names: Sequence[str]) -> TurnEnds:
        found = {tokenizer.token_to_id(name) for name in names} - {None}
        of_template = None if template is None else tokenizer.token_to_id(template)
        return TurnEnds(of_template=of_template, eos_ids=frozenset(i for i in found if i))

    ours, theirs = ByteTokenizer(student, "student"), ByteTokenizer(teacher, "teacher")
    special = map_special_tokens(
        ours,
        theirs,
        student_ends=ends(student, eos[0], eos),
        teacher_ends=ends(teacher, teacher_template, teacher_eos),
        given=given or {},
    )
    names = {ours.added[a]: theirs.added[b] for a, b in special.to_teacher.items()}
    return names, special.lines


def test_the_end_of_turn_is_mapped_by_its_role_and_others_by_name() -> None:
    names, lines = mapped()
    same = {"<|user|>": "<|user|>", "<|assistant|>": "<|assistant|>"}
    assert names == {"<|end|>": "<|eot|>", **same}
    assert lines[0] == "<|end|> (257) -> <|eot|> (257)"
    assert lines[-1] == ("no counterpart, what follows is dropped: <|only the student|>, <|pad|>")


def test_a_token_of_the_same_name_does_not_take_the_place_of_the_end_of_turn() -> None:
    names, _ = mapped(teacher_special=("<|end|>", "<|eot|>"))
    assert names["<|end|>"] == "<|eot|>"


def test_a_given_name_goes_before_all_rules() -> None:
    names, _ = mapped(given={"<|end|>": "<s>", "<|pad|>": "<s>"})
    assert (names["<|end|>"], names["<|pad|>"]) == ("<s>", "<s>")


def test_of_several_ends_the_template_names_the_teachers() -> None:
    eos = ("<s>", "<|eot|>")
    names, _ = mapped(teacher_eos=eos, teacher_template="<|eot|>")
    assert names["<|end|>"] == "<|eot|>"
    with pytest.raises(HandshakeError, match=r"end of a turn is not plain.*scoring.special_tokens"):
        mapped(teacher_eos=eos)


def test_names_that_are_no_added_tokens_are_refused() -> None:
    with pytest.raises(HandshakeError, match="'<nope>', which is no added token of the student"):
        mapped(given={"<nope>": "<s>"})
    with pytest.raises(HandshakeError, match="'<nope>', which is no added token of the teacher"):
        mapped(given={"<|end|>": "<nope>"})
