"""What a scoring server may do wrong: every fault is healed or becomes a failure, never a score.

A proxy stands in front of the server: of the stand-ins, and of the real SGLang and vLLM.
"""

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_distill.errors import (
    ConfigError,
    DataError,
    DistillError,
    EngineError,
    EngineStartError,
    HandshakeError,
)
from qwen3_distill.ports import CACHED_TOKENS
from qwen3_distill.scoring.served import client, readiness
from qwen3_distill.scoring.served.teacher import DROPPED, ServedTeacher
from qwen3_distill.types import (
    Rollout,
    SampledRequest,
    ScoreFailure,
    ScoreRequest,
    ScoreResult,
    TeacherScore,
    TopKRequest,
    TopKScore,
)
from tests.contract.builders import jobs_of, make_prompt, run, scores_of, synthetic_rollout
from tests.contract.reference import largest_gap, reference_model, token_logprobs
from tests.contract.served_adapter import POOL, SERVED, Served, ServedConfig, build_served
from tests.fault_proxy import Fault, FaultProxy
from tests.tiny_models import CONTEXT_LENGTH, TinyModels

ROLLOUTS = [synthetic_rollout(6, 5, seed) for seed in range(4)]
POISONED = ROLLOUTS[2]
LIKELY_TOKENS = 5
SAMPLED = SampledRequest()
TOP_K = TopKRequest(k=3)

IN_A_REPLY = {
    Fault.NONE_LOGPROB: "missing",
    Fault.NAN: "missing",
    Fault.MINUS_INFINITY: "missing",
    Fault.POSITIVE: "positive",
    Fault.SHORT: "length",
    Fault.SHIFTED: "misaligned",
    Fault.OTHER_FORM: "garbage",
    Fault.ABORTED: "aborted",
}
OF_CANDIDATES = {
    Fault.CANDIDATE_TWICE: "candidates",
    Fault.FEW_CANDIDATES: "candidates",
    Fault.SHIFTED_CANDIDATES: "misaligned",
}
OF_A_REPLY = {Fault.WRONG_COUNT: "count", Fault.GARBAGE: "garbage"}
NO_REPLY = {Fault.STATUS_503: "status", Fault.HANG: "timeout", Fault.CUT: "connection"}
PATIENCE_S, OF_A_HANG_S = 60.0, 3.0
"""Limits of a request: one that a machine with much other work keeps, and one that passes soon."""


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest) -> Served:
    return request.param


@pytest.fixture(scope="module")
def parity_nats(served: Served) -> float:
    return served.adapter.parity_nats


@pytest.fixture(scope="module")
def likely(tiny_models: TinyModels) -> Rollout:
    """The teacher's own likeliest answer: all of its tokens are among the candidates."""
    model: Any = reference_model(tiny_models.teacher)
    ids = make_prompt(6).token_ids.tolist()
    with torch.no_grad():
        for _ in range(LIKELY_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return replace(
        synthetic_rollout(6, LIKELY_TOKENS), response_ids=np.array(ids[6:], dtype=np.int32)
    )


@pytest.fixture(scope="module")
def expected(tiny_models: TinyModels) -> dict[str, np.ndarray]:
    """The teacher's logprobs by rollout."""
    model = reference_model(tiny_models.teacher)
    return {rollout.rollout_id: token_logprobs(model, rollout) for rollout in ROLLOUTS}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(readiness, "REMOTE_GRACE_S", 0.5)
    monkeypatch.setattr(readiness, "PROBE_TIMEOUT_S", 20.0)


class Bench:
    """Teachers behind proxies, closed at the end of a test."""

    def __init__(self, model_dir: Path, served: Served) -> None:
        self._model_dir = model_dir
        self._served = served
        self._open: list[FaultProxy | ServedTeacher] = []

    def config(self, **changes: object) -> ServedConfig:
        return run(POOL.connect(self._served.config(self._model_dir))).model_copy(update=changes)

    def proxy(self, upstream: str | None = None) -> FaultProxy:
        proxy = run(FaultProxy(upstream or self.config().urls[0]).start())
        self._open.append(proxy)
        return proxy

    def teacher(
        self,
        *urls: str,
        request: ScoreRequest = SAMPLED,
        **changes: object,
    ) -> ServedTeacher:
        """Not started."""
        config = self.config(**({"urls": urls, "request_timeout_s": PATIENCE_S} | changes))
        teacher = build_served(config, request)
        self._open.append(teacher)
        return teacher

    def started(
        self,
        *urls: str,
        request: ScoreRequest = SAMPLED,
        **changes: object,
    ) -> ServedTeacher:
        teacher = self.teacher(*urls, request=request, **changes)
        run(teacher.start())
        return teacher

    def close(self) -> None:
        while self._open:
            run(self._open.pop().close())


@pytest.fixture
def bench(tiny_models: TinyModels, served: Served) -> Iterator[Bench]:
    made = Bench(tiny_models.teacher, served)
    yield made
    made.close()


def patience(fault: Fault) -> float:
    """Return the seconds that a request may take."""
    return OF_A_HANG_S if fault is Fault.HANG else PATIENCE_S


def when(rollout: Rollout, fault: Fault) -> Callable[[dict[str, Any]], Fault | None]:
    """The fault for every request whose last sequence is the rollout."""
    ids = [*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]
    return lambda request: fault if sequences_of(request)[-1] == ids else None


def sequences_of(request: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of a request, by whichever name the engine has for them."""
    return request["input_ids"] if "input_ids" in request else request["prompt"]


def assert_scores(
    results: list[ScoreResult],
    rollouts: list[Rollout],
    expected: dict[str, np.ndarray],
    parity_nats: float,
) -> None:
    for rollout, result in zip(rollouts, results, strict=True):
        assert isinstance(result, TeacherScore), result
        assert largest_gap(result.logprobs, expected[rollout.rollout_id]) < parity_nats


# --- Faults that pass, and faults that stay -----------------------------------------------------


def faults_counted(teacher: ServedTeacher) -> dict[str, float]:
    """Return the teacher's counters without the tokens that the server had in its cache."""
    return {key: value for key, value in teacher.counters.items() if key != CACHED_TOKENS}


@pytest.mark.parametrize(
    ("fault", "reason"), [*IN_A_REPLY.items(), *OF_A_REPLY.items(), *NO_REPLY.items()]
)
def test_a_fault_that_passes_is_healed_and_counted(
    bench: Bench,
    expected: dict[str, np.ndarray],
    parity_nats: float,
    fault: Fault,
    reason: str,
) -> None:
    proxy = bench.proxy()
    teacher = bench.started(proxy.url, request_timeout_s=patience(fault))
    proxy.next_faults.extend([fault, fault])
    results = run(teacher.score(jobs_of(ROLLOUTS)))
    assert_scores(results, ROLLOUTS, expected, parity_nats)
    assert not proxy.next_faults
    spoiled = 1 if fault in IN_A_REPLY else len(ROLLOUTS)
    assert faults_counted(teacher) == {f"score/retried_{reason}": 2 * spoiled}


def test_a_context_is_computed_once_for_all_of_its_answers(
    bench: Bench, tiny_models: TinyModels, served: Served, parity_nats: float
) -> None:
    first, second = (synthetic_rollout(40, 9, seed) for seed in (71, 72))
    rollouts = [
        replace(rollout, rollout_id=f"{rollout.rollout_id}#{number}", response_ids=answer)
        for rollout in (first, second)
        for number, answer in enumerate(np.split(np.arange(50, 77, dtype=np.int32), 3))
    ]
    model = reference_model(tiny_models.teacher)
    expected = {rollout.rollout_id: token_logprobs(model, rollout) for rollout in rollouts}
    proxy = bench.proxy()
    teacher = bench.started(proxy.url)
    proxy.requests.clear()
    before = teacher.counters.get(CACHED_TOKENS, 0.0)
    assert_scores(run(teacher.score(jobs_of(rollouts))), rollouts, expected, parity_nats)
    asked = [[tuple(ids[:40]) for ids in sequences_of(request)] for request in proxy.requests]
    a, b = (tuple(rollout.prompt.token_ids.tolist()) for rollout in (first, second))
    if served.engine == "vllm":  # its cache is not read for scores
        assert sorted(ids for contexts in asked for ids in contexts) == sorted([a, b] * 3)
        return
    assert asked == [[a, b], [a, a, b, b]]
    if served.kind == "real":
        # The scored token after the context needs the last one of the context.
        assert teacher.counters[CACHED_TOKENS] - before >= 4 * (40 - 1)


@pytest.mark.parametrize(("fault", "reason"), IN_A_REPLY.items())
def test_a_sequence_that_stays_bad_is_dropped_alone(
    bench: Bench, expected: dict[str, np.ndarray], parity_nats: float, fault: Fault, reason: str
) -> None:
    proxy = bench.proxy()
    teacher = bench.started(proxy.url, max_attempts=3)
    proxy.always = when(POISONED, fault)
    order = [ROLLOUTS[0], ROLLOUTS[1], ROLLOUTS[3], POISONED]
    *good, bad = run(teacher.score(jobs_of(order)))
    assert_scores(good, order[:-1], expected, parity_nats)
    assert isinstance(bad, ScoreFailure)
    assert bad.rollout_id == POISONED.rollout_id
    assert bad.reason.startswith(f"{reason}: ")
    assert faults_counted(teacher) == {f"score/retried_{reason}": 2, DROPPED: 1}


@pytest.mark.parametrize(("fault", "reason"), OF_CANDIDATES.items())
def test_bad_candidates_are_healed_or_dropped(
    bench: Bench, likely: Rollout, served: Served, fault: Fault, reason: str
) -> None:
    if served.engine == "vllm":
        reason = "candidates"  # the token and its candidates are in one object, with their ranks
    proxy = bench.proxy()
    teacher = bench.started(proxy.url, request=TOP_K, max_attempts=2)
    (score,) = scores_of(teacher, [likely])
    assert isinstance(score, TopKScore)
    assert score.candidate_ids[:, 0].tolist() == likely.response_ids.tolist()
    proxy.next_faults.append(fault)
    (healed,) = scores_of(teacher, [likely])
    assert isinstance(healed, TopKScore)
    assert healed.candidate_ids.tolist() == score.candidate_ids.tolist()
    assert faults_counted(teacher) == {f"score/retried_{reason}": 1}
    proxy.always = lambda request: fault
    (dropped,) = run(teacher.score(jobs_of([likely])))
    assert isinstance(dropped, ScoreFailure)
    assert dropped.reason.startswith(f"{reason}: ")


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.CUT, Fault.STATUS_503])
def test_a_sequence_that_spoils_its_request_is_found(
    bench: Bench, expected: dict[str, np.ndarray], parity_nats: float, fault: Fault
) -> None:
    proxy = bench.proxy()
    teacher = bench.started(proxy.url, max_attempts=3, request_timeout_s=patience(fault))
    proxy.always = when(POISONED, fault)
    order = [ROLLOUTS[0], ROLLOUTS[1], ROLLOUTS[3], POISONED]
    *good, bad = run(teacher.score(jobs_of(order)))
    assert_scores(good, order[:-1], expected, parity_nats)
    assert isinstance(bad, ScoreFailure)


@pytest.mark.parametrize("fault", OF_A_REPLY)
def test_replies_that_stay_bad_give_no_score(bench: Bench, fault: Fault) -> None:
    proxy = bench.proxy()
    teacher = bench.started(proxy.url, max_attempts=2)
    proxy.always = lambda request: fault
    results = run(teacher.score(jobs_of(ROLLOUTS)))
    assert all(isinstance(result, ScoreFailure) for result in results)
    assert teacher.counters[DROPPED] == len(ROLLOUTS)


@pytest.mark.parametrize("fault", NO_REPLY)
def test_a_server_that_never_answers_is_an_error(bench: Bench, fault: Fault) -> None:
    proxy = bench.proxy()
    teacher = bench.started(proxy.url, max_attempts=2, request_timeout_s=patience(fault))
    proxy.always = lambda request: fault
    with pytest.raises(EngineError, match=rf"no answer in 2 attempts .*{proxy.url}"):
        run(teacher.score(jobs_of(ROLLOUTS)))


def test_a_refused_sequence_is_dropped_at_once(
    bench: Bench, expected: dict[str, np.ndarray], parity_nats: float
) -> None:
    proxy = bench.proxy()
    teacher = bench.started(proxy.url)
    ids = [*POISONED.prompt.token_ids.tolist(), *POISONED.response_ids.tolist()]
    proxy.always = lambda request: Fault.STATUS_400 if ids in sequences_of(request) else None
    results = run(teacher.score(jobs_of(ROLLOUTS)))
    bad = results.pop(ROLLOUTS.index(POISONED))
    assert isinstance(bad, ScoreFailure)
    assert "refused: " in bad.reason
    assert "status 400" in bad.reason
    assert_scores(results, [r for r in ROLLOUTS if r is not POISONED], expected, parity_nats)
    assert faults_counted(teacher) == {DROPPED: 1}  # nothing was asked for again in vain


def test_too_long_for_the_server_is_dropped_and_its_neighbours_scored(
    bench: Bench, expected: dict[str, np.ndarray], parity_nats: float
) -> None:
    """The server's own limit, which may be lower than the model's."""
    proxy = bench.proxy()
    teacher = bench.started(proxy.url)
    teacher._identity = replace(teacher.identity, context_length=10_000)
    too_long = synthetic_rollout(6, CONTEXT_LENGTH, seed=9)
    results = run(teacher.score(jobs_of([ROLLOUTS[0], too_long, ROLLOUTS[1]])))
    bad = results.pop(1)
    assert isinstance(bad, ScoreFailure)
    assert re.search("longer than|exceeds the maximum|maximum context length", bad.reason)
    assert_scores(results, ROLLOUTS[:2], expected, parity_nats)


# --- What is asked ------------------------------------------------------------------------------


def test_requests_keep_prompts_together_within_the_budget_and_the_limit(bench: Bench) -> None:
    proxy = bench.proxy()
    teacher = bench.started(proxy.url, request_tokens=40, max_in_flight=2)
    prompts = [make_prompt(8, seed=seed) for seed in range(3)]
    interleaved = [
        replace(synthetic_rollout(8, 4 + i, seed=i), prompt=prompts[i % 3], rollout_id=f"i{i}")
        for i in range(9)
    ]
    proxy.requests.clear()
    connections_before = proxy.num_connections
    proxy.delay_s = 0.05
    scores = scores_of(teacher, interleaved)
    assert [score.logprobs.size for score in scores] == [r.num_tokens for r in interleaved]
    sent = [ids[:8] for request in proxy.requests for ids in sequences_of(request)]
    in_order = [prompt.token_ids.tolist() for prompt in prompts for _ in range(3)]
    assert sorted(sent) == sorted(in_order)
    for request in proxy.requests:
        sequences = sequences_of(request)
        assert sum(map(len, sequences)) <= 40
        if "input_ids" in request:  # vLLM gives those of the whole prompt
            assert request["logprob_start_len"] == [7] * len(sequences)
        kept = [ids[:8] for ids in sequences]
        assert kept == sorted(kept, key=in_order.index)
    assert proxy.most_in_flight == 2
    # What a server sends unasked or too late cannot be taken for the reply to another request.
    assert proxy.num_connections - connections_before == len(proxy.requests)


def test_a_proxy_of_the_environment_is_not_used(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    teacher = bench.started(bench.proxy().url)
    assert len(scores_of(teacher, ROLLOUTS)) == len(ROLLOUTS)


def test_ids_beyond_the_vocabulary_never_reach_a_server(bench: Bench) -> None:
    proxy = bench.proxy()
    teacher = bench.started(proxy.url)
    asked = len(proxy.requests)
    strange = replace(ROLLOUTS[0], response_ids=np.full(5, 260, dtype=np.int32))
    with pytest.raises(DataError, match=r"token 260.*vocabulary is 0 to 259"):
        run(teacher.score(jobs_of([strange])))
    assert len(proxy.requests) == asked


# --- Several servers ----------------------------------------------------------------------------


def test_work_is_shared_by_tokens_in_flight(bench: Bench) -> None:
    proxies = [bench.proxy(), bench.proxy()]
    teacher = bench.started(*(proxy.url for proxy in proxies), request_tokens=1, max_in_flight=3)
    for proxy in proxies:
        proxy.requests.clear()
        proxy.delay_s = 0.05
    rollouts = [synthetic_rollout(4, 6, seed) for seed in range(12)]
    assert len(scores_of(teacher, rollouts)) == 12
    shares = [len(proxy.requests) for proxy in proxies]
    assert sum(shares) == 12
    assert min(shares) >= 4
    assert all(proxy.most_in_flight == 3 for proxy in proxies)


def test_a_large_request_counts_for_more_than_a_small_one(bench: Bench) -> None:
    proxies = [bench.proxy(), bench.proxy()]
    teacher = bench.started(*(proxy.url for proxy in proxies), request_tokens=1, max_in_flight=9)
    for proxy in proxies:
        proxy.requests.clear()
        proxy.delay_s = 0.1
    rollouts = [synthetic_rollout(4, 200), *(synthetic_rollout(4, 6, seed) for seed in range(5))]
    assert len(scores_of(teacher, rollouts)) == 6
    assert sorted(len(proxy.requests) for proxy in proxies) == [1, 5]


def test_a_server_that_fails_is_replaced_by_the_others(
    bench: Bench, expected: dict[str, np.ndarray], parity_nats: float
) -> None:
    good, bad = bench.proxy(), bench.proxy()
    teacher = bench.started(good.url, bad.url, request_tokens=1)
    bad.always = lambda request: Fault.CUT
    assert_scores(run(teacher.score(jobs_of(ROLLOUTS))), ROLLOUTS, expected, parity_nats)
    tried = len(bad.requests)
    assert_scores(run(teacher.score(jobs_of(ROLLOUTS))), ROLLOUTS, expected, parity_nats)
    assert len(bad.requests) == tried  # it rests


# --- Who answers --------------------------------------------------------------------------------


def test_another_model_behind_the_address_is_refused(
    bench: Bench, tiny_models: TinyModels, served: Served
) -> None:
    student = run(POOL.connect(served.config(tiny_models.student)))
    teacher = bench.teacher(*student.urls, api_key_file=student.api_key_file)
    with pytest.raises(HandshakeError, match=r"does not score as .*teacher must.* another model"):
        run(teacher.start())


def test_scores_of_the_wrong_places_are_refused_at_the_start(bench: Bench) -> None:
    """A shift that no reply shows by itself."""
    proxy = bench.proxy()
    proxy.always = lambda request: Fault.SHIFTED_VALUES
    with pytest.raises(HandshakeError, match="fit when shifted by one token"):
        run(bench.teacher(proxy.url).start())


@pytest.mark.parametrize("fault", [*IN_A_REPLY, *OF_A_REPLY])
def test_a_server_that_scores_nothing_is_refused_at_the_start(bench: Bench, fault: Fault) -> None:
    proxy = bench.proxy()
    proxy.always = lambda request: fault
    with pytest.raises(EngineStartError, match=f"{proxy.url} gives no score to a known sequence"):
        run(bench.teacher(proxy.url, max_attempts=2).start())


def test_a_server_that_is_still_loading_is_waited_for(bench: Bench) -> None:
    proxy = bench.proxy()
    proxy.next_faults.extend([Fault.STATUS_503, Fault.STATUS_503])
    assert len(scores_of(bench.started(proxy.url), ROLLOUTS)) == len(ROLLOUTS)


def test_a_server_that_loads_for_ever_is_an_error(bench: Bench) -> None:
    proxy = bench.proxy()
    proxy.always = lambda request: Fault.STATUS_503
    with pytest.raises(EngineStartError, match=r"no answer within scoring.start_timeout_s=0.5"):
        run(bench.teacher(proxy.url, start_timeout_s=0.5).start())


def test_no_server_at_the_address_is_an_error(bench: Bench) -> None:
    proxy = bench.proxy()
    run(proxy.close())
    with pytest.raises(EngineStartError, match=r"no server answers .*check scoring.urls"):
        run(bench.teacher(proxy.url).start())


def test_something_else_at_the_address_is_an_error(bench: Bench, served: Served) -> None:
    proxy = bench.proxy()
    proxy.always = lambda request: Fault.STATUS_400
    with pytest.raises(EngineStartError, match=f"no {served.name} server"):
        run(bench.teacher(proxy.url).start())


def test_a_wrong_key_is_an_error(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("wrong\n")
    with pytest.raises(EngineError, match=r"status 401.*scoring.api_key_file"):
        run(bench.teacher(bench.proxy().url, api_key_file=str(tmp_path / "key")).start())


def test_a_missing_key_file_is_an_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file .*cannot be read"):
        run(bench.teacher(bench.proxy().url, api_key_file=str(tmp_path / "none")).start())


def test_a_score_before_the_start_or_after_the_end_is_an_error(bench: Bench) -> None:
    teacher = bench.teacher(bench.proxy().url)
    with pytest.raises(EngineError, match="not started"):
        run(teacher.score(jobs_of(ROLLOUTS)))
    run(teacher.start())
    run(teacher.close())
    with pytest.raises(EngineError, match="not started"):
        run(teacher.score(jobs_of(ROLLOUTS)))


def test_an_error_ends_the_other_requests(bench: Bench) -> None:
    """Nothing goes on in the background when `score` has raised."""
    proxy = bench.proxy()
    teacher = bench.started(proxy.url, request_tokens=1, max_attempts=1, request_timeout_s=600.0)
    proxy.next_faults.extend([Fault.CUT, Fault.HANG, Fault.HANG, Fault.HANG])

    async def tasks_left() -> int:
        with pytest.raises(DistillError):
            await teacher.score(jobs_of(ROLLOUTS))
        return sum("_score" in repr(task) for task in asyncio.all_tasks())

    assert run(tasks_left()) == 0
