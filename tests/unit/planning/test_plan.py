"""What a plan adds up to, what wins over it, and what it says when it does not fit."""

import re
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config, load_config
from qwen3_distill.errors import ConfigError, ModelError
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.modeling.step_memory import GIB, Checkpointing
from qwen3_distill.planning import device
from qwen3_distill.planning.cards import CardPlan, plan_cards
from qwen3_distill.planning.device import DeviceMemory, stated_memory
from qwen3_distill.planning.memory import Models, PlanRow, checkpointing, step_memory
from qwen3_distill.planning.plan import MemoryPlan, lay_out, make_plan, planned_device

ROOT = Path(__file__).parents[3]
CUDA = DeviceMemory(kind="cuda", name="GPU", free_bytes=0)


def config(
    *,
    generation: dict[str, Any] | None = None,
    scoring: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **values: Any,
) -> RunConfig:
    """256 rollouts of the real engines, with changes."""
    return check_config(
        {
            "output_dir": "runs/plan",
            "steps": 1,
            "prompts_per_step": 256,
            "student": {"model": "no/student"},
            "prompts": {"kind": "task"},
            "sampling": {"max_new_tokens": 512},
            "generation": {"kind": "vllm", **(generation or {})},
            "scoring": {"kind": "sglang", "model": "no/teacher", **(scoring or {})},
            "training": {"kind": "unsloth", **(training or {})},
            "objective": {"kind": "sampled_reverse_kl"},
            **values,
        }
    )


def planned(
    run: RunConfig, gib: float, *, student: str = "4B", teacher: str = "32B-FP8"
) -> MemoryPlan:
    return make_plan(
        run,
        device_memory_bytes=int(gib * GIB),
        student_shape=named_shape(student),
        teacher_shape=named_shape(teacher),
    )


def size(plan: MemoryPlan, engine: str, what: str) -> int:
    (row,) = [row for row in plan.rows if (row.engine, row.what) == (engine, what)]
    return row.num_bytes


def freed_by(error: str) -> dict[str, float]:
    """Setting to GiB, as the message says."""
    _, _, advice = error.partition("What would free memory:")
    return {key: float(gib) for key, gib in re.findall(r"^  (\S+): ([\d.]+) GiB$", advice, re.M)}


# --- Whole plans --------------------------------------------------------------------------------


def test_4b_from_32b_fp8_fits_112_gib_and_unquantized_does_not() -> None:
    plan = planned(config(), 112)
    assert plan.required_bytes <= 112 * GIB
    with pytest.raises(ConfigError, match=r"there are 112\.0 GiB") as caught:
        planned(config(scoring={"quantization": None}), 112, teacher="32B")
    saved = named_shape("32B").weight_bytes(2) - named_shape("32B").fp8_weight_bytes(2)
    found = freed_by(str(caught.value))
    assert found["scoring.quantization=fp8"] == pytest.approx(saved / GIB, abs=0.05)


def test_online_fp8_is_planned_like_the_checkpoint() -> None:
    online = planned(config(), 140, teacher="32B")
    assert online.rows == planned(config(), 140).rows


def test_online_fp8_must_hold_the_unquantized_weights_while_loading() -> None:
    small = {"max_sequences": 16, "max_model_tokens": 1024}
    lean = config(generation=small, planning={"reserve_gib": 0})
    planned(lean, 60, student="0.6B")
    with pytest.raises(ConfigError, match=r"61.0 GiB of weights.*FP8 checkpoint"):
        planned(lean, 60, student="0.6B", teacher="32B")


def test_rows_and_reserve_add_up() -> None:
    plan = planned(config(planning={"reserve_gib": 3.0}), 140)
    parts = [plan.engine_bytes("teacher"), plan.engine_bytes("student")]
    parts += [plan.engine_bytes("learner"), 3 * GIB]
    assert plan.required_bytes == sum(parts) == sum(r.num_bytes for r in plan.rows) + 3 * GIB
    assert all(part > GIB for part in parts)


def test_plan_needs_no_memory_to_be_looked_up_when_stated_in_the_config() -> None:
    run = config(planning={"device_memory_gib": 130.0})
    student, teacher = named_shape("4B"), named_shape("8B")
    plan = make_plan(run, student_shape=student, teacher_shape=teacher)
    assert plan.device.free_bytes == 130 * GIB
    assert planned(run, 150).device.free_bytes == 150 * GIB


def test_stated_memory_that_the_cpu_shares_counts_the_host_side_and_offloads_nothing() -> None:
    shapes: dict[str, Any] = {
        "student_shape": named_shape("4B"),
        "teacher_shape": named_shape("32B-FP8"),
    }
    run = config(training={"gradient_checkpointing": "unsloth"})
    own = make_plan(run, device=stated_memory(140 * GIB), **shapes)
    shared = make_plan(run, device=stated_memory(140 * GIB, unified=True), **shapes)
    for engine, gib in (("teacher", 2.25), ("student", 1.75), ("learner", 1.75)):
        contexts = [size(plan, engine, "CUDA context") for plan in (own, shared)]
        assert contexts[1] - contexts[0] == gib * GIB
    models = Models(student=named_shape("4B"), teacher=named_shape("32B-FP8"))
    for mode in ("auto", "unsloth"):
        run = config(training={"gradient_checkpointing": mode})
        offloads = [
            checkpointing(run, models, stated_memory(0, unified=unified), 0).offload
            for unified in (False, True)
        ]
        assert offloads == [True, False], mode


@pytest.mark.parametrize("gib", [122, 125, 128, 131, 134, 137, 140])
def test_learner_keeps_no_more_layers_than_fit_beside_its_host_side(gib: int) -> None:
    shapes: dict[str, Any] = {
        "student_shape": named_shape("4B"),
        "teacher_shape": named_shape("32B-FP8"),
    }
    shared = stated_memory(gib * GIB, unified=True)
    plan = make_plan(config(), device=shared, **shapes)
    # What is planned can be stated.
    run = config(training={"memory_gib": plan.learner_memory_bytes / GIB})
    assert make_plan(run, device=shared, **shapes).rows == plan.rows


def test_memory_that_a_config_states_is_shared_where_the_gpu_here_shares_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = config(planning={"device_memory_gib": 140.0})
    shapes: dict[str, Any] = {
        "student_shape": named_shape("4B"),
        "teacher_shape": named_shape("32B-FP8"),
    }
    monkeypatch.setattr(device, "_first_gpu", lambda: ("NVIDIA GB10", None))
    for plan in (make_plan(run, **shapes), plan_cards(run, **shapes)[0].plan):
        assert (plan.device.kind, plan.device.free_bytes) == ("unified", 140 * GIB)
    assert planned_device(run, unified=False).kind == "cuda"


def test_default_reserve_is_an_eighth_of_small_memories() -> None:
    assert laid_out(config(), 16).reserve_bytes == 2 * GIB
    assert laid_out(config(), 160).reserve_bytes == 8 * GIB


def laid_out(run: RunConfig, gib: int) -> MemoryPlan:
    """Whether it fits or not."""
    return lay_out(
        run,
        device_memory_bytes=gib * GIB,
        student_shape=named_shape("4B"),
        teacher_shape=named_shape("32B-FP8"),
    )


# --- Student ------------------------------------------------------------------------------------


def test_cache_holds_all_rollouts_at_their_ends() -> None:
    run = config(planning={"prompt_tokens": 128})
    per_token = named_shape("4B").kv_bytes_per_token(2)
    plan = planned(run, 140)
    assert plan.vllm_kv_cache_bytes >= 256 * 640 * per_token
    assert plan.vllm_kv_cache_bytes <= 256 * 660 * per_token
    assert size(plan, "student", "key-value cache") == plan.vllm_kv_cache_bytes


def test_samples_of_a_prompt_share_its_part_of_the_cache() -> None:
    alone, shared = planned(config(), 140), planned(config(samples_per_prompt=8), 140)
    per_token = named_shape("4B").kv_bytes_per_token(2)
    saved = alone.vllm_kv_cache_bytes - shared.vllm_kv_cache_bytes
    assert saved == (256 - 32) * 256 * per_token


def test_cache_holds_one_longest_sequence_at_least() -> None:
    few = planned(config(generation={"max_sequences": 1}), 140)
    assert few.vllm_kv_cache_bytes >= 40960 * named_shape("4B").kv_bytes_per_token(2)


def test_a_cache_in_fp8_is_half_as_large() -> None:
    plain = planned(config(), 140)
    small = planned(config(generation={"kv_cache_dtype": "fp8"}), 140)
    assert small.vllm_kv_cache_bytes * 2 == plain.vllm_kv_cache_bytes
    stated = {"kv_cache_gib": 3.0, "kv_cache_dtype": "fp8"}  # 5.6 GiB for the longest as bfloat16
    assert planned(config(generation=stated), 140).vllm_kv_cache_bytes == 3 * GIB


def test_quantized_rollouts_halve_the_weights() -> None:
    plan = planned(config(generation={"quantization": "fp8"}), 140)
    assert size(plan, "student", "weights") == named_shape("4B").fp8_weight_bytes(2)


def test_swapped_adapters_have_a_slot_and_merged_ones_a_copy_of_the_layers() -> None:
    swap, merge = planned(config(), 140), planned(config(generation={"adapters": "merge"}), 140)
    assert size(swap, "student", "adapter") == 66_060_288 * 2
    assert size(merge, "learner", "merged weights") == named_shape("4B").linear_parameters * 2
    with pytest.raises(ConfigError) as caught:
        planned(config(generation={"adapters": "merge"}), 90)
    # Two copies: a version is made while engines may still read the last one.
    saved = (2 * named_shape("4B").linear_parameters - 66_060_288) * 2 / GIB
    found = freed_by(str(caught.value))["generation.adapters=swap"]
    activations = 1.2 * 1.6  # of 35 recomputed layers: less than a copy
    assert found == pytest.approx(saved - activations, abs=0.1)
    full = planned(
        config(training={"tuning": {"kind": "full"}, "dtype": "float32"}), 200, teacher="8B"
    )
    assert all(row.what not in ("adapter", "merged weights") for row in full.rows)


def test_stated_cache_wins_and_must_hold_one_sequence() -> None:
    plan = planned(config(generation={"kv_cache_gib": 6.0}), 140)
    assert plan.vllm_kv_cache_bytes == 6 * GIB == size(plan, "student", "key-value cache")
    with pytest.raises(ConfigError, match=r"kv_cache_gib=1.0 holds 7281 tokens.*40960"):
        planned(config(generation={"kv_cache_gib": 1.0}), 140)
    planned(config(generation={"kv_cache_gib": 1.0, "max_model_tokens": 7000}), 140)


# --- Teacher ------------------------------------------------------------------------------------


def test_fraction_covers_weights_and_cache_and_leaves_the_rest() -> None:
    plan = planned(config(), 140)
    static = size(plan, "teacher", "weights") + size(plan, "teacher", "key-value cache")
    share = plan.sglang_memory_fraction * 140 * GIB
    assert share > static * 1.02
    assert share < static + 24 * GIB
    cache = plan.sglang_max_total_tokens * named_shape("32B").kv_bytes_per_token(2)
    assert size(plan, "teacher", "key-value cache") == cache


def test_fraction_of_a_second_start_is_of_what_is_then_free() -> None:
    plan = planned(config(), 140)
    again = plan.teacher_memory_fraction(80 * GIB)
    assert again * 80 == pytest.approx(plan.sglang_memory_fraction * 140, rel=1e-3)
    assert plan.teacher_memory_fraction(10 * GIB) == 0.95


def test_graphs_of_the_teachers_own_answers_are_counted() -> None:
    plan = planned(config(scoring={"decode_graphs": True}), 140)
    assert size(plan, "teacher", "CUDA graphs") == GIB


def test_graphs_of_more_than_512_sequences_are_counted() -> None:
    def graphs(**generation: Any) -> float:
        plan = planned(config(generation=generation), 600)
        return size(plan, "student", "CUDA graphs") / GIB

    assert graphs(max_sequences=64) == graphs(max_sequences=512) == 1.25
    assert graphs(max_sequences=1024) == 2.5
    smaller = {"compilation_config": {"cudagraph_capture_sizes": [64]}}
    assert graphs(max_sequences=1024, engine_arguments=smaller) == 1.25


def test_stated_fraction_and_tokens_win() -> None:
    plan = planned(config(scoring={"memory_fraction": 0.4, "max_total_tokens": 9000}), 140)
    assert (plan.sglang_memory_fraction, plan.sglang_max_total_tokens) == (0.4, 9000)
    cache = 9000 * named_shape("32B").kv_bytes_per_token(2)
    assert size(plan, "teacher", "key-value cache") == cache


def test_stated_fraction_alone_is_filled_with_cache() -> None:
    plan = planned(config(scoring={"memory_fraction": 0.4}), 140)
    weights = size(plan, "teacher", "weights")
    assert weights + size(plan, "teacher", "key-value cache") == int(0.4 * 140 * GIB)


def test_fraction_below_the_weights_and_cache_below_a_sequence_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory_fraction=0.2.*weights alone need 32.0 GiB"):
        planned(config(scoring={"memory_fraction": 0.2}), 140)
    with pytest.raises(ConfigError, match=r"max_total_tokens=700 cannot hold.*768 tokens"):
        planned(config(scoring={"max_total_tokens": 700}), 140)


def test_servers_that_run_elsewhere_take_nothing() -> None:
    plan = planned(config(scoring={"urls": ["http://10.0.0.2:30000"]}), 80)
    assert plan.engine_bytes("teacher") == 0


# --- Learner ------------------------------------------------------------------------------------


def test_activations_are_those_that_the_learner_decides_by() -> None:
    run, shape = config(), named_shape("4B")
    models = Models(student=shape, teacher=shape)
    model = step_memory(run, models, CUDA)
    for mode, layers, offload in [("off", 0, False), ("on", 36, False), ("unsloth", 36, True)]:
        plan = planned(config(training={"gradient_checkpointing": mode}), 140)
        choice = Checkpointing(recomputed_layers=layers, offload=offload)
        assert size(plan, "learner", "activations and logits") == model.step_bytes(8192, choice)
    merging = config(generation={"adapters": "merge"})
    assert step_memory(merging, models, CUDA).merged_bytes == 2 * shape.linear_parameters


def test_where_memory_is_one_no_inputs_wait_in_the_hosts() -> None:
    run = config(training={"gradient_checkpointing": "unsloth"})
    shape = named_shape("4B")
    models = Models(student=shape, teacher=shape)
    unified = DeviceMemory(kind="unified", name="GB10", free_bytes=0)
    assert checkpointing(run, models, CUDA, 0).offload
    assert not checkpointing(run, models, unified, 0).offload


def test_a_replay_buffer_is_planned_and_leaves_less_for_activations() -> None:
    replay = {"capacity_tokens": 2_000_000_000}
    without, kept = planned(config(), 140), planned(config(replay=replay), 140)
    buffer = size(kept, "learner", "replay")
    assert buffer == 12 * 2_000_000_000
    assert all(row.what != "replay" for row in without.rows)
    assert recomputed(kept) > recomputed(without)
    assert kept.fits


def activations(plan: MemoryPlan) -> PlanRow:
    """The learner's."""
    wanted = ("learner", "activations and logits")
    (row,) = [row for row in plan.rows if (row.engine, row.what) == wanted]
    return row


def recomputed(plan: MemoryPlan) -> int:
    found = re.search(r"(\d+) of 36 layers", activations(plan).how)
    assert found is not None
    return int(found[1])


def test_auto_recomputes_only_where_it_must() -> None:
    roomy, tight = planned(config(), 140), planned(config(), 112)
    assert recomputed(roomy) == 0
    assert 0 < recomputed(tight) < 36
    assert tight.fits


def test_learner_may_take_all_that_is_left() -> None:
    plan = planned(config(), 140)
    others = plan.engine_bytes("teacher") + plan.engine_bytes("student") + plan.reserve_bytes
    assert plan.learner_memory_bytes == 140 * GIB - others


def test_stated_memory_of_the_learner_wins_and_must_do() -> None:
    plan = planned(config(training={"memory_gib": 20.0}), 140)
    assert plan.learner_memory_bytes == 20 * GIB
    assert 0 < recomputed(plan) < 36
    with pytest.raises(ConfigError, match=r"memory_gib=10.0.*layers recomputed.*need 1\d\.\d GiB"):
        planned(config(training={"memory_gib": 10.0}), 140)


def test_full_tuning_counts_gradients_and_moments_of_every_weight() -> None:
    training = {"tuning": {"kind": "full"}, "dtype": "float32"}
    weights = named_shape("4B").weight_bytes(4)
    autocast = planned(config(training=training), 200, teacher="8B")
    assert size(autocast, "learner", "optimizer") == 3.5 * weights
    plain = planned(config(training={**training, "autocast": "off"}), 200, teacher="8B")
    assert size(plain, "learner", "optimizer") == 3 * weights


def full_tuning(**learner: Any) -> RunConfig:
    """Full tuning of the embedded learner on a card of its own."""
    training = {"kind": "embedded", "own_process": True, "dtype": "float32"}
    training |= {"tuning": {"kind": "full"}, "gradient_checkpointing": True}
    sections = {"rollouts": {}, "teachers": {}, "learner": learner}
    return config(training=training, cluster=sections)


def learners_card(run: RunConfig, gib: int) -> CardPlan:
    shapes: dict[str, Any] = {
        "student_shape": named_shape("4B"),
        "teacher_shape": named_shape("8B"),
    }
    return plan_cards(run, device_memory_bytes=gib * GIB, **shapes)[0]


def test_ranks_that_divide_the_states_fit_cards_that_whole_ones_do_not() -> None:
    shape = named_shape("4B")
    card = learners_card(full_tuning(ranks=2, sharded=True), 80)
    assert card.what == "each of the learner's 2 cards, which divide weights and optimizer"
    parts = shape.linear_parameters // 2 + shape.num_parameters - shape.linear_parameters
    assert size(card.plan, "learner", "weights") == 4 * parts
    copies = 2 * (shape.num_parameters - shape.linear_parameters)
    assert size(card.plan, "learner", "optimizer") == 12 * parts + copies
    layer = shape.linear_parameters / shape.num_layers
    assert 8 * layer <= size(card.plan, "learner", "layers of all ranks") <= 20 * layer
    four = learners_card(full_tuning(ranks=4, sharded=True), 80)
    assert four.plan.engine_bytes("learner") < card.plan.engine_bytes("learner")


def test_what_ranks_reach_one_another_by_is_not_the_learners() -> None:
    one, two = (
        learners_card(config(cluster={"learner": {"ranks": ranks}}), 300).plan for ranks in (1, 2)
    )
    links = size(two, "learner", "links between ranks")
    assert 0.5 * GIB < links < 1.5 * GIB
    assert two.learner_memory_bytes == one.learner_memory_bytes - links
    assert two.required_bytes == one.required_bytes + links
    assert "links between ranks" not in {row.what for row in one.rows}


@pytest.mark.parametrize("adapters", ["swap", "merge"])
def test_what_auto_chooses_fits_with_what_fragments_take(adapters: str) -> None:
    """The learner's own process keeps to its share, which the rows must not exceed."""
    run = config(generation={"adapters": adapters})
    student, teacher = named_shape("4B"), named_shape("8B-FP8")
    chosen = set[int]()
    for gib in range(80, 140, 5):
        plan = lay_out(
            run, device_memory_bytes=gib * GIB, student_shape=student, teacher_shape=teacher
        )
        if plan.fits:
            assert plan.engine_bytes("learner") <= plan.learner_memory_bytes
            lost = [row.num_bytes for row in plan.rows if row.what == "lost to fragments"]
            assert lost == [pytest.approx(0.2 * activations(plan).num_bytes, rel=0.01)]
            chosen.add(recomputed(plan))
    assert len(chosen) > 3


def rollout_card(run: RunConfig, student: str = "32B") -> MemoryPlan:
    shapes: dict[str, Any] = {
        "student_shape": named_shape(student),
        "teacher_shape": named_shape("8B"),
    }
    plans = plan_cards(run, device_memory_bytes=500 * GIB, **shapes)
    return next(card.plan for card in plans if card.engines == ("student",))


def divided_rollouts(parts: int) -> RunConfig:
    generation = {"tensor_parallel": parts, "adapters": "swap"}
    return config(generation=generation, cluster={"rollouts": {"cards": parts}})


def test_a_rollout_engine_over_several_cards_has_a_part_on_each() -> None:
    shape = named_shape("32B")
    one, two, sixteen = (rollout_card(divided_rollouts(parts)) for parts in (1, 2, 16))
    assert size(one, "student", "weights") == shape.weight_bytes(2)
    assert size(two, "student", "weights") == shape.weight_bytes(2) // 2
    cache = size(one, "student", "key-value cache")
    assert size(two, "student", "key-value cache") == cache // 2
    assert shape.num_kv_heads == 8  # of more cards than heads, several have the same head
    assert size(sixteen, "student", "key-value cache") == cache // 8


def test_cards_that_do_not_divide_a_model_s_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollouts.cards=3 does not divide .* 64 attention"):
        rollout_card(divided_rollouts(3))
    run = config(scoring={"server_arguments": {"tp-size": 3}}, cluster={"teachers": {"cards": 3}})
    with pytest.raises(ConfigError, match=r"teachers.cards=3 does not divide .* 32 attention"):
        plan_cards(run, student_shape=named_shape("4B"), teacher_shape=named_shape("8B"))


def test_advice_for_full_tuning_names_the_division_and_frees_what_it_says() -> None:
    with pytest.raises(ConfigError, match="the engines need") as caught:
        learners_card(full_tuning(), 60)
    advice = str(caught.value).partition("What would free memory:")[2]
    found = re.search(r"cluster.learner=\{ranks: 2, sharded: true\}: ([\d.]+) GiB", advice)
    assert found is not None
    whole = learners_card(full_tuning(), 500).plan.required_bytes
    divided = learners_card(full_tuning(ranks=2, sharded=True), 500).plan.required_bytes
    assert float(found[1]) == pytest.approx((whole - divided) / GIB, abs=0.051)
    with pytest.raises(ConfigError, match="the engines need") as caught:
        learners_card(full_tuning(ranks=2, sharded=True), 20)
    assert "cluster.learner=" not in str(caught.value)


def test_micro_batch_holds_one_sequence_at_least() -> None:
    run = config(sampling={"max_new_tokens": 16000}, samples_per_prompt=64)
    plan = planned(run, 1000)
    assert activations(plan).how.startswith(f"{256 + 16000} tokens")


# --- When it does not fit -----------------------------------------------------------------------


def test_advice_frees_what_it_says() -> None:
    """Each setting, made, lowers the sum by the figure in the message."""
    changes: dict[str, dict[str, Any]] = {
        "generation.max_sequences=128": {"generation": {"max_sequences": 128}},
        "scoring.chunk_tokens=1024": {"scoring": {"chunk_tokens": 1024}},
        "scoring.request_tokens=8192": {"scoring": {"request_tokens": 8192}},
        "scoring.chunked_prefill_tokens=4096": {"scoring": {"chunked_prefill_tokens": 4096}},
        "training.micro_batch_tokens=4096": {"training": {"micro_batch_tokens": 4096}},
        "planning.prompt_tokens=128": {"planning": {"prompt_tokens": 128}},
    }
    with pytest.raises(ConfigError, match="What would free memory") as caught:
        planned(config(), 90)
    found = freed_by(str(caught.value))
    assert found.keys() == changes.keys()
    assert list(found.values()) == sorted(found.values(), reverse=True)
    before = laid_out(config(), 90).required_bytes
    for key, change in changes.items():
        saved = before - laid_out(config(**change), 90).required_bytes
        assert found[key] == pytest.approx(saved / GIB, abs=0.051), key


def test_message_says_what_was_planned_and_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(config(), 90)
    message = str(caught.value)
    assert re.search(r"engines need 1\d\d\.\d GiB, but there are 90.0 GiB", message)
    assert re.search(r"teacher +weights +32.0 GiB", message)
    assert re.search(r"reserve +left free +8.0 GiB", message)
    assert re.search(r"1\d\.\d GiB are missing", message)


def test_settings_of_other_kinds_are_among_the_advice() -> None:
    run = config(
        generation={"kv_cache_gib": 40.0},
        scoring={"memory_fraction": 0.5},
        training={"gradient_checkpointing": "off"},
        planning={"reserve_gib": 16.0},
    )
    with pytest.raises(ConfigError) as caught:
        planned(run, 100)
    assert freed_by(str(caught.value)).keys() >= {
        "generation.kv_cache_gib=20.0",
        "planning.reserve_gib=8.0",
        "training.gradient_checkpointing=auto",
    }


# --- Configs -----------------------------------------------------------------------------------


def test_missing_model_directory_is_named() -> None:
    with pytest.raises(ModelError, match=r"no/student/config.json does not exist"):
        make_plan(config(), device_memory_bytes=GIB)


@pytest.mark.parametrize("name", ["demo.yaml", "default.yaml", "lab-vllm.yaml"])
def test_configs_of_the_lab_pair_fit_a_small_machine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    plan = make_plan(load_config(ROOT / "configs" / name), device_memory_bytes=12 * GIB)
    assert plan.required_bytes < 12 * GIB


@pytest.mark.parametrize(
    ("name", "gib", "teacher"),
    [("gb10.yaml", 112, "32B-FP8"), ("h200.yaml", 138, "8B"), ("h200-streaming.yaml", 138, "8B")],
)
def test_configs_of_large_models_fit_their_machines(name: str, gib: int, teacher: str) -> None:
    run = load_config(ROOT / "configs" / name)
    plan = planned(run, gib, teacher=teacher)
    assert plan.fits
