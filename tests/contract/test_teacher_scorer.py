"""The contract of `TeacherScorer`, and the handshake that comes before the first score."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedModel

from qwen3_distill.errors import AlignmentError, ConfigError, DataError, HandshakeError
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.handshake import check_compatible
from qwen3_distill.scoring.repeatability import check_repeatable
from qwen3_distill.types import (
    GivenCandidatesRequest,
    HiddenRequest,
    HiddenScore,
    IntArray,
    ModelIdentity,
    Rollout,
    SampledRequest,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TeacherScore,
    TokenSpan,
    TopKRequest,
    TopKScore,
)
from tests.contract.adapters import TEACHERS, TeacherAdapter
from tests.contract.builders import (
    close_started,
    jobs_of,
    make_prompt,
    run,
    scores_of,
    started,
    synthetic_rollout,
)
from tests.contract.reference import (
    head_of,
    largest_gap,
    reference_model,
    reference_score,
    response_logprobs,
    token_logprobs,
)
from tests.tiny_models import CONTEXT_LENGTH, VOCAB_SIZE, TinyModels, byte_tokenizer, write_model

FAR_NATS = 0.5

K = 5
REQUESTS = {
    "sampled": SampledRequest(),
    "top_k": TopKRequest(k=K),
    "hidden": HiddenRequest(),
}


@pytest.fixture(scope="module", autouse=True)
def _started_teachers_are_closed() -> Iterator[None]:
    yield
    close_started()


@pytest.fixture(scope="module", params=TEACHERS)
def adapter(request: pytest.FixtureRequest) -> TeacherAdapter:
    return request.param


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels) -> PreTrainedModel:
    return reference_model(tiny_models.teacher)


@pytest.fixture(scope="module")
def teacher(adapter: TeacherAdapter, tiny_models: TinyModels) -> TeacherScorer:
    return started(adapter.build(tiny_models.teacher))


@pytest.fixture(scope="module")
def far_nats(adapter: TeacherAdapter) -> float:
    """What a fault must exceed to be told from this teacher's rounding."""
    return max(FAR_NATS, adapter.parity_nats)


RAGGED = [
    synthetic_rollout(prompt_tokens, response_tokens, seed)
    for seed, (prompt_tokens, response_tokens) in enumerate(
        [(1, 1), (30, 1), (1, 40), (7, 12), (64, 3), (20, CONTEXT_LENGTH - 20), (5, 12), (2, 2)]
    )
]


# --- Scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollout", RAGGED, ids=lambda rollout: rollout.rollout_id)
def test_logprobs_of_one_rollout_are_the_teachers(
    adapter: TeacherAdapter, teacher: TeacherScorer, reference: PreTrainedModel, rollout: Rollout
) -> None:
    (score,) = scores_of(teacher, [rollout])
    gap = largest_gap(score.logprobs, token_logprobs(reference, rollout))
    assert gap < adapter.parity_nats


@pytest.mark.parametrize("request_kind", REQUESTS.values(), ids=REQUESTS.keys())
@pytest.mark.parametrize(("batch_tokens", "chunk_tokens"), [(1, 1), (300, 7), (100_000, 100_000)])
def test_scores_are_the_teachers_at_any_batch_and_chunk_size(
    adapter: TeacherAdapter,
    tiny_models: TinyModels,
    reference: PreTrainedModel,
    request_kind: ScoreRequest,
    batch_tokens: int,
    chunk_tokens: int,
) -> None:
    build, model_dir = adapter.build, tiny_models.teacher
    if isinstance(request_kind, HiddenRequest) and not adapter.gives_hidden_states:
        assert_hidden_states_are_refused(adapter, model_dir)
        return
    plain_scores = scores_of(started(build(model_dir, request_kind)), RAGGED)
    sized = build(model_dir, request_kind, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens)
    scored = zip(RAGGED, scores_of(started(sized), RAGGED), plain_scores, strict=True)
    for rollout, score, same in scored:
        assert largest_gap(score.logprobs, same.logprobs) < adapter.repeat_nats
        expected = reference_score(reference, rollout, request_kind)
        assert_same_score(score, expected, tolerance=adapter.parity_nats)
        if isinstance(score, TopKScore):
            assert_likeliest(score, reference, rollout, tolerance=adapter.parity_nats)


def assert_hidden_states_are_refused(adapter: TeacherAdapter, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="hidden states"):
        adapter.build(model_dir, HiddenRequest())


def assert_same_score(score: TeacherScore, expected: TeacherScore, *, tolerance: float) -> None:
    """Equal up to rounding, in everything that the kind of score holds."""
    assert type(score) is type(expected)
    assert largest_gap(score.logprobs, expected.logprobs) < tolerance
    if isinstance(score, TopKScore) and isinstance(expected, TopKScore):
        assert largest_gap(score.candidate_logprobs, expected.candidate_logprobs) < tolerance
    if isinstance(score, HiddenScore) and isinstance(expected, HiddenScore):
        assert largest_gap(score.hidden, expected.hidden) < tolerance


def assert_likeliest(
    score: TopKScore, reference: PreTrainedModel, rollout: Rollout, *, tolerance: float
) -> None:
    """The candidates' logprobs are those of the very tokens that are named.

    With the k largest values right too, which `assert_same_score` checks, they are the likeliest
    ones, up to tokens that the rounding does not tell apart.
    """
    with torch.no_grad():
        logprobs_RV = response_logprobs(reference, rollout).numpy()
    named = np.take_along_axis(logprobs_RV, score.candidate_ids, axis=1)
    assert largest_gap(score.candidate_logprobs, named) < tolerance


def test_scores_come_in_the_order_of_the_rollouts(
    adapter: TeacherAdapter, teacher: TeacherScorer
) -> None:
    forward = scores_of(teacher, RAGGED)
    backward = scores_of(teacher, RAGGED[::-1])
    for one, other in zip(forward, backward[::-1], strict=True):
        assert largest_gap(one.logprobs, other.logprobs) < adapter.repeat_nats


def test_hidden_states_and_the_head_give_the_whole_distribution(
    adapter: TeacherAdapter, tiny_models: TinyModels, reference: PreTrainedModel
) -> None:
    if not adapter.gives_hidden_states:
        assert_hidden_states_are_refused(adapter, tiny_models.teacher)
        return
    head_VD = head_of(reference).weight.detach()
    for rollout, score in score_all(adapter, tiny_models.teacher, HiddenRequest()):
        assert isinstance(score, HiddenScore)
        rebuilt_RV = torch.log_softmax(torch.tensor(score.hidden) @ head_VD.T, dim=-1)
        with torch.no_grad():
            expected_RV = response_logprobs(reference, rollout)
        assert largest_gap(rebuilt_RV.numpy(), expected_RV.numpy()) < adapter.parity_nats


def test_candidates_are_of_the_full_distribution(
    adapter: TeacherAdapter, tiny_models: TinyModels
) -> None:
    for _, score in score_all(adapter, tiny_models.teacher, TopKRequest(k=K)):
        assert isinstance(score, TopKScore)
        assert score.candidate_ids.shape == (score.logprobs.size, K)
        assert (np.diff(score.candidate_logprobs) <= 0).all()
        assert (np.exp(score.candidate_logprobs).sum(axis=1) < 0.999).all()


def test_given_candidates_get_the_teachers_logprobs(
    adapter: TeacherAdapter, tiny_models: TinyModels, reference: PreTrainedModel
) -> None:
    if not adapter.scores_given_candidates:
        with pytest.raises(ConfigError, match="given tokens"):
            adapter.build(tiny_models.teacher, GivenCandidatesRequest(k=K))
        return
    rng = np.random.default_rng(0)
    rollouts = [
        replace(
            rollout,
            candidate_ids=np.stack(
                [rng.permutation(VOCAB_SIZE)[:K] for _ in range(rollout.num_tokens)]
            ),
        )
        for rollout in RAGGED
    ]
    request = GivenCandidatesRequest(k=K)
    teacher = started(adapter.build(tiny_models.teacher, request, batch_tokens=300, chunk_tokens=7))
    for rollout, score in zip(rollouts, scores_of(teacher, rollouts), strict=True):
        assert isinstance(score, TopKScore)
        assert rollout.candidate_ids is not None
        assert np.array_equal(score.candidate_ids, rollout.candidate_ids)
        expected = reference_score(reference, rollout, request)
        assert_same_score(score, expected, tolerance=adapter.parity_nats)


def test_jobs_without_the_candidates_asked_for_are_refused(
    adapter: TeacherAdapter, tiny_models: TinyModels
) -> None:
    if not adapter.scores_given_candidates:
        return
    teacher = started(adapter.build(tiny_models.teacher, GivenCandidatesRequest(k=K)))
    with pytest.raises(AlignmentError, match="candidates a token, expected 5"):
        scores_of(teacher, RAGGED)


def score_all(
    adapter: TeacherAdapter, model_dir: Path, request_kind: ScoreRequest
) -> list[tuple[Rollout, TeacherScore]]:
    scores = scores_of(started(adapter.build(model_dir, request_kind)), RAGGED)
    return list(zip(RAGGED, scores, strict=True))


def test_a_sequence_beyond_the_teachers_context_is_refused(teacher: TeacherScorer) -> None:
    too_long = synthetic_rollout(20, CONTEXT_LENGTH - 19, seed=0)
    with pytest.raises(DataError, match=f"the teacher's context of {CONTEXT_LENGTH}"):
        scores_of(teacher, [too_long])


def test_more_candidates_than_tokens_are_refused(
    adapter: TeacherAdapter, tiny_models: TinyModels
) -> None:
    with pytest.raises(ConfigError, match="lower k"):
        adapter.build(tiny_models.teacher, TopKRequest(k=1000))


def test_no_rollouts_give_no_scores(teacher: TeacherScorer) -> None:
    assert scores_of(teacher, []) == []


def test_the_sampling_temperature_does_not_touch_the_score(
    adapter: TeacherAdapter, teacher: TeacherScorer
) -> None:
    rollout = RAGGED[3]
    hot = replace(rollout, sampling=replace(rollout.sampling, temperature=3.0, top_k=2))
    plain_score, hot_score = scores_of(teacher, [rollout, hot])
    assert largest_gap(plain_score.logprobs, hot_score.logprobs) < adapter.repeat_nats


# --- Several spans ------------------------------------------------------------------------------


@st.composite
def jobs_with_spans(draw: st.DrawFn) -> ScoringJob:
    """Up to 40 tokens, any of which but the first is scored or not."""
    ids = draw(st.lists(st.integers(0, 255), min_size=2, max_size=40))
    scored = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1).filter(any))
    edges = np.flatnonzero(np.diff(np.array([False, *scored, False]).astype(int))) + 1
    spans = [TokenSpan(start=int(a), stop=int(b)) for a, b in edges.reshape(-1, 2)]
    return ScoringJob(rollout_id="several", token_ids=np.array(ids), scored=tuple(spans))


@pytest.mark.parametrize("request_kind", REQUESTS.values(), ids=REQUESTS.keys())
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(jobs=st.lists(jobs_with_spans(), min_size=1, max_size=4))
def test_scores_of_several_spans_are_those_of_the_same_places_in_one(
    adapter: TeacherAdapter,
    tiny_models: TinyModels,
    request_kind: ScoreRequest,
    jobs: list[ScoringJob],
) -> None:
    if isinstance(request_kind, HiddenRequest) and not adapter.gives_hidden_states:
        assert_hidden_states_are_refused(adapter, tiny_models.teacher)
        return
    key = (id(adapter), request_kind)
    if key not in SPAN_TEACHERS:
        SPAN_TEACHERS[key] = started(adapter.build(tiny_models.teacher, request_kind))
    whole = [
        replace(job, scored=(TokenSpan(start=1, stop=int(job.token_ids.size)),)) for job in jobs
    ]
    some_scores, whole_scores = (run(SPAN_TEACHERS[key].score(asked)) for asked in (jobs, whole))
    for job, some, one in zip(jobs, some_scores, whole_scores, strict=True):
        assert isinstance(some, TeacherScore)
        assert isinstance(one, TeacherScore)
        assert some.logprobs.size == job.num_scored  # and no value for any other token
        expected = at_places(one, job.scored_indices - 1)
        assert_same_score(some, expected, tolerance=adapter.repeat_nats)


SPAN_TEACHERS: dict[tuple[int, ScoreRequest], TeacherScorer] = {}
"""Started once for all examples; closed with the others."""


def at_places(score: TeacherScore, places: IntArray) -> TeacherScore:
    """The score of some of the tokens."""
    columns: dict[str, Any] = {"logprobs": score.logprobs[places]}
    if isinstance(score, TopKScore):
        columns["candidate_ids"] = score.candidate_ids[places]
        columns["candidate_logprobs"] = score.candidate_logprobs[places]
    if isinstance(score, HiddenScore):
        columns["hidden"] = score.hidden[places]
    return replace(score, **columns)


def test_a_score_is_of_the_spans_and_no_other_places(
    adapter: TeacherAdapter, teacher: TeacherScorer, reference: PreTrainedModel, far_nats: float
) -> None:
    """A negative control of the property above: a value of another place would show."""
    (job,) = jobs_of([RAGGED[5]])
    first = job.scored[0].start
    spans = (TokenSpan(start=first, stop=first + 20), TokenSpan(start=first + 40, stop=first + 60))
    (score,) = run(teacher.score([replace(job, scored=spans)]))
    assert isinstance(score, TeacherScore)
    expected = token_logprobs(reference, RAGGED[5])
    assert largest_gap(score.logprobs, np.r_[expected[:20], expected[40:60]]) < adapter.parity_nats
    assert largest_gap(score.logprobs, expected[:40]) > far_nats
    assert largest_gap(score.logprobs, np.r_[expected[:20], expected[41:61]]) > far_nats


# --- Negative controls: what the tolerance tells apart ------------------------------------------


def test_a_shift_by_one_token_would_fail_the_parity_check(
    adapter: TeacherAdapter, teacher: TeacherScorer, reference: PreTrainedModel, far_nats: float
) -> None:
    for rollout, score in zip(RAGGED, scores_of(teacher, RAGGED), strict=True):
        if rollout.num_tokens >= adapter.tokens_that_show_a_fault:
            shifted = np.roll(token_logprobs(reference, rollout), 1)
            assert largest_gap(score.logprobs, shifted) > far_nats


def test_a_response_scored_without_its_prompt_would_fail_the_parity_check(
    teacher: TeacherScorer, reference: PreTrainedModel, far_nats: float
) -> None:
    rollout = RAGGED[3]
    (score,) = scores_of(teacher, [rollout])
    foreign = replace(rollout, prompt=make_prompt(rollout.prompt.token_ids.size, seed=99))
    assert largest_gap(score.logprobs, token_logprobs(reference, foreign)) > far_nats


def test_another_teacher_would_fail_the_parity_check(
    adapter: TeacherAdapter, teacher: TeacherScorer, tiny_models: TinyModels, far_nats: float
) -> None:
    other = reference_model(tiny_models.student)
    for rollout, score in zip(RAGGED, scores_of(teacher, RAGGED), strict=True):
        if rollout.num_tokens >= adapter.tokens_that_show_a_fault:
            assert largest_gap(score.logprobs, token_logprobs(other, rollout)) > far_nats


# --- Who scores ---------------------------------------------------------------------------------


def test_the_teacher_id_names_the_exact_weights(adapter: TeacherAdapter, tmp_path: Path) -> None:
    ids = [
        adapter.build(write_model(tmp_path / str(run_number) / "teacher", seed=seed)).teacher_id
        for run_number, seed in enumerate([0, 0, 1])
    ]
    assert ids[0] == ids[1] != ids[2]


def test_every_score_names_its_teacher(teacher: TeacherScorer) -> None:
    assert {score.teacher_id for score in scores_of(teacher, RAGGED)} == {teacher.teacher_id}


def test_the_identity_is_the_directorys(teacher: TeacherScorer, tiny_models: TinyModels) -> None:
    assert teacher.identity == load_identity(tiny_models.teacher)


def test_close_may_be_called_twice(adapter: TeacherAdapter, tiny_models: TinyModels) -> None:
    closable = started(adapter.build(tiny_models.teacher))
    run(closable.close())
    run(closable.close())


def test_a_start_after_close_begins_anew(
    adapter: TeacherAdapter, teacher: TeacherScorer, tiny_models: TinyModels
) -> None:
    again = started(adapter.build(tiny_models.teacher))
    run(again.close())
    pairs = zip(scores_of(started(again), RAGGED), scores_of(teacher, RAGGED), strict=True)
    for score, expected in pairs:
        assert largest_gap(score.logprobs, expected.logprobs) < adapter.repeat_nats


# --- Handshake ----------------------------------------------------------------------------------


def test_student_and_teacher_of_one_family_are_compatible(tiny_models: TinyModels) -> None:
    check_compatible(load_identity(tiny_models.student), load_identity(tiny_models.teacher))


def other_tokenizer(model_dir: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(model_dir)


def other_chat_template(model_dir: Path) -> None:
    byte_tokenizer(chat_template="{{ messages }}").save_pretrained(model_dir)


def no_chat_template(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    byte_tokenizer(chat_template=None).save_pretrained(model_dir)


def other_vocab_size(model_dir: Path) -> None:
    write_model(model_dir, seed=1, vocab_size=264)


def other_eos(model_dir: Path) -> None:
    write_model(model_dir, seed=1, eos_token_id=[257, 256])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (other_tokenizer, "tokenizer_digest"),
        (other_chat_template, "chat_template_digest"),
        (no_chat_template, "chat_template_digest"),
        (other_vocab_size, "vocab_size"),
        (other_eos, "eos_ids"),
    ],
)
def test_a_teacher_that_differs_is_refused_by_name(
    tiny_models: TinyModels, tmp_path: Path, change: Callable[[Path], None], name: str
) -> None:
    model_dir = write_model(tmp_path / "teacher", seed=1)
    change(model_dir)
    with pytest.raises(HandshakeError) as error:
        check_compatible(load_identity(tiny_models.student), load_identity(model_dir))
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [name]


def test_every_difference_is_named_at_once(tiny_models: TinyModels) -> None:
    student = load_identity(tiny_models.student)
    teacher = replace(student, vocab_size=1, eos_ids=frozenset([1, 2]), name="other")
    with pytest.raises(HandshakeError, match=r"vocab_size: student 260, teacher 1; (.|\n)*eos_ids"):
        check_compatible(student, teacher)


def test_context_lengths_may_differ(tiny_models: TinyModels) -> None:
    student = load_identity(tiny_models.student)
    check_compatible(student, replace(student, context_length=2 * student.context_length))


# --- Repeatability ------------------------------------------------------------------------------


class FakeBatchDependentTeacher:
    """Scores a token by how many rollouts are scored beside it."""

    teacher_id = "fake"
    max_dropped_fraction = 0.0
    starts_first = False
    counters: Mapping[str, float] = MappingProxyType({})

    def __init__(self, identity: ModelIdentity, nats_per_rollout: float) -> None:
        self.identity = identity
        self._nats_per_rollout = nats_per_rollout

    async def memory_taken(self) -> None:
        raise AssertionError("it takes none")

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        value = -self._nats_per_rollout * len(jobs)
        return [
            TeacherScore(teacher_id=self.teacher_id, logprobs=np.full(job.num_scored, value))
            for job in jobs
        ]

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None


def test_a_teacher_that_repeats_itself_passes(
    adapter: TeacherAdapter, teacher: TeacherScorer
) -> None:
    worst = run(check_repeatable(teacher, jobs_of(RAGGED), tolerance_nats=adapter.repeat_nats))
    assert 0 <= worst < adapter.repeat_nats


def test_a_batch_dependent_teacher_fails(teacher: TeacherScorer) -> None:
    fake = FakeBatchDependentTeacher(teacher.identity, nats_per_rollout=0.01)
    with pytest.raises(HandshakeError, match=r"fake: .* differ by 0.0200 nats, more than 0.01"):
        run(check_repeatable(fake, jobs_of(RAGGED[:3]), tolerance_nats=0.01))
    assert run(check_repeatable(fake, jobs_of(RAGGED[:3]), tolerance_nats=0.03)) == pytest.approx(
        0.02
    )
