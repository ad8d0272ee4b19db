"""The loss over spans: today's loss where a span is a token, the exact gradient where it is not.

The enumerated student is a table: a response is letters of {a, b}, its state is the prefix, and the
output head holds the logits of every state, so that its gradient is that of the table.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor

from qwen3_distill.config import ObjectiveConfig, SampledReverseKL, TopKBaseline, TopKDivergence
from qwen3_distill.errors import AlignmentError
from qwen3_distill.replay.flat import flatten
from qwen3_distill.scoring.token_bytes import ByteTokenizer
from qwen3_distill.training.batching import AlignedMicroBatch, MicroBatch, micro_batches
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.types import (
    AlignedRollout,
    AlignedScore,
    Batch,
    Rollout,
    ScoredRollout,
    TeacherScore,
    TrainingRollout,
)
from tests.contract.builders import synthetic_rollout
from tests.own_tokenizers import TEACHER_SPECIAL, byte_level, own_tokens, rollout_of

VOCAB, HIDDEN = 256, 6
HEAD_VD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
SAMPLED = SampledReverseKL(kind="sampled_reverse_kl")


def values_of(seed: int, size: int) -> np.ndarray:
    return -np.random.default_rng(seed).uniform(0.1, 4, size).astype(np.float32)


def by_token(rollout: Rollout, seed: int) -> ScoredRollout:
    logprobs = values_of(seed, rollout.num_loss_tokens)
    return ScoredRollout(rollout=rollout, score=TeacherScore(teacher_id="t", logprobs=logprobs))


def by_span(rollout: Rollout, seed: int, span_tokens: Sequence[int]) -> AlignedRollout:
    score = AlignedScore(
        teacher_id="t",
        span_tokens=np.array(span_tokens),
        logprobs=values_of(seed, len(span_tokens)),
    )
    return AlignedRollout(rollout=rollout, score=score)


def batch_of(scored: Sequence[TrainingRollout]) -> Batch:
    count = len(scored)
    return Batch(
        scored=tuple(scored),
        importance_weights=np.linspace(0.5, 1.5, count),
        task_advantages=np.linspace(-0.3, 0.4, count),
    )


def states_of(micro: MicroBatch) -> Tensor:
    """[B, T, D] a hidden state for every input token, from its id and position alone."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(VOCAB, HIDDEN, generator=generator)
    return table[micro.input_BT] + 0.1 * micro.position_BT.unsqueeze(-1)


def stepped(
    batch: Batch,
    config: ObjectiveConfig = SAMPLED,
    *,
    max_tokens: int = 10_000,
    packed: bool = False,
) -> tuple[float, Tensor]:
    """Loss and the head's gradient of a batch."""
    objective = build_objective(config, teacher_head_VD=None, chunk_tokens=7)
    head = HEAD_VD.clone().requires_grad_()
    total = 0.0
    for micro in micro_batches(batch, max_tokens, packed=packed):
        terms = objective.terms(micro, states_of(micro), head, batch.denominator)
        assert terms.magnitude_N.shape == micro.target_N.shape
        terms.loss.backward()
        total += float(terms.loss.detach())
    assert head.grad is not None
    return total, head.grad


CONFIGS = (
    SAMPLED,
    SampledReverseKL(kind="sampled_reverse_kl", ratio_cap=1.2, advantage_clip=1.0),
    SampledReverseKL(kind="sampled_reverse_kl", ratio_cap=None, advantage_clip=None),
    SampledReverseKL(kind="sampled_reverse_kl", discount=0.7),
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_spans_of_one_token_give_todays_loss_bit_for_bit(
    config: SampledReverseKL, packed: bool
) -> None:
    rollouts = [synthetic_rollout(p, r) for p, r in ((3, 5), (1, 1), (4, 9))]
    plain = batch_of([by_token(rollout, seed) for seed, rollout in enumerate(rollouts)])
    ones = [[1] * rollout.num_loss_tokens for rollout in rollouts]
    spans = batch_of([by_span(r, seed, ones[seed]) for seed, r in enumerate(rollouts)])
    assert spans.denominator == plain.denominator
    for max_tokens in (1, 12, 1000):
        loss, gradient = stepped(plain, config, max_tokens=max_tokens, packed=packed)
        found = stepped(spans, config, max_tokens=max_tokens, packed=packed)
        assert found[0] == loss != 0
        assert torch.equal(found[1], gradient)


tilings = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(tilings, st.integers(0, 3)), min_size=1, max_size=4), st.booleans())
def test_a_span_is_one_action_in_any_split(rows: list[tuple[list[int], int]], packed: bool) -> None:
    """By hand: each token of a span has the span's whole signal and ratio, dropped ones nothing."""
    items = [
        by_span(synthetic_rollout(2 + i, sum(spans) + dropped), i, spans)
        for i, (spans, dropped) in enumerate(rows)
    ]
    batch = batch_of(items)
    assert batch.denominator == pytest.approx(
        sum(w * sum(spans) for w, (spans, _) in zip(batch.importance_weights, rows, strict=True))
    )
    head = HEAD_VD.double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for micro in micro_batches(batch, 1):  # one rollout each
        assert isinstance(micro, AlignedMicroBatch)
        row = micro.rollouts[0]
        item = items[row]
        logits = states_of(micro).flatten(0, 1)[micro.loss_index_N].double() @ head.T
        logprob_N = logits.log_softmax(-1).gather(1, micro.target_N.unsqueeze(1)).squeeze(1)
        start = 0
        for size, teacher in zip(rows[row][0], item.score.logprobs, strict=True):
            own = logprob_N[start : start + size]
            behavior = float(
                item.rollout.behavior_logprobs[start : start + size].astype("f8").sum()
            )
            ratio = min(float((own.detach().sum() - behavior).exp()), 2.0)
            signal = float(np.clip(float(teacher) - float(own.detach().sum()), -5, 5))
            advantage = signal + float(batch.task_advantages[row])
            weight = float(batch.importance_weights[row])
            expected = expected - weight * ratio * advantage * own.sum() / batch.denominator
            start += size
        assert start == micro.target_N.numel()  # dropped tokens have no place in the loss
    expected.backward()
    for max_tokens in (1, 14, 1000):
        loss, gradient = stepped(batch, max_tokens=max_tokens, packed=packed)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
        assert head.grad is not None
        torch.testing.assert_close(gradient, head.grad.float(), rtol=1e-3, atol=1e-6)


def test_no_token_has_a_teachers_logprob_of_its_own() -> None:
    batch = batch_of([by_span(synthetic_rollout(2, 5), 0, [2, 1])])
    (micro,) = micro_batches(batch, 100)
    assert isinstance(micro, AlignedMicroBatch)
    assert micro.teacher_logprob_N.isnan().all()
    assert not micro.is_scored
    assert (micro.span_tokens_P.tolist(), micro.spans_per_sequence) == ([2, 1], (2,))
    assert micro.loss_tokens == (3,)


def test_spans_and_tokens_do_not_mix_in_a_batch() -> None:
    rollout = synthetic_rollout(2, 3)
    for other in (by_token(rollout, 0), TrainingRollout(rollout=rollout)):
        with pytest.raises(AlignmentError, match="scored by spans and others"):
            flatten([by_span(rollout, 0, [3]), other])


@pytest.mark.parametrize(
    "config",
    [
        SampledReverseKL(kind="sampled_reverse_kl", kl_baseline=TopKBaseline(kind="top_k", k=2)),
        TopKDivergence(kind="top_k", k=2),
    ],
)
def test_objectives_over_one_vocabulary_refuse_spans(config: ObjectiveConfig) -> None:
    with pytest.raises(AlignmentError):
        stepped(batch_of([by_span(synthetic_rollout(2, 3), 0, [3])]), config)


# --- Enumerated -----------------------------------------------------------------------------------

LETTERS = "ab"
PREFIXES = ["".join(p) for size in range(4) for p in itertools.product(LETTERS, repeat=size)]
OTHERS = -1e9
"""Logit of every token that is no letter: its probability is 0."""


def table(seed: int) -> Tensor:
    """[V, prefixes] logits of the letters after every prefix."""
    logits = torch.full((VOCAB, len(PREFIXES)), OTHERS)
    generator = torch.Generator().manual_seed(seed)
    rows = [ord(letter) for letter in LETTERS]
    logits[rows] = torch.randn(len(rows), len(PREFIXES), generator=generator)
    return logits


STUDENT, TEACHER, SAMPLER = table(1), table(2), table(3)


def logprob(logits: Tensor, before: str, text: str) -> Tensor:
    """log p(text | before), exact, with the table's gradient."""
    terms = [
        logits[:, PREFIXES.index(before + text[:i])].log_softmax(0)[ord(letter)]
        for i, letter in enumerate(text)
    ]
    return torch.stack(terms).sum()


def pairs_tokenizer() -> Tokenizer:
    """Reads letters two by two."""
    merges = [(a.encode(), b.encode()) for a in LETTERS for b in LETTERS]
    tokenizer = byte_level(merges, special=TEACHER_SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[ab]{2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def sampled_by(logits: Tensor, text: str) -> Rollout:
    rollout = rollout_of(list(text.encode()))
    logprobs = [float(logprob(logits, text[:i], text[i])) for i in range(len(text))]
    return Rollout(
        rollout_id=text,
        prompt=rollout.prompt,
        sampling=rollout.sampling,
        response_ids=rollout.response_ids,
        behavior_logprobs=np.array(logprobs),
        versions=rollout.versions,
        finish_reason=rollout.finish_reason,
    )


def scored_in_pairs(rollout: Rollout, teacher: Tensor) -> AlignedRollout:
    """The equivalent teacher's score: a merged token has its letters' joint probability."""
    backend = pairs_tokenizer()
    alignment = own_tokens(byte_level(), backend).align(rollout)
    known = ByteTokenizer(backend, "t")
    text, values = "", list[float]()
    for index in alignment.token_ids:
        piece = (known.bytes_of(index) or b"").decode()
        values.append(float(logprob(teacher, text, piece)))
        text += piece
    assert alignment.teacher_tokens.tolist() == [1] * (len(rollout.rollout_id) // 2)
    score = AlignedScore(
        teacher_id="t", span_tokens=alignment.student_tokens, logprobs=np.array(values)
    )
    return AlignedRollout(rollout=rollout, score=score)


@pytest.mark.parametrize("text", ["aa", "ab", "ba", "bb", "bab", "aba", "abb", "baa", "bba", "aab"])
def test_an_equivalent_teacher_that_knows_how_a_word_goes_on_gives_no_signal(text: str) -> None:
    """The teacher reads "ab" as one token, so its "a" says that no "b" follows."""
    backend = byte_level([(b"a", b"b")], special=TEACHER_SPECIAL)
    rollout = sampled_by(STUDENT, text)
    alignment = own_tokens(byte_level(), backend).align(rollout)
    known = ByteTokenizer(backend, "t")
    values, done, cannot_follow = list[float](), "", 0.0
    for index in alignment.token_ids:
        piece = (known.bytes_of(index) or b"").decode()
        value = float(logprob(STUDENT, done, piece)) - cannot_follow
        done += piece
        cannot_follow = 0.0
        if piece == "a" and done != text:
            cannot_follow = math.log1p(-float(logprob(STUDENT, done, "b").exp()))
        values.append(value + cannot_follow)
    sizes = alignment.teacher_tokens.tolist()
    ends = list(itertools.accumulate(sizes))
    of_spans = [sum(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    own = rollout.behavior_logprobs.astype("f8")
    ends = list(itertools.accumulate(alignment.student_tokens.tolist()))
    of_own = [own[a:b].sum() for a, b in itertools.pairwise([0, *ends])]
    assert of_spans == pytest.approx(of_own, abs=1e-5)


def scored_by_letter(rollout: Rollout, teacher: Tensor) -> ScoredRollout:
    text = rollout.rollout_id
    values = [float(logprob(teacher, text[:i], text[i])) for i in range(len(text))]
    return ScoredRollout(
        rollout=rollout, score=TeacherScore(teacher_id="t", logprobs=np.array(values))
    )


def expected_gradient(
    length: int,
    config: SampledReverseKL,
    *,
    in_pairs: bool,
    sampler: Tensor = STUDENT,
    student: Tensor = STUDENT,
    teacher: Tensor = TEACHER,
) -> Tensor:
    """The gradient's exact expectation over all responses of a length, without its denominator."""
    total = torch.zeros_like(student)
    for letters in itertools.product(LETTERS, repeat=length):
        text = "".join(letters)
        rollout = sampled_by(sampler, text)
        score = scored_in_pairs if in_pairs else scored_by_letter
        head = student.clone().requires_grad_()
        batch = Batch.uniform([score(rollout, teacher)])
        objective = build_objective(config, teacher_head_VD=None, chunk_tokens=7)
        (micro,) = micro_batches(batch, 1000)
        hidden = torch.zeros(*micro.input_BT.shape, len(PREFIXES))
        for r in range(length):
            place = int(micro.loss_index_N[r])
            hidden[0, place, PREFIXES.index(text[:r])] = 1
        objective.terms(micro, hidden, head, batch.denominator).loss.backward()
        assert head.grad is not None
        probability = float(logprob(sampler, "", text).exp())
        total += probability * length * head.grad
    return total[[ord(letter) for letter in LETTERS]]


def exact_gradient(length: int, size: int, student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of KL(student || teacher) over stretches of ``size`` letters, at the stretches'
    beginnings that the student visits."""
    logits = student.clone().requires_grad_()
    total = torch.zeros(())
    for first in range(0, length, size):
        for before in map("".join, itertools.product(LETTERS, repeat=first)):
            visited = logprob(logits, "", before).exp().detach() if before else torch.ones(())
            for text in map("".join, itertools.product(LETTERS, repeat=size)):
                own = logprob(logits, before, text)
                gap = own - logprob(teacher, before, text)
                total = total + visited * own.exp() * gap
    total.backward()
    assert logits.grad is not None
    return logits.grad[[ord(letter) for letter in LETTERS]]


FREE = SampledReverseKL(kind="sampled_reverse_kl", advantage_clip=None, ratio_cap=1e6)


def test_the_expected_gradient_is_that_of_the_kl_over_spans() -> None:
    found = expected_gradient(4, FREE, in_pairs=True)
    torch.testing.assert_close(found, exact_gradient(4, 2, STUDENT, TEACHER), rtol=1e-4, atol=1e-5)
    by_letter = exact_gradient(4, 1, STUDENT, TEACHER)
    assert (found - by_letter).abs().max() > 1e-2  # what a span's later letters owe to its first


def test_samples_of_another_student_are_corrected_by_the_ratio_of_the_span() -> None:
    """States are those that the sampler visits, so only the first span's gradient compares."""
    found = expected_gradient(2, FREE, in_pairs=True, sampler=SAMPLER)
    torch.testing.assert_close(found, exact_gradient(2, 2, STUDENT, TEACHER), rtol=1e-4, atol=1e-5)


def test_it_is_the_same_tokenizers_gradient_with_credit_within_the_span() -> None:
    credit = FREE.model_copy(update={"discount": 1.0})
    pairs, letters = (
        expected_gradient(2, c, in_pairs=p) for c, p in ((FREE, True), (credit, False))
    )
    torch.testing.assert_close(pairs, letters, rtol=1e-4, atol=1e-5)


def test_it_is_the_same_tokenizers_gradient_where_the_first_letter_does_not_matter_later() -> None:
    """With the same KL after every first letter, there is nothing to be credited."""
    student, teacher = STUDENT.clone(), TEACHER.clone()
    for logits in (student, teacher):
        for prefix in PREFIXES:
            logits[:, PREFIXES.index(prefix)] = logits[:, PREFIXES.index("a" * len(prefix))]
    pairs, letters = (
        expected_gradient(2, FREE, in_pairs=p, sampler=student, student=student, teacher=teacher)
        for p in (True, False)
    )
    torch.testing.assert_close(pairs, letters, rtol=1e-4, atol=1e-5)
    assert pairs.abs().max() > 0.05


def test_a_student_that_equals_the_teacher_has_no_gradient_in_any_sample() -> None:
    for text in map("".join, itertools.product(LETTERS, repeat=4)):
        item = scored_in_pairs(sampled_by(STUDENT, text), STUDENT)
        own = item.rollout.behavior_logprobs.astype("f8").reshape(2, 2).sum(axis=1)
        assert item.score.logprobs.tolist() == pytest.approx(own.tolist(), abs=1e-5)
    assert expected_gradient(4, FREE, in_pairs=True, teacher=STUDENT).abs().max() < 1e-5
