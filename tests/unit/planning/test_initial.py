"""First configs: the largest settings that fit a machine, as YAML that reads as it was meant."""

import itertools
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.config.load import check_config
from qwen3_distill.config.yaml12 import parse_yaml
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning.facts import Facts, ModelFacts, PromptFacts, Wishes
from qwen3_distill.planning.initial import InitialConfig, initial_config, recomputed_layers
from qwen3_distill.planning.ladder import ladder
from qwen3_distill.planning.machines import MACHINES, Machine, MachineKind

GSM8K = PromptFacts(
    kind="hf",
    path="openai/gsm8k",
    field="question",
    answer_field="answer",
    held_out="test",
    verifier="math",
)
WISHES = Wishes(
    command="qwen3-distill init",
    file="configs/x.yaml",
    steps=100,
    max_new_tokens=512,
    streaming=False,
    thinking=False,
)


def model(size: str) -> ModelFacts:
    return ModelFacts(name=f"Qwen/Qwen3-{size}", shape=named_shape(size), can_think=True)


def facts(machine: Machine, student_size: str = "4B", teacher: str = "8B", **changes: Any) -> Facts:
    made = Facts(
        machine=machine,
        student=model(student_size),
        teacher=model(teacher),
        prompts=GSM8K,
        wishes=WISHES,
    )
    return replace(made, **changes)


def card(gib: float, kind: MachineKind = "cuda") -> Machine:
    return Machine(label="one card", kind=kind, free_bytes=int(gib * GIB))


# --- The settings that were measured -----------------------------------------------------------


def chosen(made: InitialConfig) -> tuple[Any, ...]:
    config = made.config
    generation, scoring, training = config.generation, config.teacher, config.training
    assert generation.kind == "vllm"
    assert scoring.kind == "sglang"
    assert training.kind == "unsloth"
    return (
        config.prompts_per_step,
        generation.max_sequences,
        generation.adapters,
        scoring.request_tokens,
        scoring.max_in_flight,
        scoring.chunked_prefill_tokens,
        scoring.chunk_tokens,
        training.micro_batch_tokens,
        training.gradient_checkpointing,
    )


def test_h200_gets_the_settings_of_its_measurements() -> None:
    made = initial_config(facts(MACHINES["h200"]))
    assert chosen(made) == (256, 256, "merge", 16384, 4, 8192, 8192, 10240, "auto")
    assert recomputed_layers(made.plan) == 0
    assert "Nothing had to be lowered to fit." in made.text


def test_streaming_on_an_h200_gets_those_of_its_measurements() -> None:
    made = initial_config(facts(MACHINES["h200"], wishes=replace(WISHES, streaming=True)))
    assert chosen(made) == (256, 512, "merge", 16384, 4, 8192, 2048, 5120, "auto")
    assert recomputed_layers(made.plan) == 0
    pipeline = made.config.pipeline
    assert pipeline.kind == "streaming"
    assert (pipeline.mps, pipeline.max_staleness_steps, pipeline.max_steps_ahead) == (True, 8, 3)


def test_gb10_leaves_memory_free_and_takes_the_kernels_that_work() -> None:
    made = initial_config(facts(MACHINES["gb10"], teacher="32B"))
    assert chosen(made) == (128, 128, "swap", 8192, 2, 4096, 2048, 2048, "auto")
    assert recomputed_layers(made.plan) == 0
    config = made.config
    assert config.planning.reserve_gib == 14
    assert config.teacher.kind == "sglang"
    assert config.teacher.attention_backend == "flashinfer"
    assert config.teacher.server_arguments["enable-tf32-matmul"] is True
    assert config.teacher.environment == {"SGLANG_ENABLE_JIT_DEEPGEMM": "0"}
    assert config.checkpoint.every_steps == 5
    assert made.plan.device.kind == "unified"


# --- What fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "unified", "cpu"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_rung_is_lower_than_the_one_before(kind: MachineKind, streaming: bool) -> None:
    rungs = list(ladder(kind, streaming=streaming))
    assert len(rungs) > 3
    for higher, lower in itertools.pairwise(rungs):
        assert lower.lowered_from(higher)
        assert all(vars(lower)[key] <= value for key, value in vars(higher).items())


@given(
    gib=st.floats(min_value=20, max_value=190),
    pair=st.sampled_from([("4B", "8B"), ("4B", "32B"), ("1.7B", "4B"), ("0.6B", "8B-FP8")]),
)
@settings(max_examples=25, deadline=None)
def test_config_fits_its_card_and_a_larger_card_gets_no_less(
    gib: float, pair: tuple[str, str]
) -> None:
    sizes: list[int] = []
    for memory in (gib, gib + 40):
        try:
            made = initial_config(facts(card(memory), *pair))
        except ConfigError:
            sizes.append(0)
            continue
        assert made.plan.fits
        assert made.plan.required_bytes <= memory * GIB
        assert check_config(parse_yaml(made.text, "text")) == made.config
        sizes.append(made.config.generation.max_sequences)
    assert sizes[0] <= sizes[1]


def test_what_was_lowered_is_named() -> None:
    made = initial_config(facts(card(80)))
    head = " ".join(line.removeprefix("# ") for line in made.text.splitlines() if line[:1] == "#")
    assert "Lowered until it fitted:" in head
    assert "max_sequences 256 -> 128" in head
    assert made.config.generation.max_sequences == 128
    assert made.config.prompts_per_step == 128


def test_models_that_do_not_fit_are_refused_with_the_plan() -> None:
    with pytest.raises(ConfigError, match=r"(?s)engines need .* teacher +weights +32\.0 GiB"):
        initial_config(facts(card(40), "4B", "32B"))


# --- What it says -------------------------------------------------------------------------------


def test_fp8_checkpoint_is_not_quantized_again_and_thinking_is_as_told() -> None:
    wishes = replace(WISHES, thinking=True)
    config = initial_config(facts(card(139), teacher="32B-FP8", wishes=wishes)).config
    assert config.teacher.kind == "sglang"
    assert config.teacher.quantization is None
    assert config.student.template_arguments == {"enable_thinking": True}


def test_template_that_reads_no_thinking_gets_no_argument() -> None:
    student = replace(model("4B"), can_think=False)
    config = initial_config(facts(card(139), student=student)).config
    assert config.student.template_arguments == {}


def test_long_answers_have_room_and_never_more_than_the_model() -> None:
    for asked, room in ((512, 2048), (4000, 6144), (40000, 40960)):
        wishes = replace(WISHES, max_new_tokens=asked)
        config = initial_config(facts(card(900), wishes=wishes)).config
        assert config.generation.kind == "vllm"
        assert config.generation.max_model_tokens == room


@given(
    suffix=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    field=st.sampled_from(["question", "true", "007", "reward_model.x", "- a", "a: b", "null"]),
)
@settings(max_examples=40, deadline=None)
def test_texts_are_read_as_they_were_given(suffix: str, field: str) -> None:
    prompts = replace(GSM8K, suffix=suffix, field=field, path="a b/c#d")
    config = initial_config(facts(card(139), prompts=prompts)).config
    assert config.prompts.kind == "hf"
    assert config.prompts.suffix == suffix
    assert config.prompts.prompt_field == field
    assert config.prompts.path == "a b/c#d"


def test_name_with_a_line_break_is_refused_and_not_read_as_a_setting() -> None:
    student = replace(model("4B"), name="a\nsteps: 7")
    with pytest.raises(ConfigError, match=r"student\.model: 'a\\nsteps: 7' has .*control char"):
        initial_config(facts(card(139), student=student))


@pytest.mark.parametrize(("held_out", "verifier"), [(None, "math"), ("test", None)])
def test_without_held_out_problems_or_verifier_there_is_no_evaluation(
    held_out: str | None, verifier: Literal["math"] | None
) -> None:
    prompts = replace(GSM8K, held_out=held_out, verifier=verifier)
    assert initial_config(facts(card(139), prompts=prompts)).config.evaluation is None
