"""`plan --suggest` searches where the config does not fit, and keeps micro-batches large."""

from dataclasses import replace
from pathlib import Path

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning import suggest as suggest_module
from qwen3_distill.planning.device import stated_memory
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.plan import lay_out, make_plan
from qwen3_distill.planning.rates import peak_rates
from qwen3_distill.planning.suggest import Situation, evaluated, suggest
from qwen3_distill.planning.time_plan import assumed_lengths
from qwen3_distill.planning.time_table import suggestion_lines

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def _same_optimization(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search the settings of speed and memory alone, which is quick."""
    every = suggest_module._variants
    monkeypatch.setattr(suggest_module, "_variants", lambda *given: [next(iter(every(*given)))])


def situation(
    name: str, gib: float, *overrides: str, device: str = "h100", teacher: str = "8B", tail: int = 1
) -> Situation:
    # Few rollouts: a search plans hundreds of times.
    config = load_config(CONFIGS / f"{name}.yaml", ["prompts_per_step=32", *overrides])
    peaks = named_device(device)
    return Situation(
        config=config,
        student=named_shape("4B"),
        teacher=named_shape(teacher),
        device=stated_memory(int(gib * GIB), unified=peaks.unified),
        rates=peak_rates(peaks),
        assumed=assumed_lengths(config, response_tokens=100, tail=tail),
    )


def micro_batches(config: RunConfig) -> int:
    return config.training.micro_batch_tokens


def test_config_that_needs_two_lower_settings_to_fit_gets_them() -> None:
    large = ("generation.max_sequences=1024", "training.micro_batch_tokens=40960")
    given = situation("h200", 90, *large, "training.gradient_checkpointing=off")
    shapes = {"student_shape": given.student, "teacher_shape": given.teacher}
    for lowered in ("generation.max_sequences=32", "training.micro_batch_tokens=4096"):
        overrides = [*large, "training.gradient_checkpointing=off", lowered]
        one = load_config(CONFIGS / "h200.yaml", overrides)
        assert not lay_out(one, device=given.device, **shapes).fits, lowered
    found = suggest(given)
    kept = [each.plan.tokens_per_s for each in found if not each.meaning]
    assert kept
    for each in found:
        assert make_plan(each.config, device=given.device, **shapes).fits
        assert not each.meaning or each.plan.tokens_per_s > max(kept)  # else it gains nothing
    now = evaluated(given, lay_out(given.config, device=given.device, **shapes))
    text = "\n".join(suggestion_lines(found, now, fits=False))
    assert "now:" not in text
    assert "x)" not in text
    assert "now:" in "\n".join(suggestion_lines(found, now))
    assert "nothing that fits" in "\n".join(suggestion_lines([], now, fits=False))


@pytest.mark.usefixtures("_same_optimization")
def test_stated_memory_of_the_learner_is_kept_to() -> None:
    given = situation("h200", 139, "training.memory_gib=13", "training.micro_batch_tokens=20480")
    found = suggest(given)
    assert any(not each.meaning for each in found)
    for each in found:
        assert micro_batches(each.config) < 20480


@pytest.mark.usefixtures("_same_optimization")
@pytest.mark.parametrize(("given", "least"), [(10240, 4096), (5120, 4096), (2048, 2048)])
def test_large_cards_get_no_smaller_micro_batches_than_were_measured_or_given(
    given: int, least: int
) -> None:
    overrides = (f"training.micro_batch_tokens={given}", "generation.adapters=swap")
    card = situation("h200", 79, *overrides, tail=5)
    found = suggest(card)
    assert found
    assert min(micro_batches(each.config) for each in found) >= least
    small = suggest(replace(card, device=stated_memory(60 * GIB)))
    assert min(micro_batches(each.config) for each in small) < 4096


@pytest.mark.usefixtures("_same_optimization")
def test_micro_batches_grow_for_a_slow_host_where_nothing_is_lost() -> None:
    small = ("training.micro_batch_tokens=5120", "generation.max_sequences=16")
    given = situation("h200", 139, *small)
    (best, *_) = suggest(given)
    assert micro_batches(best.config) > 5120
    as_before = {**best.changes, "training.micro_batch_tokens": 5120}
    typed = [f"{key}={value}" for key, value in as_before.items()]
    kept = situation("h200", 139, *typed)
    shapes = {"student_shape": kept.student, "teacher_shape": kept.teacher}
    before = evaluated(kept, lay_out(kept.config, device=kept.device, **shapes))
    assert best.plan.slow_host_s < 0.95 * before.slow_host_s
    assert best.plan.tokens_per_s == pytest.approx(before.tokens_per_s, rel=2e-3)
    assert before.slow_host_s > before.step_s
    # Without room for larger ones they stay.
    least = suggest(replace(given, device=stated_memory(int(0.99 * best.memory.required_bytes))))
    assert micro_batches(least[0].config) < micro_batches(best.config)


@pytest.mark.usefixtures("_same_optimization")
def test_micro_batches_do_not_grow_for_a_slow_host_beside_decoding() -> None:
    small = ("training.micro_batch_tokens=5120", "generation.max_sequences=16")
    streaming = "pipeline={kind: streaming, mps: true}"
    (best, *_) = suggest(situation("h200", 139, *small, streaming))
    assert "training.micro_batch_tokens" not in best.changes
    assert best.plan.slow_host_s > best.plan.step_s


def test_nothing_is_suggested_that_a_gb10_cannot_hold() -> None:
    few = ("generation.max_sequences=32", "prompts_per_step=256")
    here = situation("gb10", 108, *few, device="gb10", teacher="32B")
    found = suggest(here)
    assert found
    shapes = {"student_shape": here.student, "teacher_shape": here.teacher}
    machine = replace(here.device, name="a GB10")
    for each in found:
        assert make_plan(each.config, device=machine, **shapes).required_bytes <= 108 * GIB
        assert each.config.generation.max_sequences < 256


def test_another_optimization_gains_on_the_best_that_fits_where_the_config_does_not() -> None:
    given = situation("gb10", 90, "prompts_per_step=128", device="gb10", teacher="32B")
    found = suggest(given)
    kept = max(each.plan.tokens_per_s for each in found if not each.meaning)
    others = [each.plan.tokens_per_s for each in found if each.meaning]
    assert others
    assert min(others) > 1.02 * kept


@pytest.mark.usefixtures("_same_optimization")
def test_prompts_are_shared_by_several_answers_where_unsloth_was_measured() -> None:
    shared, four = "training.shared_prompts=true", "samples_per_prompt=4"
    assert shared in suggest(situation("h200", 139, four))[0].overrides
    full = "training={kind: unsloth, dtype: float32, tuning: {kind: full}}"
    lower = ("generation.max_sequences=1024", "training.micro_batch_tokens=40960")
    fits_later = suggest(situation("h200", 90, *lower, four))  # all settings are tried together
    assert shared in fits_later[0].overrides
    embedded = "training={kind: embedded, tuning: {kind: lora}, dtype: bfloat16}"
    for overrides in (("samples_per_prompt=1",), (four, full), (four, embedded)):
        found = suggest(situation("h200", 139, *overrides))
        assert not any(shared in each.overrides for each in found)


def test_a_cache_in_fp8_is_suggested_while_streaming_on_hopper() -> None:
    def with_fp8(*overrides: str, device: str = "h200") -> list[str]:
        config = situation("h200-streaming", 139, *overrides, device=device).config
        rates = peak_rates(named_device(device))
        variants = suggest_module._variants(config, stated_memory(139 * GIB), rates)
        return [
            each.meaning[-1] for each in variants if "generation.kv_cache_dtype" in each.changes
        ]

    found = with_fp8()
    assert found
    assert all("keys and values in FP8" in meaning for meaning in found)
    assert not with_fp8(device="a100-sxm")
    assert not with_fp8("generation.attention_backend=flash_attn")
    assert not with_fp8("generation.dtype=float32")
    assert not with_fp8("objective={kind: sampled_reverse_kl, ratio_cap: null}")
    sequential = situation("h200", 139)
    variants = suggest_module._variants(sequential.config, sequential.device, sequential.rates)
    for each in variants:
        assert ("generation.kv_cache_dtype" in each.changes) <= ("pipeline" in each.changes)
