"""Sections whose names this package does not choose: they are checked as far as can be known."""

from typing import Any

import pytest
from pydantic import ValidationError

from qwen3_distill.config import SglangScoring, UnslothTraining, VllmGeneration
from qwen3_distill.config.engines import VLLM_OPTIONS
from qwen3_distill.config.scoring import SGLANG_OPTIONS


def vllm(**values: Any) -> VllmGeneration:
    return VllmGeneration(kind="vllm", **values)


def sglang(**arguments: Any) -> SglangScoring:
    return SglangScoring(kind="sglang", model="m", server_arguments=arguments)


@pytest.mark.parametrize("make", [vllm, lambda **v: UnslothTraining(kind="unsloth", **v)])
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"A": 1}, r'A is 1 \(int\).*write A: "1"'),
        ({"A": True}, 'write A: "true"'),
        ({"A": None}, 'write A: "null"'),
        ({"A": 1.5}, 'write A: "1.5"'),
        ({"A=B": "x"}, "'A=B' is no name"),
        ({"": "x"}, "'' is no name"),
        ({"A": "x\0y"}, "NUL"),
        ([], "environment"),
    ],
)
def test_environments_are_names_and_texts(make: Any, environment: Any, words: str) -> None:
    make(environment={"A": "1", "B_2": "", "C": " no "})
    with pytest.raises(ValidationError, match=words):
        make(environment=environment)


@pytest.mark.parametrize("name", sorted(VLLM_OPTIONS))
def test_what_a_setting_gives_vllm_is_no_engine_argument(name: str) -> None:
    for spelling in (name, name.replace("_", "-")):
        with pytest.raises(ValidationError, match="which is set by"):
            vllm(engine_arguments={spelling: 1})


def test_attention_has_one_setting_and_the_engines_dtype() -> None:
    vllm(engine_arguments={"attention_config": {"use_trtllm_attention": False}})
    with pytest.raises(ValidationError, match=r"set by generation\.attention_backend"):
        vllm(engine_arguments={"attention_config": {"backend": "FLASHINFER"}})
    vllm(attention_backend="triton", dtype="float32")
    for backend in ("flash_attn", "flashinfer"):
        vllm(attention_backend=backend)
        with pytest.raises(ValidationError, match=f"attention_backend={backend} has no float32"):
            vllm(attention_backend=backend, dtype="float32")


def test_names_that_vllm_cannot_have_are_refused() -> None:
    vllm(engine_arguments={"max_lora_rank": 8, "hf_overrides": {"a": 1}})
    with pytest.raises(ValidationError, match="write 'compilation_config'"):
        vllm(engine_arguments={"--compilation-config": {}})
    with pytest.raises(ValidationError, match=r"set by generation\.float32_head"):
        vllm(engine_arguments={"hf_overrides": {}}, float32_head=True)


@pytest.mark.parametrize("name", sorted(SGLANG_OPTIONS))
def test_what_a_setting_gives_sglang_is_no_server_argument(name: str) -> None:
    # The beginning of a name is the name for SGLang's parser.
    for spelling in (name, name.replace("-", "_"), f"--{name}", name[:-1]):
        with pytest.raises(ValidationError, match="which is set by"):
            sglang(**{spelling: 1})


@pytest.mark.parametrize("name", ["--watchdog-timeout", "watchdog-timeout=3", "a b", "a\n"])
def test_what_is_no_name_of_an_option_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="write the option's name alone"):
        sglang(**{name: 1})


@pytest.mark.parametrize(
    ("value", "written"),
    [("no", "false"), ("off", "false"), ("False", "false"), ("yes", "true"), ("on", "true")],
)
def test_a_flag_of_sglang_is_true_or_false(value: str, written: str) -> None:
    with pytest.raises(ValidationError, match=f"write enable-metrics: {written}"):
        sglang(**{"enable-metrics": value})


def test_other_server_arguments_are_taken() -> None:
    given = {"watchdog-timeout": 600, "enable-metrics": True, "log-level": "info", "x": 1.5}
    assert sglang(**given).server_arguments == given
