"""What a vLLM that does not start says, with fake interpreters in its place."""

import asyncio
import os
from pathlib import Path

import pytest

from qwen3_distill.config import VllmGeneration
from qwen3_distill.errors import EngineStartError
from qwen3_distill.generation.vllm.engine import vllm_engine
from tests.contract.builders import pid_of
from tests.tiny_models import TinyModels


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("driver: the last words", r"did not start.*driver: the last words"),
        (
            "ModuleNotFoundError: No module named 'vllm'",
            r"not installed for .*fake-python.*engines install vllm.* if generation.python is null",
        ),
        (
            "ImportError: cannot import name 'TokensPrompt' from 'vllm' (/x/vllm/__init__.py)",
            r"version that this does not work with \(cannot import name 'TokensPrompt'"
            r".*docs/engines/install\.md",
        ),
        (
            "ModuleNotFoundError: No module named 'vllm.v1.engine'",
            r"version that this does not work with \(No module named 'vllm.v1.engine'\)",
        ),
        (
            "ImportError: no 'vllm._x', going on\nRuntimeError: CUDA out of memory",
            r"too little memory: planned .*CUDA out of memory",
        ),
    ],
    ids=[
        "its last words",
        "not installed",
        "another version",
        "a version without the engine",
        "an import that it could do without",
    ],
)
def test_why_a_process_ended_at_its_start_is_said(
    tiny_models: TinyModels, tmp_path: Path, printed: str, message: str
) -> None:
    python = tmp_path / "fake-python"
    python.write_text(f'#!/bin/sh\necho "{printed}" >&2\nexit 3\n')
    python.chmod(0o755)
    config = VllmGeneration.model_validate({"kind": "vllm", "python": str(python)})
    engine = vllm_engine(
        tiny_models.student, config, lora=None, kv_cache_bytes=1 << 20, log=tmp_path / "vllm.log"
    )
    with pytest.raises(EngineStartError, match=f"(?s){message}"):
        asyncio.run(engine.start())
    with pytest.raises(ProcessLookupError):
        os.kill(pid_of(engine), 0)
