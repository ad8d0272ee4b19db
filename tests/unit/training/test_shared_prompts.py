"""A prompt that is computed once for all of its answers: the same step, with fewer tokens."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from qwen3_distill.config import EmbeddedTraining, LoraTuning, OptimizerConfig, SampledReverseKL
from qwen3_distill.config.load import check_config, load_config
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training import flash_rows, prompt_attention
from qwen3_distill.training.batching import (
    MicroBatch,
    SharedPrompt,
    collate,
    micro_batches,
    triangle,
)
from qwen3_distill.training.embedded.student import EmbeddedLearner, build_embedded_learner
from qwen3_distill.training.prompt_attention import (
    PromptAttention,
    hidden_states,
    share_prompts,
    without_answers,
)
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import Batch, Rollout, ScoredRollout, TeacherScore, TokenSpan, Update
from tests.contract.builders import make_prompt, synthetic_rollout
from tests.flash_stand_in import FlashStandIn
from tests.tiny_models import TinyModels, write_model

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
Groups = list[tuple[int, list[int]]]
"""Prompt tokens and the response tokens of its answers."""
EVEN: Groups = [(5, [4, 4, 4]), (3, [6, 6])]
UNEVEN: Groups = [(5, [4, 1, 7]), (1, [3]), (4, [1, 1]), (6, [2, 9, 2, 5])]
ALIKE: Groups = [(5, [6, 6, 6]), (5, [6, 6, 6])]
ALIKE_SINGLE: Groups = [(3, [7]), (3, [7]), (3, [7])]
ALIKE_SHORT: Groups = [(3, [1]), (3, [1])]
LONG_PROMPTS: Groups = [(40, [3, 3, 3]), (40, [3, 3, 3])]

group = st.tuples(st.integers(1, 6), st.lists(st.integers(1, 8), min_size=1, max_size=4))
groups_of_prompts = st.lists(group, min_size=1, max_size=5)


def batch_of(groups: Groups, *, shuffle: int = 0) -> Batch:
    """Rollouts of every group's prompt, in an order drawn from ``shuffle``."""
    rng = np.random.default_rng(7)
    scored = list[ScoredRollout]()
    for number, (prompt_tokens, responses) in enumerate(groups):
        for sample, size in enumerate(responses):
            draft = synthetic_rollout(prompt_tokens, size, 100 * number + sample)
            rollout = replace(
                draft,
                prompt=make_prompt(prompt_tokens, number),
                behavior_logprobs=-rng.uniform(3, 8, size).astype(np.float32),
            )
            score = TeacherScore(teacher_id="t", logprobs=-rng.uniform(3, 8, size))
            scored.append(ScoredRollout(rollout=rollout, score=score))
    order = np.random.default_rng(shuffle).permutation(len(scored))
    return Batch(
        scored=tuple(scored[index] for index in order),
        importance_weights=rng.uniform(0.3, 2, len(scored)),
        task_advantages=rng.normal(size=len(scored)),
    )


def paths_of(micro: MicroBatch) -> list[Tensor]:
    """The places of each rollout's input tokens, prompt first."""
    paths = list[Tensor]()
    assert micro.shared is not None
    for shared in micro.shared:
        prompt = torch.arange(shared.start, shared.start + shared.prompt_tokens)
        start = shared.start + shared.prompt_tokens
        for tokens in shared.answer_tokens:
            paths.append(torch.cat([prompt, torch.arange(start, start + tokens)]))
            start += tokens
    return paths


def ids_of(rollout: Rollout) -> Tensor:
    ids = np.concatenate([rollout.prompt.token_ids, rollout.response_ids])
    return torch.from_numpy(ids).long()


# --- Layout -------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(groups=groups_of_prompts, max_tokens=st.integers(1, 60), shuffle=st.integers(0, 3))
def test_every_rollout_stands_behind_its_own_prompt(
    groups: Groups, max_tokens: int, shuffle: int
) -> None:
    batch = batch_of(groups, shuffle=shuffle)
    seen = list[int]()
    for micro in micro_batches(batch, max_tokens, shared_prompts=True):
        paths = paths_of(micro)
        seen.extend(micro.rollouts)
        assert micro.input_BT.shape[0] == 1
        assert micro.input_BT.numel() <= max_tokens or len(paths) == 1 or _all_short(micro)
        index_N = micro.loss_index_N.split(list(micro.loss_tokens))
        target_N = micro.target_N.split(list(micro.loss_tokens))
        for index, path, predicted_at, target in zip(
            micro.rollouts, paths, index_N, target_N, strict=True
        ):
            rollout = batch.scored[index].rollout
            assert micro.input_BT[0, path].tolist() == ids_of(rollout)[:-1].tolist()
            assert micro.position_BT[0, path].tolist() == list(range(len(path)))
            assert predicted_at.tolist() == path[rollout.prompt.token_ids.size - 1 :].tolist()
            assert target.tolist() == rollout.response_ids.tolist()
    assert sorted(seen) == list(range(len(batch.scored)))


def _all_short(micro: MicroBatch) -> bool:
    """Whether the row is one prompt that alone is too long, and answers of one token."""
    assert micro.shared is not None
    return len(micro.shared) == 1 and sum(micro.shared[0].answer_tokens) == 0


def test_the_tokens_of_a_prompt_are_there_once_and_only_its_own_pairs_are_counted() -> None:
    (micro,) = micro_batches(batch_of(EVEN), 1000, shared_prompts=True)
    assert micro.input_BT.numel() == sum(micro.sequence_tokens) == (5 + 3 * 3) + (3 + 2 * 5)
    first = triangle(5) + 3 * (triangle(8) - triangle(5))
    second = triangle(3) + 2 * (triangle(8) - triangle(3))
    assert micro.attention_pairs == first + second


def test_tokens_that_were_not_sampled_are_inputs_only() -> None:
    batch = batch_of([(3, [5, 4])])
    holed = replace(
        batch.scored[0].rollout,
        sampled=(TokenSpan(start=0, stop=1), TokenSpan(start=3, stop=4)),
        behavior_logprobs=np.array([-1.0, -2.0], dtype=np.float32),
        versions=(replace(batch.scored[0].rollout.versions[0], stop=2),),
    )
    score = TeacherScore(teacher_id="t", logprobs=np.array([-1.0, -2.0]))
    scored = (ScoredRollout(rollout=holed, score=score), batch.scored[1])
    (micro,) = micro_batches(replace(batch, scored=scored), 100, shared_prompts=True)
    place = micro.rollouts.index(0)
    path = paths_of(micro)[place]
    index = micro.loss_index_N.split(list(micro.loss_tokens))[place]
    assert index.tolist() == path[[2, 5]].tolist()


# --- Hidden states and gradient -----------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    directory = write_model(tmp_path_factory.mktemp("model") / "m", seed=3)
    return load_model(directory, device=CPU, dtype=torch.float64)


def alone(model: PreTrainedModel, batch: Batch, index: int) -> Tensor:
    """[R, D]: hidden states that predict a rollout's response, of the sequence by itself."""
    inner: Any = model.model
    rollout = batch.scored[index].rollout
    hidden_1TD = inner(input_ids=ids_of(rollout)[None, :-1], use_cache=False).last_hidden_state
    return hidden_1TD[0, rollout.prompt.token_ids.size - 1 :]


def behind_prompts(model: PreTrainedModel, micro: MicroBatch) -> list[Tensor]:
    """[R, D] of every rollout of the micro-batch, computed behind its prompt."""
    assert micro.shared is not None
    share_prompts(model)
    attention = PromptAttention(micro.shared, CPU)
    hidden = hidden_states(model, micro.input_BT, micro.position_BT, attention)
    return list(micro.at_loss_tokens(hidden).split(list(micro.loss_tokens)))


def gradient(model: PreTrainedModel, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of a loss in which every position and dimension has another weight."""
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros((), dtype=torch.float64)
    for states in hidden:
        weights = torch.randn(states.shape, generator=generator, dtype=torch.float64)
        loss = loss + (states * weights).sum()
    return list(torch.autograd.grad(loss, list(model.model.parameters())))


@pytest.fixture(params=["as on a CPU", "cuDNN's lengths", "one launch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways of attention that there are on a GPU, with a kernel that runs here too."""
    if request.param == "cuDNN's lengths":
        of_cpu = prompt_attention._attend_alike
        monkeypatch.setattr(
            prompt_attention,
            "_attend_alike",
            lambda alike, of_row, options, multiple: of_cpu(alike, of_row, options, 16),
        )
    if request.param == "one launch":
        monkeypatch.setattr(prompt_attention, "flash_runs", lambda *given: True)
        monkeypatch.setattr(flash_rows, "_Flash", FlashStandIn)
    return request.param


ALL_GROUPS = [EVEN, UNEVEN, ALIKE, ALIKE_SINGLE, ALIKE_SHORT, LONG_PROMPTS]
NAMES = ["even", "uneven", "alike", "alike single", "alike short", "long prompts"]


def test_whole_sequences_are_taken_where_all_are_alike_and_prompts_are_not_too_long() -> None:
    whole = list[bool]()
    for groups in ALL_GROUPS:
        (micro,) = micro_batches(batch_of(groups), 1000, shared_prompts=True)
        assert micro.shared is not None
        whole.append(PromptAttention(micro.shared, CPU)._alike is not None)
    assert whole == [False, False, True, True, True, False]


@pytest.mark.parametrize("groups", ALL_GROUPS, ids=NAMES)
@pytest.mark.usefixtures("way")
def test_hidden_states_and_gradient_are_those_of_the_sequences_alone(
    model: PreTrainedModel, groups: Groups
) -> None:
    batch = batch_of(groups)
    (micro,) = micro_batches(batch, 1000, shared_prompts=True)
    ours = behind_prompts(model, micro)
    theirs = [alone(model, batch, index) for index in micro.rollouts]
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, rtol=1e-10, atol=1e-11)
    # The norms compute in float32, whatever the weights are.
    for mine, other in zip(gradient(model, ours), gradient(model, theirs), strict=True):
        assert_close(mine, other, rtol=0, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize(("groups", "answers"), [(UNEVEN, 4), (ALIKE, 3)], ids=["uneven", "alike"])
@pytest.mark.usefixtures("way")
def test_answers_do_not_see_one_another_and_the_prompt_sees_none(
    model: PreTrainedModel, groups: Groups, answers: int
) -> None:
    batch = batch_of(groups)
    (micro,) = micro_batches(batch, 1000, shared_prompts=True)
    paths = paths_of(micro)
    assert micro.shared is not None
    prompt = micro.shared[0].prompt_tokens
    assert len(micro.shared[0].answer_tokens) == answers
    answer = paths[2][prompt:]  # of the first prompt: answers stand before it
    changed = micro.input_BT.clone()
    changed[0, answer] = (changed[0, answer] + 1) % 200
    other = replace(micro, input_BT=changed)
    before, after = (behind_prompts(model, each) for each in (micro, other))
    assert not torch.equal(before[2], after[2])
    for place, (mine, theirs) in enumerate(zip(before, after, strict=True)):
        if place != 2:
            assert torch.equal(mine, theirs), f"answer {place} saw another one"


@pytest.mark.parametrize("groups", [UNEVEN, ALIKE_SINGLE], ids=["uneven", "alike"])
@pytest.mark.usefixtures("way")
def test_packed_sequences_are_prompts_without_answers(
    model: PreTrainedModel, groups: Groups
) -> None:
    batch = batch_of(groups)
    (micro,) = micro_batches(batch, 1000, packed=True)
    rows = without_answers(micro.sequence_tokens)
    ours = behind_prompts(model, replace(micro, shared=tuple(rows)))
    for mine, index in zip(ours, micro.rollouts, strict=True):
        assert_close(mine, alone(model, batch, index), rtol=1e-10, atol=1e-11)


MIXED = [(4, (3, 5, 2)), (6, ()), (1, (0, 2)), (3, (0,)), (2, (7,))]
"""Tokens of prompts and their answers: none, or 0 where the one token is a target only."""


def test_the_gradient_of_copied_keys_is_their_sum_and_the_same_every_time() -> None:
    start, shared = 0, list[SharedPrompt]()
    for prompt, answers in MIXED:
        shared.append(SharedPrompt(start=start, prompt_tokens=prompt, answer_tokens=answers))
        start += prompt + sum(answers)
    copied = flash_rows.flash_row(shared, CPU).copied
    assert copied is not None
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(start, 2, 4, generator=generator).requires_grad_()
    out = copied.of(values)
    assert torch.equal(out, values[copied.place_S])
    weights = torch.randn(out.shape, generator=generator)
    found, again = (torch.autograd.grad(copied.of(values), values, weights)[0] for _ in range(2))
    total = torch.zeros(values.shape, dtype=torch.float64)
    assert_close(found.double(), total.index_add(0, copied.place_S, weights.double()))
    assert torch.equal(found, again)
    alone = [SharedPrompt(start=0, prompt_tokens=4, answer_tokens=(0,))]
    assert flash_rows.flash_row(alone, CPU).copied is None


@pytest.mark.gpu
@pytest.mark.parametrize("groups", ALL_GROUPS, ids=NAMES)
def test_the_kernels_of_the_gpu_compute_the_same(groups: Groups) -> None:
    (micro,) = micro_batches(batch_of(groups), 1000, shared_prompts=True)
    assert micro.shared is not None
    generator = torch.Generator().manual_seed(0)
    heads = [(8, "query"), (2, "key"), (2, "value"), (8, "weights")]
    shapes = [(count, micro.input_BT.numel(), 64) for count, _ in heads]
    drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]

    def results(device: str, dtype: torch.dtype) -> list[Tensor]:
        query, key, value, weights = (values.to(device, dtype) for values in drawn)
        given = [values.requires_grad_() for values in (query, key, value)]
        out = PromptAttention(micro.shared or (), torch.device(device))(*given)
        return [out, *torch.autograd.grad((out * weights).sum(), given)]

    assert flash_rows.flash_runs(torch.device("cuda"), torch.bfloat16, 64)
    for ours, exact in zip(
        results("cuda", torch.bfloat16), results("cpu", torch.float64), strict=True
    ):
        assert_close(ours.double().cpu(), exact, rtol=0, atol=2e-2 * float(exact.abs().max()))


def test_a_model_that_shares_prompts_attends_as_before_without_one(
    model: PreTrainedModel,
) -> None:
    share_prompts(model)
    inner: Any = model.model
    ids = torch.tensor([[5, 6, 7, 8], [9, 1, 2, 3]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    ours = inner(input_ids=ids, attention_mask=mask).last_hidden_state
    model.config._attn_implementation = "sdpa"
    assert torch.equal(inner(input_ids=ids, attention_mask=mask).last_hidden_state, ours)


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    directory = write_model(
        tmp_path / "m", seed=0, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    with pytest.raises(ConfigError, match="sliding window"):
        share_prompts(load_model(directory, device=CPU, dtype=torch.float32))


# --- The step -----------------------------------------------------------------------------------


def learner_of(models: TinyModels, **training: Any) -> EmbeddedLearner:
    training.setdefault("micro_batch_tokens", 30)
    return build_embedded_learner(
        LearnerSettings(
            model_dir=models.student,
            training=EmbeddedTraining(
                kind="embedded",
                device="cpu",
                optimizer=OptimizerConfig(learning_rate=1e-3),
                **training,
            ),
            objective=SampledReverseKL(kind="sampled_reverse_kl"),
            total_steps=9,
            seed=0,
        )
    )


def metric(update: Update, key: str) -> float:
    return next(metric.total for metric in update.metrics if metric.key == key)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_checkpointing": True},
        {"tuning": LoraTuning(kind="lora", rank=4), "micro_batch_tokens": 18},
    ],
    ids=["full", "recomputed", "lora"],
)
def test_a_step_is_the_one_without_shared_prompts(
    tiny_models: TinyModels, training: dict[str, Any]
) -> None:
    batch = batch_of(UNEVEN, shuffle=2)
    own = learner_of(tiny_models, **training)
    shared = learner_of(tiny_models, shared_prompts=True, **training)
    for _ in range(2):
        asyncio.run(own.update(batch))
        asyncio.run(shared.update(batch))
    theirs, ours = (asyncio.run(each.update(batch)) for each in (own, shared))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    assert ours.num_loss_tokens == theirs.num_loss_tokens
    own_weights, shared_weights = (dict(each.payload().tensors) for each in (own, shared))
    for name, weights in own_weights.items():
        assert_close(shared_weights[name], weights, rtol=1e-3, atol=2e-5)
    assert metric(ours, "train/input_tokens") < metric(theirs, "train/input_tokens")
    assert metric(ours, "train/padding_tokens") == 0


def test_groups_longer_than_a_micro_batch_are_cut_and_have_the_prompt_in_each_part() -> None:
    batch = batch_of([(5, [9, 9, 9, 9])])
    split = list(micro_batches(batch, 25, shared_prompts=True))
    assert [micro.input_BT.numel() for micro in split] == [5 + 16, 5 + 16]
    assert collate(batch, [0]).shared is None


# --- Config -------------------------------------------------------------------------------------


def test_replay_draws_single_rollouts_and_is_refused() -> None:
    config = load_config(ROOT / "configs/demo.yaml", ["training.shared_prompts=true"])
    assert config.training.kind == "embedded"
    assert config.training.shared_prompts
    values = config.model_dump() | {"replay": {"capacity_tokens": 100_000}}
    values["objective"] = {"kind": "sampled_reverse_kl", "ratio_cap": 2.0}
    with pytest.raises(ConfigError, match=r"training\.shared_prompts=true with replay"):
        check_config(values)
