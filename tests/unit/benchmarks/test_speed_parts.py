"""What the benchmarks of speed measure, and with which lengths."""

import argparse
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest

from benchmarks.lib.overlap_parts import Lengths
from benchmarks.speed.learners import Shape, config_of
from benchmarks.speed.start import write_problems
from benchmarks.speed.time_plan import CONFIG
from benchmarks.speed.trl_distillation import ForcedLengths, Setting, best_of
from qwen3_distill.config import EmbeddedTraining, TopKDivergence, UnslothTraining
from qwen3_distill.config.load import load_config
from qwen3_distill.data.sources import build_source
from qwen3_distill.data.sources.records import ANSWER_KEY

GIVEN = argparse.Namespace(new_tokens=512, median_tokens=128, max_tokens=2048)
STEP_0 = [Lengths("longtail8", 128, 2048).of(f"step-0/{n}") for n in range(6)]


# --- Learners -----------------------------------------------------------------------------------


def test_a_work_says_prompts_answers_and_samples() -> None:
    even, tails = Shape.parse("300x508:4,128xlongtail8:1")
    assert (even.name, even.prompt_tokens, even.samples) == ("300x508_n4", 300, 4)
    given = argparse.Namespace(median_tokens=128, max_tokens=2048, sequences=6, rounds=1)
    config = load_config(CONFIG)
    rollouts = even.work(config, given, vocab_size=500).rollouts(6)
    assert [(r.prompt.token_ids.size, r.num_tokens) for r in rollouts] == [(300, 508)] * 6
    assert len({r.prompt.prompt_id for r in rollouts}) == 2
    rollouts = tails.work(config, given, vocab_size=500).rollouts(6)
    assert [r.num_tokens for r in rollouts] == STEP_0
    assert len({r.prompt.prompt_id for r in rollouts}) == 6


def test_a_learners_name_says_what_changes() -> None:
    config = load_config(CONFIG)
    shared = config_of("unsloth_shared_top16", config, 99).training
    assert isinstance(shared, UnslothTraining)
    assert (shared.shared_prompts, shared.packing, shared.micro_batch_tokens) == (True, False, 99)
    assert isinstance(config_of("unsloth_shared_top16", config, 99).objective, TopKDivergence)
    packed = config_of("unsloth_packed", config, 99).training
    assert isinstance(packed, UnslothTraining)
    assert (packed.shared_prompts, packed.packing) == (False, True)
    eager = config_of("unsloth_eager", config, 99).training
    assert isinstance(eager, UnslothTraining)
    assert eager.environment == {"UNSLOTH_BLOCK_COMPILE": "0"}
    embedded = config_of("compiled_fp8_backward_shared", config, 99).training
    assert isinstance(embedded, EmbeddedTraining)
    assert (embedded.compiled, embedded.base_precision) == (True, "fp8_backward")
    rounded = config_of("unsloth_fp8_backward", config, 99).training
    assert (rounded.kind, rounded.base_precision) == ("unsloth", "fp8_backward")


# --- TRL ----------------------------------------------------------------------------------------


def test_a_setting_is_read_and_written() -> None:
    setting = Setting.parse("8:off:fixed+longtail8")
    assert setting == Setting(8, recomputes=False, works=("fixed", "longtail8"))
    assert Setting.parse(str(setting)) == setting
    with pytest.raises(argparse.ArgumentTypeError, match="'8:no:fixed' is not MICRO_BATCH"):
        Setting.parse("8:no:fixed")


def test_the_first_step_warms_up_with_a_quarter_of_the_lengths() -> None:
    lengths = ForcedLengths(GIVEN, ("longtail8", "fixed"))
    assert lengths.next(6) == [max(1, tokens // 4) for tokens in STEP_0]
    assert lengths.next(6) == STEP_0
    assert lengths.next(2) == [512, 512]


@dataclass
class Params:
    """Stands for vLLM's."""

    max_tokens: int
    ignore_eos: bool = False

    def clone(self) -> "Params":
        return replace(self)


def test_vllm_samples_each_prompt_to_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    class LLM:
        def generate(self, prompts: Any, sampling_params: Any, **options: Any) -> None:
            asked.append((prompts, sampling_params, options))

    module = ModuleType("vllm")
    monkeypatch.setattr(module, "LLM", LLM, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", module)
    lengths = ForcedLengths(GIVEN, ("fixed",))
    lengths.in_vllm()
    given = Params(max_tokens=9)
    for _ in range(2):
        LLM().generate(["a", "b"], sampling_params=given, use_tqdm=False)
    assert [[p.max_tokens for p in params] for _, params, _ in asked] == [[128] * 2, [512] * 2]
    assert all(p.ignore_eos for _, params, _ in asked for p in params)
    assert given == Params(max_tokens=9)
    assert asked[0][::2] == (["a", "b"], {"use_tqdm": False})


def test_the_fastest_setting_of_each_work_counts() -> None:
    def run(size: int, **rates: float) -> dict[str, Any]:
        works = {name: {"tok_s": rate, "step_s": 1 / rate} for name, rate in rates.items()}
        return {"micro_batch": size, "peak_gib": 10.0 * size, "works": works}

    failed = {"micro_batch": 16, "failed": "out of memory"}
    figures = best_of(
        [run(8, fixed=3.0), failed, run(4, fixed=5.0, longtail8=2.0), run(2, fixed=4.0)]
    )
    assert (figures["trl_fixed_tok_s"], figures["trl_fixed_micro_batch"]) == (5.0, 4)
    assert (figures["trl_longtail8_tok_s"], figures["trl_longtail8_peak_gib"]) == (2.0, 40.0)


# --- The rest -----------------------------------------------------------------------------------


def test_problems_are_all_different_and_have_answers(tmp_path: Any) -> None:
    file = tmp_path / "problems.jsonl"
    write_problems(file, 50)
    prompts = load_config(
        CONFIG,
        [
            f"prompts={{kind: jsonl, path: {file}, prompt_field: question, answer_field: answer}}",
            "evaluation=null",
        ],
    ).prompts
    source = build_source(prompts)
    rows = [source.get(index) for index in range(50)]
    assert len({row.messages[-1].content for row in rows}) == 50
    assert all(row.task_data[ANSWER_KEY] for row in rows)
