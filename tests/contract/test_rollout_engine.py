"""The contract of `RolloutEngine`: what is sampled, how it is reported, which weights are used."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.errors import DataError, WeightVersionError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.ports import FullWeights, RolloutEngine, StreamingRolloutEngine
from qwen3_distill.types import (
    FinishReason,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    WeightVersion,
)
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.adapters import ENGINES, EngineAdapter
from tests.contract.builders import (
    LONG,
    collect,
    collecting_when,
    directory_weights,
    draws_after,
    generate,
    likelier_eos,
    long_requests,
    longest,
    make_prompt,
    make_request,
    make_spec,
    paused,
    prefixes_when,
    published,
    ragged_requests,
    run,
    serve,
)
from tests.contract.reference import (
    behavior_gap,
    behavior_logprobs,
    head_of,
    largest_gap,
    reference_model,
    response_logprobs,
    response_positions,
    sampled_ids,
    swapped_logprobs,
)
from tests.engines import INSTALLED
from tests.tiny_models import CONTEXT_LENGTH, EOS_ID, TinyModels, write_model

PARITY_NATS = 1e-4
"""Between two float32 forward passes; 5e-6 was seen. A wrong shift is off by nats."""
REPEAT_NATS = 1e-5
"""Between two batch shapes of one engine; 2e-6 was seen."""
FAR_NATS = 0.1
EDGE = 1e-5
"""Of a nucleus, as a probability: engines add up float32 numbers in some order."""
TIE = 2**-17 if INSTALLED.device == "cuda" else 0.0
"""vLLM's kernel on a GPU finds the edge of a nucleus in 18 halvings of the range from the least to
the largest probability: of two tokens that are closer it takes none, one or both."""
CACHED_PROMPT = 160
"""Longer than a block of the prefix cache of vLLM on a CPU (128 tokens)."""

SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "hot": {"temperature": 1.6},
    "top_k": {"top_k": 8},
    "top_p": {"top_p": 0.6},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.8},
}


@pytest.fixture(scope="module", params=ENGINES)
def adapter(request: pytest.FixtureRequest) -> EngineAdapter:
    return request.param


@pytest.fixture(scope="module")
def weights(tiny_models: TinyModels) -> dict[str, Tensor]:
    return likelier_eos(directory_weights(tiny_models.student))


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    return reference_model(tiny_models.student, weights)


@pytest.fixture
def engine(
    adapter: EngineAdapter, tiny_models: TinyModels, weights: Mapping[str, Tensor]
) -> StreamingRolloutEngine:
    """An engine that serves `weights`."""
    built = adapter.build(tiny_models.student)
    serve(built, weights)
    return built


@pytest.fixture
def fresh(adapter: EngineAdapter, tiny_models: TinyModels) -> StreamingRolloutEngine:
    """An engine that has no weights yet."""
    return adapter.build(tiny_models.student)


def parity_gap(rollouts: Sequence[Rollout], reference: PreTrainedModel) -> float:
    return max(behavior_gap(reference, rollout, top_p_edge=EDGE, tie=TIE) for rollout in rollouts)


# --- Behavior logprobs --------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", SPECS.values(), ids=SPECS.keys())
def test_behavior_logprobs_are_those_of_the_distribution_sampled_from(
    engine: RolloutEngine, reference: PreTrainedModel, overrides: dict[str, Any]
) -> None:
    rollouts = generate(engine, ragged_requests(**overrides))
    assert parity_gap(rollouts, reference) < PARITY_NATS


def test_candidates_are_the_most_likely_tokens_where_each_was_sampled(
    engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    # Neighbours ask for other numbers, and some for none.
    requests = [
        replace(request, num_candidates=(4, 0, 24)[index % 3])
        for index, request in enumerate(ragged_requests(temperature=0.7))
    ]
    rollouts = {rollout.rollout_id: rollout for rollout in generate(engine, requests)}
    for request in requests:
        rollout, count = rollouts[request.rollout_id], request.num_candidates
        if not count:
            assert rollout.candidate_ids is None
            continue
        assert rollout.candidate_ids is not None
        with torch.no_grad():
            logprobs_SV = response_logprobs(reference, rollout)
        chosen_SK = logprobs_SV.gather(-1, torch.tensor(rollout.candidate_ids).long())
        # By their values: rounding may exchange tokens that are as likely.
        gap = (chosen_SK - logprobs_SV.topk(count).values).abs().max()
        assert float(gap) < PARITY_NATS


def test_a_prefix_has_the_candidates_of_its_tokens(engine: StreamingRolloutEngine) -> None:
    async def seen() -> tuple[list[RolloutPrefix], list[Rollout]]:
        requests = [replace(request, num_candidates=3) for request in long_requests(4)]
        collecting, prefixes = await collecting_when(engine, requests, lambda p: longest(p) >= 5)
        return prefixes, await collecting

    prefixes, rollouts = run(seen())
    by_id = {rollout.rollout_id: rollout for rollout in rollouts}
    assert prefixes
    for prefix in prefixes:
        whole = by_id[prefix.request.rollout_id].candidate_ids
        assert whole is not None
        assert prefix.candidate_ids is not None
        assert prefix.candidate_ids.shape == (prefix.response_ids.size, 3)
        assert np.array_equal(prefix.candidate_ids, whole[: prefix.response_ids.size])


def test_every_row_of_a_batch_has_its_own_sampling_spec(
    engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    specs = [make_spec(seed, **overrides) for seed in range(3) for overrides in SPECS.values()]
    requests = [
        make_request(f"r{i}", make_prompt(3 + i, seed=i), spec) for i, spec in enumerate(specs)
    ]
    assert parity_gap(generate(engine, requests), reference) < PARITY_NATS


def test_greedy_tokens_are_the_most_likely_ones_at_logprob_zero(
    engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    greedy = generate(engine, ragged_requests(temperature=0.0))
    for rollout in greedy:
        with torch.no_grad():
            logits = response_positions(reference, rollout)[1]
        assert logits.argmax(dim=-1).tolist() == sampled_ids(rollout)
        assert not rollout.behavior_logprobs.any()
    sampled = generate(engine, ragged_requests())
    assert any(
        a.response_ids.tolist() != b.response_ids.tolist()
        for a, b in zip(greedy, sampled, strict=True)
    )


def test_a_wrong_temperature_would_fail_the_parity_check(
    engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    for rollout in generate(engine, ragged_requests(temperature=0.7, max_new_tokens=20)):
        wrong = behavior_logprobs(reference, rollout, temperature=1.0)
        assert largest_gap(rollout.behavior_logprobs, wrong) > FAR_NATS


def test_a_shift_by_one_token_would_fail_the_parity_check(
    engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    for rollout in generate(engine, ragged_requests(max_new_tokens=20)):
        if rollout.num_tokens > 1:
            shifted = np.roll(behavior_logprobs(reference, rollout), 1)
            assert largest_gap(rollout.behavior_logprobs, shifted) > FAR_NATS


# --- Ends of rollouts ---------------------------------------------------------------------------


def test_a_rollout_ends_with_its_first_eos_or_is_cut_at_its_length(engine: RolloutEngine) -> None:
    rollouts = generate(engine, ragged_requests(150))
    by_reason = {
        reason: [r for r in rollouts if r.finish_reason is reason]
        for reason in (FinishReason.STOP, FinishReason.LENGTH)
    }
    assert min(len(group) for group in by_reason.values()) >= 10  # both kinds are tested
    for rollout in by_reason[FinishReason.STOP]:
        assert rollout.response_ids[-1] == EOS_ID
        assert EOS_ID not in rollout.response_ids[:-1]
        assert rollout.num_tokens <= rollout.sampling.max_new_tokens
    for rollout in by_reason[FinishReason.LENGTH]:
        assert rollout.num_tokens == rollout.sampling.max_new_tokens
        assert EOS_ID not in rollout.response_ids


def test_any_of_several_eos_ids_ends_a_rollout(adapter: EngineAdapter, tmp_path: Path) -> None:
    eos_ids = [EOS_ID, *range(10)]
    model_dir = write_model(tmp_path / "model", seed=0, eos_token_id=eos_ids)
    engine = adapter.build(model_dir)
    serve(engine, directory_weights(model_dir))
    rollouts = generate(engine, ragged_requests(40, max_new_tokens=60))
    stopped = [r for r in rollouts if r.finish_reason is FinishReason.STOP]
    assert len({int(rollout.response_ids[-1]) for rollout in stopped}) > 3
    for rollout in rollouts:
        assert not set(eos_ids) & set(rollout.response_ids[:-1].tolist())
        assert (rollout.response_ids[-1] in eos_ids) == (rollout in stopped)


def test_a_rollout_repeats_its_request_and_names_its_weights(engine: RolloutEngine) -> None:
    requests = ragged_requests()
    for request, rollout in zip(requests, generate(engine, requests), strict=True):
        assert rollout.rollout_id == request.rollout_id
        assert rollout.sampling == request.sampling
        assert np.array_equal(rollout.prompt.token_ids, request.prompt.token_ids)
        (span,) = rollout.versions
        assert (span.start, span.stop, span.version) == (0, rollout.num_tokens, engine.version)


def test_no_requests_give_no_rollouts(engine: RolloutEngine) -> None:
    assert generate(engine, []) == []


def test_a_request_may_fill_the_context_and_not_exceed_it(
    engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    prompt = make_prompt(CONTEXT_LENGTH - 4)
    fits = make_request("fits", prompt, make_spec(max_new_tokens=4))
    assert parity_gap(generate(engine, [fits]), reference) < PARITY_NATS
    too_long = make_request("too_long", prompt, make_spec(max_new_tokens=5))
    with pytest.raises(DataError, match=rf"too_long: .* 5 exceed .* {CONTEXT_LENGTH}"):
        generate(engine, [fits, too_long])


# --- Seeds --------------------------------------------------------------------------------------


def assert_same_rollouts(left: Sequence[Rollout], right: Sequence[Rollout]) -> None:
    ours, theirs = (sorted(group, key=lambda r: r.rollout_id) for group in (left, right))
    for one, other in zip(ours, theirs, strict=True):
        assert one.rollout_id == other.rollout_id
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.finish_reason is other.finish_reason
        assert largest_gap(one.behavior_logprobs, other.behavior_logprobs) < REPEAT_NATS


Arrangement = Callable[[RolloutEngine, Sequence[RolloutRequest]], list[Rollout]]
ARRANGEMENTS: dict[str, Arrangement] = {
    "alone": lambda engine, requests: [generate(engine, [r])[0] for r in requests],
    "reversed": lambda engine, requests: generate(engine, list(reversed(requests))),
    "interleaved": lambda engine, requests: generate(engine, [*requests[1::2], *requests[::2]]),
    "again": lambda engine, requests: generate(engine, requests),
}


@pytest.fixture(scope="module")
def expected(
    adapter: EngineAdapter, tiny_models: TinyModels, weights: Mapping[str, Tensor]
) -> list[Rollout]:
    engine = adapter.build(tiny_models.student)
    serve(engine, weights)
    requests = ragged_requests()
    for i, overrides in enumerate(SPECS.values()):
        mixed = make_spec(seed=500 + i, **overrides)
        requests.append(make_request(f"mixed{i}", make_prompt(9, seed=i), mixed))
    return generate(engine, requests)


def requests_of(rollouts: Sequence[Rollout]) -> list[RolloutRequest]:
    return [make_request(r.rollout_id, r.prompt, r.sampling) for r in rollouts]


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def test_a_seed_gives_the_same_rollout_in_any_company(
    engine: RolloutEngine, expected: list[Rollout], arrange: Arrangement
) -> None:
    assert_same_rollouts(arrange(engine, requests_of(expected)), expected)


@pytest.mark.parametrize("max_sequences", [1, 3, 64])
def test_a_seed_gives_the_same_rollout_at_any_batch_limit(
    adapter: EngineAdapter,
    tiny_models: TinyModels,
    weights: Mapping[str, Tensor],
    expected: list[Rollout],
    max_sequences: int,
) -> None:
    engine = adapter.build(tiny_models.student, max_sequences=max_sequences)
    serve(engine, weights)
    generate(engine, ragged_requests(3))  # other work before
    assert_same_rollouts(generate(engine, requests_of(expected)), expected)


def test_a_longer_limit_only_appends(engine: RolloutEngine) -> None:
    prompt = make_prompt(5)
    requests = [
        make_request(str(limit), prompt, make_spec(seed=3, max_new_tokens=limit))
        for limit in (1, 7, 40)
    ]
    short, middle, long = (r.response_ids.tolist() for r in generate(engine, requests))
    assert long[:7] == middle
    assert middle[:1] == short


def test_other_seeds_give_other_rollouts(engine: RolloutEngine) -> None:
    prompt = make_prompt(5)
    requests = [make_request(str(seed), prompt, make_spec(seed=seed)) for seed in range(30)]
    answers = {tuple(r.response_ids.tolist()) for r in generate(engine, requests)}
    assert len(answers) == 30


def test_samples_that_share_a_prompt_equal_those_generated_apart(engine: RolloutEngine) -> None:
    shared = [make_prompt(length, seed=length) for length in (12, 4, 30)]
    requests = [
        make_request(f"{i}/{sample}", prompt, make_spec(seed=10 * i + sample))
        for i, prompt in enumerate(shared)
        for sample in range(4)
    ]
    apart = [generate(engine, [request])[0] for request in requests]
    assert_same_rollouts(generate(engine, requests), apart)


def test_generating_leaves_the_global_random_state_alone(engine: RolloutEngine) -> None:
    generated = draws_after(lambda: generate(engine, ragged_requests(3)))
    assert generated == draws_after(lambda: None)


# --- Frequencies --------------------------------------------------------------------------------

SAMPLES = 5000
PLAUSIBLE_Z = 4.0
"""Seeds are fixed, so a test passes for good or never; 4 standard deviations are no accident."""


def chi_square_z(tokens: Sequence[int], probs_V: NDArray[np.float64]) -> float:
    """How many standard deviations the chi-square lies above its mean (Wilson and Hilferty).

    Outcomes expected fewer than 5 times are one outcome together.
    """
    counts = np.bincount(tokens, minlength=len(probs_V)).astype(float)
    if counts[probs_V == 0].any():
        return math.inf
    wanted = probs_V * len(tokens)
    rare = wanted < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    free = len(wanted) - 1
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    spread = 2 / (9 * free)
    return ((statistic / free) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def sample_many(
    adapter: EngineAdapter, model_dir: Path, weights: Mapping[str, Tensor], **overrides: float
) -> list[Rollout]:
    engine = adapter.build(model_dir, max_sequences=SAMPLES)
    serve(engine, weights)
    prompt = make_prompt(6)
    return generate(
        engine,
        [make_request(str(s), prompt, make_spec(seed=s, **overrides)) for s in range(SAMPLES)],
    )


@torch.no_grad()
def next_probs(
    reference: PreTrainedModel, ids: Sequence[Sequence[int]], *, top_k: int = 0
) -> NDArray[np.float64]:
    """[rows, V] at temperature 1."""
    logits = reference(torch.tensor(ids)).logits[:, -1].double()
    if top_k:
        lowest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    return logits.softmax(-1).numpy()


@pytest.mark.parametrize("top_k", [0, 12])
def test_first_tokens_are_as_frequent_as_the_model_says(
    adapter: EngineAdapter,
    tiny_models: TinyModels,
    weights: Mapping[str, Tensor],
    reference: PreTrainedModel,
    top_k: int,
) -> None:
    rollouts = sample_many(adapter, tiny_models.student, weights, max_new_tokens=1, top_k=top_k)
    tokens = [int(rollout.response_ids[0]) for rollout in rollouts]
    prompt = rollouts[0].prompt.token_ids.tolist()
    (probs_V,) = next_probs(reference, [prompt], top_k=top_k)
    assert chi_square_z(tokens, probs_V) < PLAUSIBLE_Z
    warmer_V = probs_V**0.5 / (probs_V**0.5).sum()  # T = 2
    assert chi_square_z(tokens, warmer_V) > PLAUSIBLE_Z


def test_later_tokens_use_random_numbers_of_their_own(
    adapter: EngineAdapter,
    tiny_models: TinyModels,
    weights: Mapping[str, Tensor],
    reference: PreTrainedModel,
) -> None:
    rollouts = sample_many(adapter, tiny_models.student, weights, max_new_tokens=2)
    prompt = rollouts[0].prompt.token_ids.tolist()
    (first_V,) = next_probs(reference, [prompt])
    first_V[EOS_ID] = 0  # ended: no second token
    second_VV = next_probs(reference, [[*prompt, token] for token in range(len(first_V))])
    tokens = [int(r.response_ids[1]) for r in rollouts if r.num_tokens == 2]
    marginal_V = first_V @ second_VV / first_V.sum()
    assert chi_square_z(tokens, marginal_V) < PLAUSIBLE_Z
    assert chi_square_z(tokens, first_V / first_V.sum()) > PLAUSIBLE_Z


# --- Weights ------------------------------------------------------------------------------------


def assert_refuses(engine: RolloutEngine) -> None:
    """No version is served, so nothing is generated."""
    with pytest.raises(WeightVersionError):
        _ = engine.version
    with pytest.raises(WeightVersionError):
        generate(engine, ragged_requests(1))


def test_nothing_is_generated_before_the_first_load(fresh: RolloutEngine) -> None:
    assert_refuses(fresh)


def changed(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(7))
    return {**weights, name: weights[name] + 0.1 * noise}


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("model.embed_tokens.weight", True),
        ("model.embed_tokens.weight", False),
        ("model.layers.1.mlp.down_proj.weight", True),
        ("model.norm.weight", True),
        ("lm_head.weight", False),
    ],
)
def test_a_loaded_version_is_the_one_sampled_from(
    adapter: EngineAdapter, tiny_models: TinyModels, name: str, tied: bool
) -> None:
    model_dir = tiny_models.student if tied else tiny_models.teacher
    old = directory_weights(model_dir)
    engine = adapter.build(model_dir)
    serve(engine, old)
    new = changed(old, name)
    version = serve(engine, new, step=1)
    assert engine.version == version
    rollouts = generate(engine, ragged_requests())
    assert {rollout.oldest_version for rollout in rollouts} == {version}
    assert parity_gap(rollouts, reference_model(model_dir, new)) < PARITY_NATS
    assert parity_gap(rollouts, reference_model(model_dir, old)) > FAR_NATS


def test_a_head_left_behind_would_fail_the_parity_check(
    fresh: RolloutEngine, tiny_models: TinyModels, weights: Mapping[str, Tensor]
) -> None:
    new = changed(weights, "model.embed_tokens.weight")
    serve(fresh, new)
    half_updated = reference_model(tiny_models.student, new)
    old_head = torch.nn.Parameter(weights["model.embed_tokens.weight"], requires_grad=False)
    head_of(half_updated).weight = old_head
    assert parity_gap(generate(fresh, ragged_requests()), half_updated) > FAR_NATS


def misnamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = dict(weights)
    out["model.norm.scale"] = out.pop("model.norm.weight")
    return out


def without_one(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: w for name, w in weights.items() if name != "model.norm.weight"}


def with_one_more(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "model.layers.2.mlp.down_proj.weight": torch.zeros(2, 2)}


def of_another_shape(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "model.norm.weight": torch.ones(7)}


def broadcastable(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "model.norm.weight": torch.ones(1)}


@pytest.mark.parametrize(
    "damage", [misnamed, without_one, with_one_more, of_another_shape, broadcastable]
)
def test_weights_of_another_model_are_refused(
    fresh: RolloutEngine,
    weights: Mapping[str, Tensor],
    damage: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> None:
    serve(fresh, weights)
    with pytest.raises(WeightVersionError):
        serve(fresh, damage(weights), step=1)
    assert_refuses(fresh)


def test_weights_that_are_not_the_versions_are_refused(
    fresh: RolloutEngine, weights: Mapping[str, Tensor]
) -> None:
    serve(fresh, weights)
    channel = MemoryChannel()
    forged = WeightVersion(step=1, digest=weights_digest(changed(weights, "model.norm.weight")))
    channel.publish(forged, FullWeights(tensors=weights))
    with pytest.raises(WeightVersionError, match="digest"):
        run(fresh.load(forged, channel))
    assert_refuses(fresh)


def test_a_version_that_left_the_channel_is_refused(
    fresh: RolloutEngine, weights: Mapping[str, Tensor]
) -> None:
    old, channel = published(weights)
    run(fresh.load(old, channel))
    newer = changed(weights, "model.norm.weight")
    published_later = WeightVersion(step=1, digest=weights_digest(newer))
    channel.publish(published_later, FullWeights(tensors=newer))
    with pytest.raises(WeightVersionError):
        run(fresh.load(old, channel))
    assert_refuses(fresh)


def test_a_good_load_ends_the_refusal(
    fresh: RolloutEngine, weights: Mapping[str, Tensor], reference: PreTrainedModel
) -> None:
    with pytest.raises(WeightVersionError):
        serve(fresh, without_one(weights))
    serve(fresh, weights)
    assert parity_gap(generate(fresh, ragged_requests()), reference) < PARITY_NATS


# --- Overlapping calls --------------------------------------------------------------------------


@pytest.mark.parametrize("max_sequences", [3, 64])
def test_calls_that_overlap_get_their_own_rollouts_as_if_alone(
    adapter: EngineAdapter,
    tiny_models: TinyModels,
    weights: Mapping[str, Tensor],
    expected: list[Rollout],
    max_sequences: int,
) -> None:
    engine = adapter.build(tiny_models.student, max_sequences=max_sequences)
    serve(engine, weights)
    calls = [requests_of(expected[start::4]) for start in range(4)]

    async def overlap() -> list[list[Rollout]]:
        background = asyncio.create_task(collect(engine, long_requests(2, new_tokens=LONG)))
        started: list[asyncio.Task[list[Rollout]]] = []
        for index, requests in enumerate(calls):  # one after another, into what already runs
            await prefixes_when(
                engine,  # on a busy machine they may have ended before they are looked at
                lambda seen, n=2 * index: longest(seen) > n or background.done(),
            )
            started.append(asyncio.create_task(collect(engine, requests)))
        results = [await task for task in started]
        await background
        return results

    for requests, rollouts in zip(calls, run(overlap()), strict=True):
        assert {r.rollout_id for r in rollouts} == {r.rollout_id for r in requests}
        alone = [
            rollout
            for rollout in expected
            if rollout.rollout_id in {r.rollout_id for r in rollouts}
        ]
        assert_same_rollouts(rollouts, alone)


def ids_of(prefixes: Sequence[RolloutPrefix]) -> set[str]:
    return {prefix.request.rollout_id for prefix in prefixes}


def test_a_prefix_is_the_beginning_of_its_rollout_and_an_aborted_one_is_left_out(
    engine: StreamingRolloutEngine, tiny_models: TinyModels
) -> None:
    serve(engine, directory_weights(tiny_models.student))  # hardly ever stops

    async def watch() -> tuple[list[Rollout], list[RolloutPrefix]]:
        # Not all six: on a busy machine the first may end before the last is seen to run.
        collecting, prefixes = await collecting_when(
            engine, long_requests(6, new_tokens=LONG), lambda seen: "long5" in ids_of(seen)
        )
        await engine.abort(["long5", "nobody"])
        return await collecting, prefixes

    rollouts, prefixes = run(watch())
    by_id = {rollout.rollout_id: rollout for rollout in rollouts}
    assert sorted(by_id) == [f"long{i}" for i in range(5)]
    assert len(rollouts) == 5
    for prefix in prefixes:
        assert prefix.versions[-1].stop == prefix.response_ids.size
        if prefix.request.rollout_id in by_id:
            rollout = by_id[prefix.request.rollout_id]
            beginning = slice(prefix.response_ids.size)
            assert prefix.response_ids.tolist() == rollout.response_ids[beginning].tolist()
            assert np.array_equal(prefix.behavior_logprobs, rollout.behavior_logprobs[beginning])


def test_a_waiting_request_can_be_aborted(
    adapter: EngineAdapter, tiny_models: TinyModels, weights: Mapping[str, Tensor]
) -> None:
    engine = adapter.build(tiny_models.student, max_sequences=1)
    serve(engine, weights)

    async def abort_the_second() -> list[Rollout]:
        collecting, _ = await collecting_when(
            engine,
            long_requests(2, new_tokens=LONG),
            lambda seen: "long1" not in ids_of(seen) and 0 < longest(seen) < LONG / 2,
        )
        await engine.abort(["long1"])
        return await collecting

    assert [rollout.rollout_id for rollout in run(abort_the_second())] == ["long0"]


async def assert_stands_still(engine: StreamingRolloutEngine) -> None:
    before = await engine.prefixes()
    await asyncio.sleep(0.3)
    after = await engine.prefixes()
    assert [p.response_ids.size for p in after] == [p.response_ids.size for p in before]


def test_a_pause_holds_running_rollouts_and_new_requests_until_resume(
    engine: StreamingRolloutEngine, tiny_models: TinyModels
) -> None:
    serve(engine, directory_weights(tiny_models.student))  # hardly ever stops
    requests = long_requests(9, new_tokens=LONG)
    first, second = requests[:8], requests[8:]

    async def pause_under_way() -> list[Rollout]:
        running, _ = await collecting_when(engine, first, lambda seen: len(seen) >= 2)
        async with paused(engine):
            new = asyncio.create_task(collect(engine, second))
            await assert_stands_still(engine)
            assert not running.done()
        return [*await running, *await new]

    held = run(pause_under_way())
    assert_same_rollouts(held, generate(engine, [*first, *second]))


def test_a_paused_engine_takes_new_weights_and_stays_paused(
    engine: StreamingRolloutEngine, tiny_models: TinyModels
) -> None:
    weights = directory_weights(tiny_models.student)  # hardly ever stops
    serve(engine, weights)
    second, channel = published(changed(weights, "model.layers.0.mlp.down_proj.weight"), step=1)

    async def load_while_paused() -> list[Rollout]:
        requests = long_requests(24, new_tokens=LONG)
        running, _ = await collecting_when(engine, requests, lambda seen: len(seen) >= 2)
        async with paused(engine):
            await engine.load(second, channel)
            await assert_stands_still(engine)
            assert not running.done()
        return await running

    assert len(run(load_while_paused())) == 24


def test_a_consumer_that_leaves_early_ends_what_it_started(
    engine: StreamingRolloutEngine,
) -> None:
    async def leave() -> None:
        requests = [*long_requests(4, new_tokens=LONG), *ragged_requests(1, max_new_tokens=1)]
        stream = engine.generate(requests)
        await anext(stream)
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue] - a generator
        await prefixes_when(engine, lambda prefixes: not prefixes)

    run(leave())
    assert len(generate(engine, ragged_requests())) == len(ragged_requests())


# --- Weights that change under running rollouts -------------------------------------------------


def test_running_rollouts_go_on_with_new_weights_and_every_token_names_its_version(
    adapter: EngineAdapter,
    engine: StreamingRolloutEngine,
    tiny_models: TinyModels,
) -> None:
    weights = directory_weights(tiny_models.student)  # hardly ever stops
    serve(engine, weights)
    first = engine.version
    new = changed(weights, "model.layers.0.mlp.down_proj.weight")
    second, channel = published(new, step=1)

    async def swap_under_way() -> list[Rollout]:
        collecting, _ = await collecting_when(
            engine,
            long_requests(24, new_tokens=LONG),
            lambda seen: len(seen) >= 6 and longest(seen) >= 6,
        )
        await engine.load(second, channel)
        assert engine.version == second
        return await collecting

    rollouts = run(swap_under_way())
    assert len(rollouts) == 24
    mixed = [rollout for rollout in rollouts if len(rollout.versions) == 2]
    assert len(mixed) >= 6
    assert {span.version for rollout in rollouts for span in rollout.versions} == {first, second}
    old_model = reference_model(tiny_models.student, weights)
    new_model = reference_model(tiny_models.student, new)

    def gap(rollout: Rollout, off_by: int) -> float:
        wanted = swapped_logprobs(
            old_model,
            new_model,
            rollout,
            rollout.versions[1].start + off_by,
            keeps_cache=adapter.keeps_cache_over_updates,
        )
        return largest_gap(rollout.behavior_logprobs, wanted)

    for rollout in mixed:
        assert [span.version for span in rollout.versions] == [first, second]
        assert gap(rollout, 0) < PARITY_NATS
    for off_by_one in (-1, 1):  # the check would see it
        assert max(gap(rollout, off_by_one) for rollout in mixed) > FAR_NATS


def test_a_new_rollout_does_not_find_what_older_weights_computed_for_a_running_one(
    engine: StreamingRolloutEngine, tiny_models: TinyModels
) -> None:
    """A running rollout may keep its cache over an update, with a prompt that others share."""
    weights = directory_weights(tiny_models.student)  # hardly ever stops
    serve(engine, weights)
    new = changed(weights, "model.layers.0.mlp.down_proj.weight")
    second, channel = published(new, step=1)
    requests = [
        make_request(f"r{i}", make_prompt(CACHED_PROMPT, seed=i), make_spec(i, max_new_tokens=LONG))
        for i in range(24)
    ]

    async def begin_beside() -> list[Rollout]:
        collecting, _ = await collecting_when(engine, requests, lambda seen: longest(seen) >= 6)
        await engine.load(second, channel)
        same_prompts = [
            make_request(f"new-{prefix.request.rollout_id}", prefix.request.prompt, make_spec(7))
            for prefix in await engine.prefixes()
            if prefix.versions[0].version != second
        ]
        assert same_prompts  # what ran over the update has a cache of the old weights
        rollouts = await collect(engine, same_prompts)
        await collecting
        return rollouts

    old_model = reference_model(tiny_models.student, weights)
    rollouts = run(begin_beside())
    assert parity_gap(rollouts, reference_model(tiny_models.student, new)) < PARITY_NATS
    assert parity_gap(rollouts, old_model) > FAR_NATS  # the check would see it


def test_a_load_that_fails_ends_what_runs(
    engine: StreamingRolloutEngine, tiny_models: TinyModels
) -> None:
    weights = directory_weights(tiny_models.student)  # hardly ever stops
    serve(engine, weights)
    absent, channel = published(without_one(weights), step=1)

    async def fail_under_way() -> list[Rollout]:
        requests = long_requests(24, new_tokens=LONG)
        collecting, _ = await collecting_when(engine, requests, lambda seen: len(seen) >= 2)
        with pytest.raises(WeightVersionError):
            await engine.load(absent, channel)
        return await collecting

    assert len(run(fail_under_way())) < 24
    assert_refuses(engine)


def test_close_may_be_called_twice(fresh: RolloutEngine) -> None:
    run(fresh.close())
    run(fresh.close())
