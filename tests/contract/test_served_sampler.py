"""The scoring server as a `Sampler`: the teacher's own answers, for its accuracy."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from qwen3_distill.errors import DataError, EngineError
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.scoring.served import client
from qwen3_distill.scoring.served.endpoint import RESTARTS
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.types import FinishReason, Rollout, RolloutRequest, SampledRequest
from tests.contract.builders import make_prompt, make_request, make_spec, ragged_requests, run
from tests.contract.reference import (
    behavior_gap,
    behavior_logprobs,
    largest_gap,
    reference_model,
)
from tests.contract.served_adapter import (
    POOL,
    SERVED,
    STAND_INS,
    VLLM_STAND_IN,
    Served,
    ServedConfig,
    build_served,
)
from tests.fault_proxy import Fault, FaultProxy
from tests.sglang_stand_in import StandInServer
from tests.tiny_models import EOS_ID, TinyModels
from tests.vllm_stand_in import VllmStandIn

FAR_NATS = 0.3


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest) -> Served:
    return request.param


@pytest.fixture
def config(tiny_models: TinyModels, served: Served) -> ServedConfig:
    return run(POOL.connect(served.config(tiny_models.teacher)))


@pytest.fixture
def teacher(config: ServedConfig) -> Iterator[ServedTeacher]:
    made = build_served(config)
    run(made.start())
    yield made
    run(made.close())


def answers(teacher: ServedTeacher, requests: list[RolloutRequest]) -> list[Rollout]:
    """In the order of the requests, each exactly once."""

    async def collect() -> list[Rollout]:
        return [rollout async for rollout in teacher.sampler().generate(requests)]

    by_id = {rollout.rollout_id: rollout for rollout in run(collect())}
    assert len(by_id) == len(requests)
    return [by_id[request.rollout_id] for request in requests]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_p": 0.8},
        {"top_k": 1},
    ],
    ids=str,
)
def test_behavior_logprobs_are_of_what_was_sampled_from(
    teacher: ServedTeacher, tiny_models: TinyModels, served: Served, sampling: dict[str, float]
) -> None:
    reference = reference_model(tiny_models.teacher)
    parity_nats = served.adapter.decoded_parity_nats
    for rollout in answers(teacher, ragged_requests(6, **sampling)):
        edges = {"top_p_edge": parity_nats / 6, "likelier_nats": parity_nats / 2}
        assert behavior_gap(reference, rollout, **edges) < parity_nats


def test_a_wrong_temperature_would_show(teacher: ServedTeacher, tiny_models: TinyModels) -> None:
    reference = reference_model(tiny_models.teacher)
    (rollout,) = answers(teacher, [make_request("a", make_prompt(5), make_spec(temperature=0.6))])
    wrong = behavior_logprobs(reference, rollout, temperature=1.0)
    assert largest_gap(rollout.behavior_logprobs, wrong) > FAR_NATS


def test_an_answer_ends_with_its_end_token(teacher: ServedTeacher, served: Served) -> None:
    # So hot that the end token comes up about once in 260 tokens; vLLM takes no more than 2.
    hot = 2.0 if served.engine == "vllm" else 100.0
    ended: list[Rollout] = []
    for attempt in range(10):
        requests = [
            make_request(
                f"r{seed}",
                make_prompt(4, seed=seed),
                make_spec(seed=100 * attempt + seed, temperature=hot, max_new_tokens=100),
            )
            for seed in range(8)
        ]
        for rollout in answers(teacher, requests):
            if rollout.finish_reason is FinishReason.STOP:
                ended.append(rollout)
            else:
                assert rollout.num_tokens == 100
                assert EOS_ID not in rollout.response_ids
        if ended:
            break
    assert ended
    for rollout in ended:
        assert rollout.response_ids[-1] == EOS_ID
        assert EOS_ID not in rollout.response_ids[:-1]


def test_answers_are_of_the_directorys_weights(
    teacher: ServedTeacher, tiny_models: TinyModels
) -> None:
    (rollout,) = answers(teacher, [make_request("a", make_prompt(5), make_spec())])
    (span,) = rollout.versions
    assert span.version.step == 0
    assert directory_digest(tiny_models.teacher).startswith(span.version.digest)


def test_no_requests_give_no_answers(teacher: ServedTeacher) -> None:
    assert answers(teacher, []) == []


def test_a_closed_generator_leaves_no_task_running(teacher: ServedTeacher) -> None:
    async def first_only() -> int:
        generator = teacher.sampler().generate(ragged_requests(8))
        async for _ in generator:
            break
        await generator.aclose()
        return sum("_answer" in repr(task) for task in asyncio.all_tasks())

    assert run(first_only()) == 0


def test_ids_beyond_the_vocabulary_never_reach_a_server(teacher: ServedTeacher) -> None:
    prompt = make_prompt(3)
    object.__setattr__(prompt, "token_ids", np.array([1, 2, 260], dtype=np.int32))
    with pytest.raises(DataError, match="token 260"):
        answers(teacher, [make_request("a", prompt, make_spec())])


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.STATUS_503, Fault.GARBAGE, Fault.ABORTED])
def test_an_answer_that_got_lost_is_asked_for_again(
    config: ServedConfig, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    proxy = run(FaultProxy(config.urls[0]).start())
    teacher = build_served(config.model_copy(update={"urls": (proxy.url,), "max_attempts": 3}))
    run(teacher.start())
    try:
        requests = ragged_requests(3)
        proxy.next_faults.extend([fault, None, fault])
        assert len(answers(teacher, requests)) == 3
        assert sum(teacher.counters.values()) == 2
        proxy.always = lambda request: fault
        with pytest.raises(EngineError, match="gave no answer in 3 attempts"):
            answers(teacher, requests)
    finally:
        run(teacher.close())
        run(proxy.close())


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_a_server_that_died_answers_again(tiny_models: TinyModels, stand_in: Served) -> None:
    teacher = build_served(stand_in.config(tiny_models.teacher), SampledRequest())
    run(teacher.start())
    try:
        assert teacher.server is not None
        teacher.server.kill()
        assert len(answers(teacher, ragged_requests(4))) == 4
        assert teacher.counters == {RESTARTS: 1}
    finally:
        run(teacher.close())


def test_a_server_whose_logprobs_ignore_the_temperature_is_refused(
    tiny_models: TinyModels,
) -> None:
    """vLLM's own default: logprobs before temperature, top-k and top-p."""
    server = StandInServer(VllmStandIn(tiny_models.teacher, logprobs_mode="raw_logprobs")).start()
    teacher = build_served(VLLM_STAND_IN.config(tiny_models.teacher, urls=(server.url,)))
    try:
        run(teacher.start())  # it scores as it must
        with pytest.raises(EngineError, match="start it with --logprobs-mode processed_logprobs"):
            answers(teacher, [make_request("a", make_prompt(5), make_spec())])
    finally:
        run(teacher.close())
        server.close()
