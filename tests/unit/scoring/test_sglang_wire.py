"""Requests to and replies of a scoring server: which replies give scores, and which faults."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.scoring.sglang.wire import (
    Fault,
    FaultKind,
    ReplyError,
    answer_body,
    read_answer,
    read_scores,
    score_body,
    score_reply_limit,
)
from qwen3_distill.types import (
    SampledRequest,
    ScoringJob,
    TeacherScore,
    TokenSpan,
    TopKRequest,
    TopKScore,
    WeightVersion,
)
from tests.contract.builders import (
    jobs_of,
    make_prompt,
    make_request,
    make_spec,
    synthetic_rollout,
)
from tests.sglang_stand_in import StandIn
from tests.tiny_models import TinyModels

VOCAB = 10
SAMPLED = SampledRequest()
TOP_2 = TopKRequest(k=2)


def job_of(ids: list[int], *spans: tuple[int, int]) -> ScoringJob:
    scored = tuple(TokenSpan(start=start, stop=stop) for start, stop in spans)
    return ScoringJob(rollout_id="r", token_ids=np.array(ids), scored=scored)


JOB = job_of([3, 1, 4, 1, 5], (2, 5))
ROWS: list[list[Any]] = [[None, 1, None], [-0.5, 4, None], [-1.5, 1, None], [-2.5, 5, None]]
TOP: list[Any] = [
    None,
    [[-0.5, 4, None], [-1.0, 2, None]],
    [[-0.25, 7, None], [-1.5, 1, None]],
    [[-0.75, 0, None], [-1.25, 9, None]],
]


def entry(rows: Any = ROWS, top: Any = None, **meta: Any) -> dict[str, Any]:
    found = {"input_token_logprobs": rows, "finish_reason": {"type": "length"}, **meta}
    return {"meta_info": found if top is None else found | {"input_top_logprobs": top}}


def reply(*entries: Any) -> bytes:
    return json.dumps(list(entries)).encode()


def read(
    raw: bytes, request: Any = SAMPLED, jobs: list[ScoringJob] | None = None
) -> list[TeacherScore | Fault]:
    return read_scores(
        raw,
        [JOB] if jobs is None else jobs,
        request,
        vocab_size=VOCAB,
        teacher_id="t",
    )


def fault_of(raw: bytes, request: Any = SAMPLED) -> FaultKind:
    (outcome,) = read(raw, request)
    assert isinstance(outcome, Fault), outcome
    assert outcome.detail
    return outcome.kind


# --- Requests -----------------------------------------------------------------------------------


def test_a_request_asks_from_the_contexts_last_token_on() -> None:
    rollouts = [synthetic_rollout(3, 2), synthetic_rollout(1, 4)]
    body = json.loads(score_body(jobs_of(rollouts), SAMPLED))
    assert body["logprob_start_len"] == [2, 0]
    assert body["input_ids"] == [[*r.prompt.token_ids, *r.response_ids] for r in rollouts]
    assert body["sampling_params"]["max_new_tokens"] == 0
    assert body["return_logprob"] is True
    assert "top_logprobs_num" not in body
    assert json.loads(score_body([JOB], TOP_2))["top_logprobs_num"] == 2


@pytest.mark.parametrize(
    ("changes", "top_k", "masked"),
    [
        ({}, -1, False),
        ({"top_k": 3}, 3, True),
        ({"top_k": 5000}, 4096, True),
        ({"top_p": 0.9}, 4096, True),
        ({"top_p": 0.9, "top_k": 7}, 7, True),
    ],
)
def test_truncated_sampling_asks_for_the_logprobs_after_it(
    changes: dict[str, Any], top_k: int, masked: bool
) -> None:
    request = make_request("r", make_prompt(3), make_spec(seed=5, **changes))
    body = json.loads(answer_body(request, frozenset([9, 2]), 151936))
    (sampling,) = body["sampling_params"]
    assert sampling["top_k"] == top_k
    assert body.get("return_sampling_mask", False) is masked
    assert sampling["stop_token_ids"] == [2, 9]
    assert sampling["sampling_seed"] == 5


def test_the_top_k_is_no_larger_than_the_vocabulary() -> None:
    request = make_request("r", make_prompt(3), make_spec(top_p=0.5))
    (sampling,) = json.loads(answer_body(request, frozenset([2]), 260))["sampling_params"]
    assert sampling["top_k"] == 260


def test_greedy_sampling_is_not_truncated() -> None:
    request = make_request("r", make_prompt(3), make_spec(temperature=0.0, top_p=0.5, top_k=7))
    body = json.loads(answer_body(request, frozenset([2]), 260))
    (sampling,) = body["sampling_params"]
    assert (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (0.0, 1.0, -1)
    assert "return_sampling_mask" not in body


# --- Scores -------------------------------------------------------------------------------------


def test_a_healthy_reply_is_read_without_its_null() -> None:
    (score,) = read(reply(entry()))
    assert isinstance(score, TeacherScore)
    assert score.teacher_id == "t"
    assert score.logprobs.tolist() == [-0.5, -1.5, -2.5]


def test_sequences_keep_their_order() -> None:
    other = job_of([2, 6], (1, 2))
    rows = [[None, 2, None], [-3.0, 6, None]]
    scores = read(reply(entry(), entry(rows)), jobs=[JOB, other])
    lengths = [s.logprobs.size for s in scores if isinstance(s, TeacherScore)]
    assert lengths == [3, 1]


def test_candidates_are_read_with_the_scores() -> None:
    (score,) = read(reply(entry(top=TOP)), TOP_2)
    assert isinstance(score, TopKScore)
    assert score.candidate_ids.tolist() == [[4, 2], [7, 1], [0, 9]]
    assert score.candidate_logprobs.tolist() == [[-0.5, -1.0], [-0.25, -1.5], [-0.75, -1.25]]


def test_the_vocabularys_last_id_may_come_back_as_0() -> None:
    job = job_of([9, 9, 4], (1, 3))
    rows = [[None, 0, None], [-1.0, 0, None], [-1.0, 4, None]]
    (score,) = read(reply(entry(rows)), jobs=[job])
    assert isinstance(score, TeacherScore)
    rows[2][1] = 0  # but no other id
    (outcome,) = read(reply(entry(rows)), jobs=[job])
    assert isinstance(outcome, Fault)
    assert outcome.kind is FaultKind.MISALIGNED


def replaced(place: int, column: int, value: Any) -> list[list[Any]]:
    rows = [list(row) for row in ROWS]
    rows[place][column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (replaced(2, 0, None), FaultKind.MISSING),
        (replaced(2, 0, math.nan), FaultKind.MISSING),
        (replaced(3, 0, -math.inf), FaultKind.MISSING),
        (replaced(1, 0, -1e39), FaultKind.MISSING),  # infinite as float32
        (replaced(1, 0, 0.01), FaultKind.POSITIVE),
        (replaced(0, 0, -0.5), FaultKind.MISALIGNED),
        (replaced(2, 1, 2), FaultKind.MISALIGNED),
        (ROWS[:-1], FaultKind.LENGTH),
        (ROWS[1:], FaultKind.LENGTH),
        ([*ROWS, [-1.0, 2, None]], FaultKind.LENGTH),
        ([], FaultKind.LENGTH),
        ([ROWS[0], *ROWS[2:], ROWS[1]], FaultKind.MISALIGNED),
        (replaced(2, 0, "-0.5x"), FaultKind.GARBAGE),
        (replaced(2, 1, "x"), FaultKind.GARBAGE),
        ([None, None, None, None], FaultKind.GARBAGE),
        (None, FaultKind.GARBAGE),
        ([[None], [-1.0], [-1.0], [-1.0]], FaultKind.GARBAGE),
    ],
)
def test_a_bad_sequence_is_a_fault(rows: Any, kind: FaultKind) -> None:
    assert fault_of(reply(entry(rows))) is kind


@pytest.mark.parametrize(
    "value", [False, True, "-0.5", [-0.5], {"-0.5": 1}, {}, [], "", "nan", [[-0.5]]]
)
def test_a_logprob_of_another_type_is_a_fault(value: Any) -> None:
    assert fault_of(reply(entry(replaced(2, 0, value)))) is FaultKind.GARBAGE
    everywhere = [ROWS[0], *([value, row[1], None] for row in ROWS[1:])]
    assert fault_of(reply(entry(everywhere))) is FaultKind.GARBAGE
    assert fault_of(reply(entry(top=changed(2, [[value, 7, None], TOP[2][1]]))), TOP_2) is (
        FaultKind.GARBAGE
    )
    with pytest.raises(ReplyError):
        read_three(answer([1, 2, 3], [-1.0, value, -1.0]))
    truncated = [-1.0, value, -1.0]
    with pytest.raises(ReplyError):
        read_three(answer([1, 2, 3], output_token_sampling_logprobs=truncated), top_k=5)


@pytest.mark.parametrize("token", [1.0, 1.7, "1", True, [1], None, {"1": 1}, -1, VOCAB, 2**70])
def test_an_id_of_another_type_or_vocabulary_is_a_fault(token: Any) -> None:
    assert isinstance(read(reply(entry(replaced(2, 1, token))))[0], Fault)
    assert isinstance(
        read(reply(entry(top=changed(2, [[-0.25, token, None], TOP[2][1]]))), TOP_2)[0], Fault
    )
    with pytest.raises(ReplyError):
        read_three(answer([token, 2, 3]))


@pytest.mark.parametrize(
    "row", [[-1.5, 1], [-1.5, 1, None, None], {"-1.5": 1, "1": 1, "a": 1}, "abc", [-1.5, 1, 3], 3]
)
def test_a_row_of_another_form_is_a_fault(row: Any) -> None:
    rows = [*ROWS[:2], row, ROWS[3]]
    assert fault_of(reply(entry(rows))) is FaultKind.GARBAGE


@pytest.mark.parametrize("value", [-(10**400), 10**400, -1e39, -(10**39)])
def test_a_number_beyond_float32_is_missing(value: Any) -> None:
    assert fault_of(reply(entry(replaced(2, 0, value)))) is FaultKind.MISSING


@pytest.mark.parametrize("reason", [[], "abort", 3, {}, {"type": ["abort"]}, {"type": "other"}])
def test_an_end_of_another_form_is_a_fault(reason: Any) -> None:
    assert fault_of(reply(entry(finish_reason=reason))) is FaultKind.GARBAGE


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        reply(entry()).decode().encode("utf-16"),
        reply(entry()).decode().encode("utf-8-sig"),
        b"[" + b"9" * 5000 + b"]",
    ],
)
def test_nesting_and_charsets_are_faults(raw: bytes) -> None:
    with pytest.raises(ReplyError) as error:
        read(raw)
    assert error.value.fault.kind in (FaultKind.GARBAGE, FaultKind.COUNT) or raw[1:2] == b"9"


def test_a_faults_words_are_one_printable_line() -> None:
    message = "\x1b[2Jtitle\x07\n" + "y" * 5000
    (outcome,) = read(reply(entry(finish_reason={"type": "abort", "message": message})))
    assert isinstance(outcome, Fault)
    assert outcome.detail.isprintable()
    assert len(outcome.detail) < 700


@pytest.mark.parametrize("request_", [SAMPLED, TOP_2, TopKRequest(k=9)])
def test_the_largest_reply_is_within_its_limit(request_: Any) -> None:
    value = -1.2345678901234567e-100
    ids = list(range(VOCAB)) * 400
    job = job_of(ids, (1, len(ids)))
    k = getattr(request_, "k", 0)
    rows = [[value, 151_935, None] for _ in ids]
    raw = json.dumps([entry(rows, [[row] * k for row in rows])] * 2, indent=None).encode()
    assert score_reply_limit([job, job], request_) > len(raw)
    assert score_reply_limit([job, job], request_) < 4 * len(raw) + (128 << 10)


def test_a_logprob_may_lie_above_0_by_rounding() -> None:
    (score,) = read(reply(entry(replaced(1, 0, 0.0005))))
    assert isinstance(score, TeacherScore)


def changed(place: int, row: Any) -> list[Any]:
    top = [list(r) if r is not None else None for r in TOP]
    top[place] = row
    return top


@pytest.mark.parametrize(
    ("top", "kind"),
    [
        (changed(1, None), FaultKind.MISSING),
        (changed(0, TOP[1]), FaultKind.MISALIGNED),
        (TOP[:-1], FaultKind.LENGTH),
        (changed(1, [[-0.5, 4, None]]), FaultKind.CANDIDATES),
        (changed(3, [[-0.5, 0, None], [-0.5, 0, None]]), FaultKind.CANDIDATES),
        (changed(3, [[-0.75, 10, None], [-1.0, 2, None]]), FaultKind.CANDIDATES),
        (changed(3, [[-0.75, -1, None], [-1.0, 2, None]]), FaultKind.CANDIDATES),
        (changed(3, [[-1.0, 2, None], [-0.75, 3, None]]), FaultKind.CANDIDATES),
        (changed(3, [[-0.5, 0, None], [None, 2, None]]), FaultKind.MISSING),
        (changed(3, [[0.5, 0, None], [-1.0, 2, None]]), FaultKind.POSITIVE),
        # The sampled token has another logprob there, or would be a candidate itself.
        (changed(1, [[-0.3, 4, None], [-1.0, 2, None]]), FaultKind.MISALIGNED),
        (changed(3, [[-3.0, 0, None], [-3.5, 2, None]]), FaultKind.MISALIGNED),
        (None, FaultKind.GARBAGE),
    ],
)
def test_bad_candidates_are_a_fault(top: Any, kind: FaultKind) -> None:
    assert fault_of(reply(entry(top=top)), TOP_2) is kind


def test_a_sequence_given_up_by_the_server_is_a_fault() -> None:
    aborted = entry(finish_reason={"type": "abort", "message": "made up"})
    assert fault_of(reply(aborted)) is FaultKind.ABORTED


@pytest.mark.parametrize("broken", [{}, {"meta_info": {}}, None, 3, "x", []])
def test_an_entry_of_another_form_is_a_fault(broken: Any) -> None:
    assert fault_of(reply(broken)) is FaultKind.GARBAGE


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", FaultKind.GARBAGE),
        (b"[{", FaultKind.GARBAGE),
        (b"\xff\xfe", FaultKind.GARBAGE),
        (b'{"error": 1}', FaultKind.GARBAGE),
        (reply(), FaultKind.COUNT),
        (reply(entry(), entry()), FaultKind.COUNT),
    ],
)
def test_a_reply_that_matches_no_request_is_refused(raw: bytes, kind: FaultKind) -> None:
    with pytest.raises(ReplyError) as error:
        read(raw)
    assert error.value.fault.kind is kind


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(st.lists(st.tuples(st.none() | st.floats(), st.integers(-2, 12)), max_size=6))
def test_no_rows_become_a_score_unless_they_are_one(rows: list[tuple[float | None, int]]) -> None:
    (outcome,) = read(reply(entry([[value, token, None] for value, token in rows])))
    is_score = (
        [token for _, token in rows] == [1, 4, 1, 5]
        and rows[0][0] is None
        and all(v is not None and -3e38 < v <= 1e-3 for v, _ in rows[1:])
    )
    assert isinstance(outcome, TeacherScore) == is_score


@given(JSON)
def test_no_other_json_becomes_a_score_or_a_crash(value: Any) -> None:
    (outcome,) = read(reply(entry(value)))
    assert isinstance(outcome, Fault)
    (outcome,) = read(reply(value))
    assert isinstance(outcome, Fault)
    (outcome,) = read(reply(entry(top=value if value is not None else [])), TOP_2)
    assert isinstance(outcome, Fault)


# --- Several spans ------------------------------------------------------------------------------


@st.composite
def spans_within(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Spans of a job of ``size`` tokens: in order, with gaps, the first from 1 on."""
    scored = draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1).filter(any))
    edges = np.flatnonzero(np.diff(np.array([False, *scored, False]).astype(int))) + 1
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


@st.composite
def jobs_with_spans(draw: st.DrawFn) -> ScoringJob:
    ids = draw(st.lists(st.integers(0, 259), min_size=2, max_size=24))
    return job_of(ids, *draw(spans_within(len(ids))))


@pytest.fixture(scope="module")
def stand_in(tiny_models: TinyModels) -> StandIn:
    return StandIn(tiny_models.teacher)


@settings(deadline=None)
@given(job=jobs_with_spans(), kind=st.sampled_from([SAMPLED, TOP_2]))
def test_scores_of_several_spans_are_those_of_the_same_places_in_one(
    stand_in: StandIn, job: ScoringJob, kind: SampledRequest | TopKRequest
) -> None:
    def ask(asked: ScoringJob) -> TeacherScore:
        status, answers = stand_in.answer({}, score_body([asked], kind))
        assert status == 200
        (score,) = read_scores(
            json.dumps(answers).encode(), [asked], kind, vocab_size=260, teacher_id="t"
        )
        assert isinstance(score, TeacherScore), score
        return score

    some, whole = ask(job), ask(job_of(job.token_ids.tolist(), (1, job.token_ids.size)))
    places = job.scored_indices - 1
    assert some.logprobs.size == job.num_scored  # and no value for any other token
    assert np.array_equal(some.logprobs, whole.logprobs[places])
    if isinstance(some, TopKScore) and isinstance(whole, TopKScore):
        assert np.array_equal(some.candidate_ids, whole.candidate_ids[places])
        assert np.array_equal(some.candidate_logprobs, whole.candidate_logprobs[places])
    assert isinstance(some, TopKScore) == isinstance(kind, TopKRequest)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (ROWS, None),
        (replaced(2, 1, 2), FaultKind.MISALIGNED),
        (replaced(2, 0, None), FaultKind.MISSING),
        (replaced(2, 0, 0.01), FaultKind.POSITIVE),
    ],
)
def test_a_token_between_two_spans_is_checked_and_has_no_score(
    rows: Any, kind: FaultKind | None
) -> None:
    (outcome,) = read(reply(entry(rows)), jobs=[job_of([3, 1, 4, 1, 5], (2, 3), (4, 5))])
    if isinstance(outcome, Fault):
        assert outcome.kind is kind
    else:
        assert kind is None
        assert outcome.logprobs.tolist() == [-0.5, -2.5]


# --- Answers ------------------------------------------------------------------------------------

EOS = frozenset([9])
VERSION = WeightVersion(step=0, digest="d")


def answer(ids: list[int], values: list[float | None] | None = None, **meta: Any) -> bytes:
    pairs = zip([-1.0] * len(ids) if values is None else values, ids, strict=True)
    rows = [[value, token, None] for value, token in pairs]
    found = {"output_token_logprobs": rows, "finish_reason": {"type": "stop"}, **meta}
    return reply({"output_ids": ids, "meta_info": found})


def read_three(raw: bytes, **sampling: Any) -> Any:
    spec = make_spec(**({"max_new_tokens": 3} | sampling))
    request = make_request("r", make_prompt(2), spec)
    return read_answer(raw, request, EOS, VERSION, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("ids", "reason"), [([1, 2, 3], "length"), ([1, 9], "stop"), ([1, 2, 9], "stop")]
)
def test_an_answer_becomes_a_rollout(ids: list[int], reason: str) -> None:
    rollout = read_three(answer(ids))
    assert rollout.response_ids.tolist() == ids
    assert rollout.finish_reason.value == reason


def test_logprobs_after_truncation_are_taken_if_it_truncates() -> None:
    raw = answer([1, 2, 3], output_token_sampling_logprobs=[-0.1, -0.2, -0.3])
    assert read_three(raw, top_k=5).behavior_logprobs[1] == pytest.approx(-0.2)
    assert read_three(raw).behavior_logprobs[1] == pytest.approx(-1.0)
    with pytest.raises(ReplyError):
        read_three(answer([1, 2, 3]), top_k=5)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (answer([]), FaultKind.LENGTH),
        (answer([1, 2]), FaultKind.LENGTH),
        (answer([1, 2, 3, 4]), FaultKind.LENGTH),
        (answer([9, 1, 2]), FaultKind.LENGTH),
        (answer([1, 2, 3], [-1.0, None, -1.0]), FaultKind.MISSING),
        (answer([1, 2, 3], finish_reason={"type": "abort"}), FaultKind.ABORTED),
        (
            reply({**json.loads(answer([1, 2, 3]))[0], "output_ids": [1, 2, 4]}),
            FaultKind.MISALIGNED,
        ),
        (reply({"output_ids": [1, 2, 3]}), FaultKind.GARBAGE),
        (reply(), FaultKind.COUNT),
        (reply(None), FaultKind.GARBAGE),
    ],
)
def test_an_incomplete_answer_is_refused(raw: bytes, kind: FaultKind) -> None:
    with pytest.raises(ReplyError) as error:
        read_three(raw)
    assert error.value.fault.kind is kind


def test_greedy_tokens_have_logprob_zero() -> None:
    assert read_three(answer([1, 2, 3]), temperature=0.0).behavior_logprobs.tolist() == [0, 0, 0]
    assert read_three(answer([1, 2, 3])).behavior_logprobs.tolist() == [-1, -1, -1]
