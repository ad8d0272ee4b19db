"""vLLM is asked for CUDA graphs of batches that it makes none for by itself."""

from typing import Any

import pytest

from qwen3_distill.generation.vllm.settings import VllmSettings


def settings(max_sequences: int, **others: Any) -> VllmSettings:
    return VllmSettings(
        model_dir="models/any",
        dtype="bfloat16",
        eos_ids=(1,),
        max_sequences=max_sequences,
        max_model_tokens=640,
        kv_cache_bytes=1 << 30,
        stream_interval=8,
        lora_rank=None,
        **others,
    )


@pytest.mark.parametrize(
    ("max_sequences", "largest"),
    [(64, None), (512, None), (513, 528), (600, 608), (768, 768), (1024, 1024)],
)
def test_graphs_reach_the_largest_batch(max_sequences: int, largest: int | None) -> None:
    assert settings(max_sequences).largest_graph == largest


@pytest.mark.parametrize(
    "others",
    [
        {"enforce_eager": True},
        {"engine_arguments": {"max_cudagraph_capture_size": 256}},
        {"engine_arguments": {"cudagraph_capture_sizes": [256, 1024]}},
        {"engine_arguments": {"compilation_config": {"cudagraph_capture_sizes": [1024]}}},
        {"engine_arguments": {"speculative_config": {"num_speculative_tokens": 2}}},
        {"engine_arguments": {"compilation_config": {"max_cudagraph_capture_size": 512}}},
    ],
)
def test_sizes_that_are_given_stay(others: dict[str, Any]) -> None:
    assert settings(1024, **others).largest_graph is None


@pytest.mark.parametrize("compilation", [{"mode": 3}, 3])
def test_other_settings_of_the_compiler_leave_it(compilation: object) -> None:
    given = {"compilation_config": compilation, "swap_space": 9}
    assert settings(1024, engine_arguments=given).largest_graph == 1024
