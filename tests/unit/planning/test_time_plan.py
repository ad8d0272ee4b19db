"""The time plan of whole configs: what it adds up, and how near it is to what was measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.gb10_public_rows import public_rows
from benchmarks.lib.time_plan_case import read
from benchmarks.lib.time_plan_rows import FITTED, committed_rows, fit
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning.device import DeviceMemory
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.rates import EFFICIENCY, SLOW_HOST_S_PER_LAYER, Rates, peak_rates
from qwen3_distill.planning.suggest import Situation, Suggestion, suggest
from qwen3_distill.planning.time_plan import Planned, TimePlan, assumed_lengths, plan_time

CONFIGS = Path(__file__).parents[3] / "configs"
H200 = peak_rates(named_device("h200"))
STREAMING = "pipeline={kind: streaming, mps: true, max_staleness_steps: 8, max_steps_ahead: 3}"


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", list(overrides))


def plan_of(
    config: RunConfig, teacher: str = "8B", rates: Rates = H200, **lengths: Any
) -> TimePlan:
    planned = Planned(
        config=config,
        student=named_shape("4B"),
        teacher=named_shape(teacher),
        recomputed_layers=0,
    )
    return plan_time(planned, rates, assumed_lengths(config, **lengths))


# --- Sums ---------------------------------------------------------------------------------------


def test_sequential_step_is_the_sum_of_its_stages_and_the_run_of_its_steps() -> None:
    plan = plan_of(load("h200", "evaluation=null", "cost.price_per_device_hour=3.6"))
    assert plan.step_s == pytest.approx(sum(time.seconds for time in plan.stages.values()))
    assert plan.run_s == pytest.approx(100 * plan.step_s)
    assert plan.tokens_per_s == pytest.approx(256 * 512 / plan.step_s)
    assert plan.money == pytest.approx(plan.run_s / 1000)
    assert plan_of(load("h200")).money is None


def test_evaluations_are_counted() -> None:
    with_some, without = plan_of(load("h200")), plan_of(load("h200", "evaluation=null"))
    assert without.evaluation_s == 0
    assert with_some.run_s - without.run_s == pytest.approx(with_some.evaluation_s)
    often = plan_of(load("h200", "evaluation.every_steps=5"))
    assert often.evaluation_s > with_some.evaluation_s
    twice = plan_of(load("h200", "evaluation.second_temperature=0"))
    assert twice.evaluation_s == pytest.approx(2 * with_some.evaluation_s)


def test_streaming_hides_tails_and_costs_less_with_mps() -> None:
    lengths = {"response_tokens": 100, "tail": 4.0}
    sequential = plan_of(load("h200"), **lengths)
    streaming = plan_of(load("h200", STREAMING), **lengths)
    without_mps = plan_of(load("h200", STREAMING, "pipeline.mps=false"), **lengths)
    assert streaming.step_s < 0.8 * sequential.step_s
    assert streaming.step_s < without_mps.step_s


def test_a_run_without_teacher_scores_nothing_and_offline_samples_once() -> None:
    given = ("objective={kind: sft}", "rollouts={source: file, file: x}", "scoring=null")
    sft = load("h200", *given, "evaluation=null", "pipeline={kind: offline}")
    planned = Planned(config=sft, student=named_shape("4B"), teacher=None, recomputed_layers=0)
    plan = plan_time(planned, H200, assumed_lengths(sft))
    assert plan.stages["scoring"].seconds == plan.stages["sampling"].seconds == 0
    assert plan.stages["training"].seconds > 0
    once = load("h200", "pipeline={kind: offline, collect_steps: 25}", "evaluation=null")
    every = plan_of(load("h200", "evaluation=null"))
    assert plan_of(once).stages["sampling"].seconds == pytest.approx(
        every.stages["sampling"].seconds / 4
    )


def test_teachers_on_cards_of_their_own_take_their_share_out() -> None:
    alone = plan_of(load("h200", STREAMING))
    two = ["cluster={teachers: {replicas: 2, cards: 1}, learner: {}}", "generation.python=python3"]
    spread = plan_of(load("h200", STREAMING, *two))
    ratio = alone.stages["scoring"].seconds / spread.stages["scoring"].seconds
    assert ratio == pytest.approx(2)
    assert spread.step_s < alone.step_s
    assert any("cards" in note for note in spread.notes)


def test_candidates_of_sglang_cost_host_time() -> None:
    """Measured: 0.39 s for 256 answers of 512 tokens."""
    lengths: dict[str, Any] = {"prompt_tokens": 128, "response_tokens": 512}
    dense = plan_of(load("h200"), **lengths)
    sampled = plan_of(load("h200", "objective={kind: sampled_reverse_kl}"), **lengths)
    more_s = dense.stages["scoring"].seconds - sampled.stages["scoring"].seconds
    tokens = load("h200").rollouts_per_step * 512
    assert more_s == pytest.approx(0.39 * tokens / (256 * 512), rel=0.01)
    assert more_s == pytest.approx(dense.stages["scoring"].parts["host"])
    assert not any("candidates" in note for note in (*dense.notes, *sampled.notes))


def trained_s(
    *overrides: str, rates: Rates = H200, prompt_tokens: int = 128, response_tokens: int = 512
) -> float:
    config = load("h200", "evaluation=null", *overrides)
    lengths = {"prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
    return plan_of(config, "8B", rates, **lengths).stages["training"].seconds


def test_candidates_cost_the_learner() -> None:
    """Measured: 0.979 of unsloth's rate with the sampled token."""
    sampled = trained_s("objective={kind: sampled_reverse_kl}")
    assert sampled / trained_s("objective={kind: top_k, k: 16}") == pytest.approx(0.979, rel=1e-3)


def test_frozen_layers_in_fp8_gain_in_the_backward_pass_where_the_device_has_fp8() -> None:
    """Measured: 1.071 of unsloth's rate."""
    fp8, lacking = "training.base_precision=fp8_backward", peak_rates(named_device("a100-sxm"))
    assert trained_s() / trained_s(fp8) == pytest.approx(1.071, rel=1e-3)
    assert trained_s(rates=lacking) == pytest.approx(trained_s(fp8, rates=lacking))


def test_shared_prompts_are_computed_once_by_layers_with_our_attention() -> None:
    """Measured: 1.08 and 1.32 of the rate, where 1.18 and 1.39 times fewer tokens are computed."""
    for prompt_tokens, response_tokens, measured in ((128, 512, 1.08), (300, 508, 1.32)):
        lengths: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "response_tokens": response_tokens,
        }
        samples = ("samples_per_prompt=4", "prompts_per_step=32")
        alone = trained_s(*samples, **lengths)
        shared = trained_s(*samples, "training.shared_prompts=true", **lengths)
        assert alone / shared == pytest.approx(measured, rel=0.055)
    single = ("objective={kind: sampled_reverse_kl}", "training.shared_prompts=true")
    packed = ("objective={kind: sampled_reverse_kl}", "training.packing=true")
    assert trained_s(*single) == pytest.approx(trained_s(*packed))  # nothing to share: rows packed
    slow = replace(H200, launch_s=100 * H200.launch_s)  # the number of micro-batches counts
    plans = [
        plan_of(load("h200", *each), rates=slow, response_tokens=128, tail=8.0)
        for each in (single, packed)
    ]
    launches = [plan.stages["training"].parts["launches"] for plan in plans]
    assert launches[0] == pytest.approx(launches[1])
    assert launches[0] > 0


def test_what_is_left_out_of_a_config_is_named() -> None:
    counted = (
        "training.shared_prompts=true",
        "samples_per_prompt=4",
        "training.base_precision=fp8_backward",
    )
    plain = plan_of(load("h200")).notes
    padding = [note for note in plain if "taken to be padded" in note]
    assert len(padding) == 1
    left_out = plan_of(load("h200", *counted)).notes  # rows with shared prompts have no padding
    assert left_out == tuple(note for note in plain if note not in padding)
    embedded = "training={kind: embedded, tuning: {kind: lora}, base_precision: "
    for overrides, words in (
        ((embedded + "fp8}",), "FP8 in frozen layers"),
        (("objective={kind: top_k, k: 32}",), "32 candidates cost beyond 16"),
        (("scoring={kind: vllm, model: models/Qwen3-8B}",), "candidates of the teacher cost it"),
        (("generation={kind: embedded}",), "embedded engines"),
    ):
        assert any(words in note for note in plan_of(load("h200", *overrides)).notes), words
        assert not any(words in note for note in plan_of(load("h200")).notes), words


def test_a_slow_host_is_named_where_the_learner_would_wait_for_it() -> None:
    def notes_of(*overrides: str, rates: Rates = H200) -> list[str]:
        config = load("h200-streaming", *overrides)
        notes = plan_of(config, rates=rates, prompt_tokens=128).notes
        return [note for note in notes if "a slow host" in note]

    ((as_loaded,), (fp8,)) = notes_of(), notes_of("training.base_precision=fp8_backward")
    # 32 micro-batches of 36 layers.
    assert f"training takes {32 * 36 * 7.43e-3:.1f} s in place of" in as_loaded
    assert f"training takes {32 * 36 * 8.25e-3:.1f} s in place of" in fp8
    assert notes_of("training.micro_batch_tokens=10240") == []
    assert notes_of("training={kind: embedded, tuning: {kind: lora}}") == []
    assert notes_of(rates=peak_rates(named_device("gb10"))) == []  # a GPU that is slower than it


def test_a_slow_host_launches_what_is_recomputed_once_more() -> None:
    config = load("h200-streaming")
    shapes = {"student": named_shape("4B"), "teacher": named_shape("8B")}
    plans = [
        plan_time(
            Planned(config=config, recomputed_layers=layers, **shapes),
            H200,
            assumed_lengths(config, prompt_tokens=128),
        )
        for layers in (0, 36)
    ]
    for plan, seconds in zip(plans, (8.6, 11.4), strict=True):
        assert any(f"training takes {seconds} s in place of" in note for note in plan.notes)


@pytest.mark.parametrize("precision", ["as_loaded", "fp8_backward"])
def test_the_slow_host_is_the_one_of_the_result(precision: str) -> None:
    parts = read("h200_rows_5120")["parts"]
    name = "unsloth" if precision == "as_loaded" else f"unsloth_{precision}"
    part = parts[f"{name}_128x512_n4"]
    micro_batches = part["tokens"] / 5120
    seconds = sum(part["steps_s"]) / len(part["steps_s"]) / micro_batches / 36
    assert pytest.approx(seconds, rel=2e-3) == SLOW_HOST_S_PER_LAYER[precision]


def test_a_cache_in_fp8_is_read_faster_by_flashinfer_while_streaming_on_hopper() -> None:
    def reads_s(*overrides: str, config: str = "h200-streaming", rates: Rates = H200) -> float:
        stages = plan_of(load(config, *overrides), rates=rates).stages
        return stages["sampling"].parts["KV bandwidth"]

    fp8, flashinfer = "generation.kv_cache_dtype=fp8", "generation.attention_backend=flashinfer"
    assert reads_s(fp8, flashinfer) == pytest.approx(reads_s() / 2)
    assert reads_s(fp8) == reads_s(fp8, "generation.attention_backend=triton") == reads_s()
    assert reads_s(flashinfer) == reads_s()
    a100, note = peak_rates(named_device("a100-sxm")), "a cache in FP8 gains"
    for name, rates in (("h200", H200), ("h200-streaming", a100)):
        assert reads_s(fp8, flashinfer, config=name, rates=rates) == reads_s(
            config=name, rates=rates
        )
        plan = plan_of(load(name, fp8, flashinfer), rates=rates)
        assert any(note in each for each in plan.notes)
    counted = plan_of(load("h200-streaming", fp8, flashinfer))
    assert not any(note in each for each in counted.notes)


def test_impossible_lengths_are_refused() -> None:
    config = load("h200")
    with pytest.raises(ConfigError, match=r"--response-tokens 513: expected 1 to 512"):
        plan_of(config, response_tokens=513)
    with pytest.raises(ConfigError, match=r"--tail 0\.5"):
        plan_of(config, tail=0.5)


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_every_shipped_config_has_a_time(name: str) -> None:
    config = load(name)
    plan = plan_of(config)
    assert 0 < plan.step_s < plan.run_s
    assert plan.tokens_per_s > 0


# --- Against what was measured ------------------------------------------------------------------


def test_shares_are_those_that_the_fitting_rows_give() -> None:
    rows = committed_rows()
    assert sorted(row.fits for row in rows if row.fits) == sorted(FITTED.values())
    fitted = fit(rows)
    for name, value in vars(EFFICIENCY).items():
        assert vars(fitted)[name] == pytest.approx(value, rel=5e-3), name


def test_held_out_steps_are_predicted_within_15_percent_on_average() -> None:
    held_out = [row for row in committed_rows() if row.fits is None]
    steps = [abs(row.error()) for row in held_out if row.what.startswith("step")]
    assert len(steps) >= 20
    assert sum(steps) / len(steps) < 0.15
    stages = [abs(row.error()) for row in held_out if not row.what.startswith("step")]
    assert sum(stages) / len(stages) < 0.15


def test_the_headline_result_is_predicted_stage_by_stage() -> None:
    rows = {
        row.what: row
        for row in committed_rows()
        if row.source == "h200_stages" and row.name == "opd"
    }
    assert set(rows) >= {"sampling", "scoring", "training", "publishing", "step without host"}
    for row in rows.values():
        assert abs(row.error()) < 0.1, row.as_record()


def test_public_gb10_rows_are_predicted_within_a_quarter() -> None:
    gb10 = peak_rates(named_device("gb10"))
    rows = public_rows()
    assert len({(row.name, row.source) for row in rows}) == len(rows) >= 40
    assert all(row.source for row in rows)
    errors = {row.name: row.predicted(gb10)[0] / row.tok_s - 1 for row in rows}
    assert sum(map(abs, errors.values())) / len(errors) < 0.2
    ours = {name: error for name, error in errors.items() if name.startswith("Qwen3")}
    assert max(map(abs, ours.values())) < 0.3


# --- Suggestions --------------------------------------------------------------------------------


def situation(config: RunConfig, gib: float, **lengths: Any) -> Situation:
    return Situation(
        config=config,
        student=named_shape("4B"),
        teacher=named_shape("8B"),
        device=DeviceMemory(kind="cuda", name="one card", free_bytes=int(gib * GIB)),
        rates=H200,
        assumed=assumed_lengths(config, **lengths),
    )


@pytest.fixture(scope="module")
def suggestions() -> list[Suggestion]:
    poor = load("h200", "generation.max_sequences=32", "training.micro_batch_tokens=1024")
    return suggest(situation(poor, 139))


def test_the_same_optimization_is_suggested_faster_and_within_memory(
    suggestions: list[Suggestion],
) -> None:
    same = [each for each in suggestions if not each.meaning]
    assert same
    before = plan_of(load("h200", "generation.max_sequences=32"))
    for each in same:
        assert each.memory.fits
        assert each.plan.tokens_per_s > 1.3 * before.tokens_per_s
        for section in ("prompts_per_step", "samples_per_prompt", "pipeline", "objective"):
            assert getattr(each.config, section) == getattr(load("h200"), section)


def test_what_is_typed_gives_the_config_that_was_planned(suggestions: list[Suggestion]) -> None:
    for each in suggestions:
        typed = [override.replace("'", "") for override in each.overrides]
        given = ["generation.max_sequences=32", "training.micro_batch_tokens=1024", *typed]
        assert load("h200", *given) == each.config


def test_changes_of_the_optimization_are_named(suggestions: list[Suggestion]) -> None:
    changed = [each for each in suggestions if each.meaning]
    assert changed
    before = load("h200")
    for each in changed:
        said = " ".join(each.meaning)
        if each.config.rollouts_per_step != before.rollouts_per_step:
            assert f"-> {each.config.rollouts_per_step} rollouts" in said
        if each.config.pipeline.kind != "sequential":
            assert "streaming" in said
        if each.config.samples_per_prompt != 1:
            assert f"{each.config.samples_per_prompt} answers of a prompt" in said


def test_rollouts_in_flight_of_a_streaming_run_are_named() -> None:
    streaming = load("h200", STREAMING, "generation.max_sequences=64")
    found = suggest(situation(streaming, 139))
    assert found
    for each in found:
        if each.config.max_in_flight != 64:
            assert any("rollouts in flight" in change for change in each.meaning)


def test_small_memory_is_kept_to() -> None:
    config = load("h200", "generation.max_sequences=32", "training.micro_batch_tokens=2048")
    found = suggest(situation(config, 82))
    assert any(not each.meaning for each in found)  # what does not fit hides nothing that does
    for each in found:
        assert each.memory.required_bytes <= 82 * GIB


def test_no_mps_is_suggested_where_cpu_and_gpu_share_the_memory() -> None:
    config = load("h200")
    here = situation(config, 139)
    unified = replace(here, rates=replace(H200, unified=True))
    for each in suggest(unified):
        assert not each.config.pipeline.mps
