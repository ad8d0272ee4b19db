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

IGNORED_AT_THE_END = """\
Exception ignored in atexit callback: <bound method finalize._exitfunc of <class 'finalize'>>
Traceback (most recent call last):
  File "/x/weakref.py", line 637, in _select_for_exit
    L = [(f,i) for (f,i) in cls._registry.items() if i.atexit]
        ^^^^^^^^^^^^^^^
RuntimeError: dictionary changed size during iteration
"""


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
        (
            "RuntimeError: CUDA out of memory\nEOFError: a worker that waited for it",
            r"too little memory: planned .*CUDA out of memory",
        ),
        (
            f"ValueError: the cause\n{IGNORED_AT_THE_END}driver: the last words",
            r"vLLM says: ValueError: the cause$",
        ),
        (
            f"{IGNORED_AT_THE_END}{IGNORED_AT_THE_END}ValueError: the cause",
            r"vLLM says: ValueError: the cause$",
        ),
    ],
    ids=[
        "its last words",
        "not installed",
        "another version",
        "a version without the engine",
        "an import that it could do without",
        "another process fails after it",
        "an exception that Python ignores after it",
        "exceptions that Python ignores before it",
    ],
)
def test_why_a_process_ended_at_its_start_is_said(
    tiny_models: TinyModels, tmp_path: Path, printed: str, message: str
) -> None:
    python = tmp_path / "fake-python"
    (tmp_path / "printed").write_text(printed)
    python.write_text(f"#!/bin/sh\ncat '{tmp_path}/printed' >&2\nexit 3\n")
    python.chmod(0o755)
    config = VllmGeneration.model_validate({"kind": "vllm", "python": str(python)})
    engine = vllm_engine(
        tiny_models.student, config, lora=None, kv_cache_bytes=1 << 20, log=tmp_path / "vllm.log"
    )
    with pytest.raises(EngineStartError, match=f"(?s){message}"):
        asyncio.run(engine.start())
    with pytest.raises(ProcessLookupError):
        os.kill(pid_of(engine), 0)
