"""The contracts and the config can be read without waiting for torch."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "datasets", "vllm", "sglang", "unsloth", "trl")


def loaded_by(*modules: str) -> set[str]:
    """Heavy packages that importing the modules loads, in a fresh interpreter."""
    code = f"import sys, {', '.join(modules)}; print(*(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_contracts_config_and_command_line_load_nothing_heavy() -> None:
    names = ("types", "ports", "config", "config.load", "errors", "hosts.process", "cli.main")
    assert loaded_by(*(f"qwen3_distill.{name}" for name in names)) == set()


@pytest.mark.parametrize("module", ["qwen3_distill.modeling.digest"])
def test_guard_sees_torch_where_it_is(module: str) -> None:
    assert "torch" in loaded_by(module)
