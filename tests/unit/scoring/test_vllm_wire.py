"""Requests to and replies of a vLLM server: which replies give scores, and which faults."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.scoring.served.faults import Fault, FaultKind, ReplyError
from qwen3_distill.scoring.vllm.wire import (
    answer_body,
    answer_reply_limit,
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
from tests.tiny_models import TinyModels
from tests.vllm_stand_in import VllmStandIn

VOCAB = 10
SAMPLED = SampledRequest()
TOP_2 = TopKRequest(k=2)
EOS = frozenset([9])
VERSION = WeightVersion(step=0, digest="d")
IDS = [3, 1, 4, 1, 5]


def job_of(ids: list[int], *spans: tuple[int, int]) -> ScoringJob:
    scored = tuple(TokenSpan(start=start, stop=stop) for start, stop in spans)
    return ScoringJob(rollout_id="r", token_ids=np.array(ids), scored=scored)


JOB = job_of(IDS, (2, 5))


def member(logprob: Any, rank: Any = 1) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": None}


PLACES: list[Any] = [
    None,
    {"1": member(-2.0, 4)},
    {"4": member(-0.5)},
    {"1": member(-1.5, 3)},
    {"5": member(-2.5, 7)},
]
TOP: list[Any] = [
    None,
    {"1": member(-2.0, 4), "2": member(-0.5, 1), "3": member(-0.7, 2)},
    # The token is the first candidate; then the second; then none.
    {"4": member(-0.5, 1), "2": member(-1.0, 2)},
    {"1": member(-1.5, 2), "7": member(-0.25, 1)},
    {"5": member(-2.5, 7), "0": member(-0.75, 1), "9": member(-1.25, 2)},
]


def choice(places: Any = PLACES, **changes: Any) -> dict[str, Any]:
    plain = {"index": 0, "text": "", "finish_reason": "length", "prompt_token_ids": IDS}
    return plain | {"prompt_logprobs": places} | changes


def reply(*choices: Any) -> bytes:
    return json.dumps({"id": "x", "choices": list(choices)}).encode()


def read(
    raw: bytes, request: Any = SAMPLED, jobs: list[ScoringJob] | None = None
) -> list[TeacherScore | Fault]:
    asked = [JOB] if jobs is None else jobs
    return read_scores(raw, asked, request, vocab_size=VOCAB, teacher_id="t")


def fault_of(raw: bytes, request: Any = SAMPLED) -> FaultKind:
    (outcome,) = read(raw, request)
    assert isinstance(outcome, Fault), outcome
    assert outcome.detail
    return outcome.kind


def changed(place: int, value: Any, places: list[Any] = PLACES) -> list[Any]:
    other = copy.deepcopy(places)
    other[place] = value
    return other


# --- Requests -----------------------------------------------------------------------------------


def test_a_request_asks_for_the_prompts_logprobs() -> None:
    rollouts = [synthetic_rollout(3, 2), synthetic_rollout(1, 4)]
    body = json.loads(score_body(jobs_of(rollouts), SAMPLED))
    assert body["prompt"] == [[*r.prompt.token_ids, *r.response_ids] for r in rollouts]
    assert (body["prompt_logprobs"], body["max_tokens"]) == (0, 1)
    assert body["return_token_ids"] is True
    assert body["add_special_tokens"] is False
    assert json.loads(score_body([JOB], TOP_2))["prompt_logprobs"] == 2
    assert body["temperature"] == 1.0
    assert json.loads(score_body([JOB], SAMPLED, temperature=0.3))["temperature"] == 0.3


def test_an_answer_is_sampled_as_asked_whatever_the_servers_defaults_are() -> None:
    spec = make_spec(seed=5, temperature=0.7, top_p=0.9, top_k=5000)
    body = json.loads(answer_body(make_request("r", make_prompt(3), spec), EOS, 260))
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 0.9, 260)
    assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
    assert (body["presence_penalty"], body["frequency_penalty"]) == (0.0, 0.0)
    assert (body["seed"], body["stop_token_ids"], body["ignore_eos"]) == (5, [9], True)
    greedy = make_spec(temperature=0.0, top_p=0.5, top_k=7)
    body = json.loads(answer_body(make_request("r", make_prompt(3), greedy), EOS, 260))
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.0, 1.0, 0)


# --- Scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        (b'"4": {"logprob": -0.5', b'"4": {"logprob": -9.0}, "4": {"logprob": -0.5'),
        (b'"1": {"logprob": -2.0', b'"1": {"logprob": -2.0, "logprob": -3.0'),
    ],
)
def test_a_name_that_stands_twice_is_refused(once: bytes, twice: bytes) -> None:
    """JSON's reader keeps the last value of two equal names, in the place of the first."""
    raw = reply(choice())
    assert raw.count(once) == 1
    with pytest.raises(ReplyError, match="a name stands twice"):
        read(raw.replace(once, twice))


def test_scores_are_those_of_the_spans() -> None:
    (score,) = read(reply(choice()))
    assert isinstance(score, TeacherScore)
    assert score.logprobs.tolist() == [-0.5, -1.5, -2.5]
    (some,) = read(reply(choice()), jobs=[job_of(IDS, (2, 3), (4, 5))])
    assert isinstance(some, TeacherScore)
    assert some.logprobs.tolist() == [-0.5, -2.5]


def test_candidates_are_ordered_by_rank_and_the_token_is_one_only_if_likely() -> None:
    (score,) = read(reply(choice(TOP)), TOP_2)
    assert isinstance(score, TopKScore)
    assert score.logprobs.tolist() == [-0.5, -1.5, -2.5]
    assert score.candidate_ids.tolist() == [[4, 2], [7, 1], [0, 9]]
    assert score.candidate_logprobs.tolist() == [[-0.5, -1.0], [-0.25, -1.5], [-0.75, -1.25]]


def test_a_token_tied_with_the_last_candidate_is_no_candidate() -> None:
    tied = {"5": member(-1.25, 2), "0": member(-0.75, 1), "9": member(-1.25, 2)}
    (score,) = read(reply(choice(changed(4, tied, TOP))), TOP_2)
    assert isinstance(score, TopKScore)
    assert score.candidate_ids[2].tolist() == [0, 9]


@pytest.mark.parametrize(
    ("places", "kind"),
    [
        (PLACES[:-1], FaultKind.LENGTH),
        ([*PLACES, PLACES[1]], FaultKind.LENGTH),
        (changed(0, {"3": member(-1.0)}), FaultKind.MISALIGNED),
        (changed(2, None), FaultKind.MISSING),
        (changed(2, {}), FaultKind.MISSING),
        (changed(2, {"5": member(-0.5)}), FaultKind.MISALIGNED),
        (changed(2, {"04": member(-0.5)}), FaultKind.MISALIGNED),
        (changed(2, {"4": member(None)}), FaultKind.MISSING),
        (changed(2, {"4": member(math.nan)}), FaultKind.MISSING),
        (changed(2, {"4": member(-math.inf)}), FaultKind.MISSING),
        (changed(2, {"4": member(-9999.0)}), FaultKind.MISSING),
        (changed(2, {"4": member(0.01)}), FaultKind.POSITIVE),
        (changed(2, {"4": member("-0.5")}), FaultKind.GARBAGE),
        (changed(2, {"4": member(False)}), FaultKind.GARBAGE),
        (changed(2, {"4": -0.5}), FaultKind.GARBAGE),
        (changed(2, {"4": {"rank": 1}}), FaultKind.GARBAGE),
        (changed(2, [["4", -0.5]]), FaultKind.GARBAGE),
        (changed(2, {"4": member(-0.5), "2": member(-1.0)}), FaultKind.CANDIDATES),
        (None, FaultKind.GARBAGE),
    ],
)
def test_bad_places_are_a_fault(places: Any, kind: FaultKind) -> None:
    assert fault_of(reply(choice(places))) is kind


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ({"5": member(-2.5, 7), "0": member(-0.75, 1)}, FaultKind.CANDIDATES),
        ({"5": member(-2.5, 7)}, FaultKind.CANDIDATES),
        ({"5": member(-2.5, 7), "0": member(-0.7, 1), "9": member(-1.2, 1)}, FaultKind.CANDIDATES),
        ({"5": member(-2.5, 7), "0": member(-0.7, 1), "9": member(-1.2, 3)}, FaultKind.CANDIDATES),
        ({"5": member(-2.5, 7), "0": member(-1.2, 1), "9": member(-0.7, 2)}, FaultKind.CANDIDATES),
        ({"5": member(-2.5, 7), "0": member(-0.7, 1), "10": member(-1, 2)}, FaultKind.CANDIDATES),
        ({"5": member(-2.5, 7), "0": member(-0.7, 1), "-1": member(-1, 2)}, FaultKind.CANDIDATES),
        ({"5": member(-2.5, 7), "0": member(-0.7, 1), "09": member(-1, 2)}, FaultKind.CANDIDATES),
        ({"5": member(-2.5, 7), "0": member(-0.7, 1), "x": member(-1, 2)}, FaultKind.GARBAGE),
        ({"5": member(-2.5, 7), "0": member(-0.7, 1), "9": member(None, 2)}, FaultKind.MISSING),
        ({"5": member(-2.5, 7), "0": member(-0.7, 1), "9": member(-9999.0, 2)}, FaultKind.MISSING),
        ({"5": member(-2.5, 7), "0": member(0.5, 1), "9": member(-1, 2)}, FaultKind.POSITIVE),
        ({"5": member(-2.5, 7), "0": member(-0.7, True), "9": member(-1, 2)}, FaultKind.GARBAGE),
        # The token is likelier than the candidates, or has another logprob as one.
        ({"5": member(-0.5, 7), "0": member(-0.7, 1), "9": member(-1, 2)}, FaultKind.MISALIGNED),
    ],
)
def test_bad_candidates_are_a_fault(place: Any, kind: FaultKind) -> None:
    assert fault_of(reply(choice(changed(4, place, TOP))), TOP_2) is kind


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"index": 1}, FaultKind.MISALIGNED),
        ({"index": False}, FaultKind.GARBAGE),
        ({"finish_reason": "abort"}, FaultKind.ABORTED),
        ({"finish_reason": "error"}, FaultKind.ABORTED),
        ({"finish_reason": None}, FaultKind.GARBAGE),
        ({"prompt_token_ids": None}, FaultKind.GARBAGE),
        ({"prompt_token_ids": IDS[1:]}, FaultKind.LENGTH),
        ({"prompt_token_ids": [3, 2, 4, 1, 5]}, FaultKind.MISALIGNED),
        ({"prompt_token_ids": [3, True, 4, 1, 5]}, FaultKind.GARBAGE),
        ({"prompt_token_ids": [3.0, 1, 4, 1, 5]}, FaultKind.GARBAGE),
    ],
)
def test_an_answer_to_something_else_is_a_fault(changes: dict[str, Any], kind: FaultKind) -> None:
    """Of the context too, which has no logprobs that are read."""
    assert fault_of(reply(choice(**changes))) is kind


def test_a_swapped_answer_is_no_score() -> None:
    other = job_of([3, 2, 4, 1, 5], (2, 5))
    outcomes = read(reply(choice(), choice(index=1)), jobs=[JOB, other])
    assert isinstance(outcomes[0], TeacherScore)
    assert isinstance(outcomes[1], Fault)
    assert outcomes[1].kind is FaultKind.MISALIGNED


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", FaultKind.GARBAGE),
        (b"[{", FaultKind.GARBAGE),
        (b"\xff\xfe", FaultKind.GARBAGE),
        (b'{"error": 1}', FaultKind.GARBAGE),
        (b"[]", FaultKind.GARBAGE),
        (b'{"choices": {}}', FaultKind.GARBAGE),
        (b"[" * 100_000, FaultKind.GARBAGE),
        (reply(), FaultKind.COUNT),
        (reply(choice(), choice()), FaultKind.COUNT),
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
NUMBERS = st.none() | st.booleans() | st.integers(-12_000, 2) | st.floats() | st.text(max_size=2)


@given(st.lists(st.tuples(NUMBERS, st.integers(-2, 12)), max_size=5))
def test_no_places_become_a_score_unless_they_are_one(drawn: list[tuple[Any, int]]) -> None:
    (outcome,) = read(reply(choice([None, *({str(t): member(v)} for v, t in drawn)])))
    is_score = [token for _, token in drawn][1:] == IDS[2:] and all(
        type(v) in (int, float) and -9999 < v <= 1e-3 for v, _ in drawn[1:]
    )
    assert isinstance(outcome, TeacherScore) == is_score
    if isinstance(outcome, TeacherScore):
        assert outcome.logprobs.tolist() == [np.float32(v) for v, _ in drawn[1:]]


@given(JSON)
def test_no_other_json_becomes_a_score_or_a_crash(value: Any) -> None:
    for odd in (choice(value), value, choice(changed(3, value)), choice(index=value or 1)):
        (outcome,) = read(reply(odd))
        assert isinstance(outcome, Fault)
    (outcome,) = read(reply(choice(changed(3, value, TOP))), TOP_2)
    assert isinstance(outcome, Fault)


# --- What a server says, read -------------------------------------------------------------------


@st.composite
def jobs_with_spans(draw: st.DrawFn) -> ScoringJob:
    ids = draw(st.lists(st.integers(0, 259), min_size=2, max_size=24))
    scored = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1).filter(any))
    edges = np.flatnonzero(np.diff(np.array([False, *scored, False]).astype(int))) + 1
    return job_of(ids, *((int(start), int(stop)) for start, stop in edges.reshape(-1, 2)))


@pytest.fixture(scope="module")
def stand_in(tiny_models: TinyModels) -> VllmStandIn:
    return VllmStandIn(tiny_models.teacher)


@settings(deadline=None, max_examples=40)
@given(job=jobs_with_spans(), kind=st.sampled_from([SAMPLED, TOP_2, TopKRequest(k=17)]))
def test_scores_of_several_spans_are_those_of_the_same_places_in_one(
    stand_in: VllmStandIn, job: ScoringJob, kind: SampledRequest | TopKRequest
) -> None:
    def ask(asked: ScoringJob) -> TeacherScore:
        status, answers = stand_in.answer({}, score_body([asked], kind))
        assert status == 200
        raw = json.dumps(answers).encode()
        assert len(raw) <= score_reply_limit([asked], kind)
        (score,) = read_scores(raw, [asked], kind, vocab_size=260, teacher_id="t")
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


@pytest.mark.parametrize("kind", [SAMPLED, TOP_2, TopKRequest(k=300)])
def test_the_largest_honest_reply_is_within_the_limit(kind: SampledRequest | TopKRequest) -> None:
    k = kind.k if isinstance(kind, TopKRequest) else 0
    ids = [151_935] * 200
    widest = {"logprob": -1.2345678901234567e-300, "rank": 151_936, "decoded_token": None}
    place = {str(151_935 - i): widest for i in range(k + 1)}
    one = choice([None, *[place] * 199], prompt_token_ids=ids)
    assert len(reply(one)) <= score_reply_limit([job_of(ids, (1, 200))], kind)


# --- Answers ------------------------------------------------------------------------------------


def answer(ids: list[Any], values: list[Any] | None = None, **changes: Any) -> bytes:
    given = {
        "tokens": [f"token_id:{token}" for token in ids],
        "token_logprobs": [-1.0] * len(ids) if values is None else values,
    }
    plain = {"token_ids": ids, "logprobs": given, "finish_reason": "stop"}
    plain["prompt_token_ids"] = make_prompt(2).token_ids.tolist()
    return reply(choice(None, **(plain | changes)))


def read_three(raw: bytes, **sampling: Any) -> Any:
    request = make_request("r", make_prompt(2), make_spec(**({"max_new_tokens": 3} | sampling)))
    assert len(raw) <= answer_reply_limit(request)
    return read_answer(raw, request, EOS, VERSION, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("ids", "reason"), [([1, 2, 3], "length"), ([1, 9], "stop"), ([1, 2, 9], "stop")]
)
def test_an_answer_becomes_a_rollout(ids: list[int], reason: str) -> None:
    rollout = read_three(answer(ids))
    assert rollout.response_ids.tolist() == ids
    assert rollout.behavior_logprobs.tolist() == [-1.0] * len(ids)
    assert rollout.finish_reason.value == reason


def test_greedy_tokens_are_certain() -> None:
    assert read_three(answer([1, 9]), temperature=0.0).behavior_logprobs.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (answer([]), FaultKind.LENGTH),
        (answer([1, 2, 3, 9]), FaultKind.LENGTH),
        (answer([1, 2]), FaultKind.LENGTH),  # cut before its end
        (answer([9, 1, 9]), FaultKind.LENGTH),  # goes on after it
        (answer([1, 10, 9]), FaultKind.GARBAGE),
        (answer([1, -1, 9]), FaultKind.GARBAGE),
        (answer([1, True, 9]), FaultKind.GARBAGE),
        (answer([1, 2, 9], [-1.0, -1.0]), FaultKind.LENGTH),
        (answer([1, 2, 9], [-1.0, None, -1.0]), FaultKind.MISSING),
        (answer([1, 2, 9], [-1.0, -9999.0, -1.0]), FaultKind.MISSING),
        (answer([1, 2, 9], [-1.0, 0.5, -1.0]), FaultKind.POSITIVE),
        (answer([1, 2, 9], token_ids=[1, 3, 9]), FaultKind.MISALIGNED),
        (answer([1, 2, 9], prompt_token_ids=[1, 2]), FaultKind.MISALIGNED),
        (answer([1, 2, 9], logprobs=None), FaultKind.GARBAGE),
        (answer([1, 2, 9], finish_reason="abort"), FaultKind.ABORTED),
    ],
)
def test_an_incomplete_answer_is_a_fault(raw: bytes, kind: FaultKind) -> None:
    with pytest.raises(ReplyError) as error:
        read_three(raw)
    assert error.value.fault.kind is kind
