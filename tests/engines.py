"""Where the real engines are: given on pytest's command line, one environment each.

    pytest tests -m vllm --engine vllm=PYTHON [--engine-variable vllm:PYTHONPATH=/site/vllm]
        [--engine-device cuda]

A test that needs an engine carries its marker and is skipped where the engine is not given.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

import pytest

from tests.session_folder import FOLDER

ENGINE_NAMES = ("vllm", "sglang", "unsloth", "transformers4")
"""The last is no engine, but the older generation of the library that reads models."""
Device = Literal["cpu", "cuda"]
LOGS = FOLDER / "logs" / str(os.getpid())
"""Of this process alone: an engine that fails is explained by what its log says."""


@dataclass
class EngineInstallations:
    """Interpreters and variables by engine; filled from the command line before collection."""

    python: dict[str, str] = field(default_factory=dict)
    variables: dict[str, dict[str, str]] = field(default_factory=dict)
    device: Device = "cpu"


INSTALLED = EngineInstallations()


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--engine", action="append", default=[], metavar="NAME=PYTHON")
    parser.addoption(
        "--engine-variable", action="append", default=[], metavar="NAME:VARIABLE=VALUE"
    )
    parser.addoption("--engine-device", choices=["cpu", "cuda"], default="cpu")


def read_options(config: pytest.Config) -> None:
    for option in config.getoption("--engine") or []:
        name, _, python = option.partition("=")
        if name not in ENGINE_NAMES or not python:
            raise pytest.UsageError(f"--engine {option}: expected NAME=PYTHON, {ENGINE_NAMES}")
        INSTALLED.python[name] = python
    for option in config.getoption("--engine-variable") or []:
        name, _, assignment = option.partition(":")
        variable, _, value = assignment.partition("=")
        INSTALLED.variables.setdefault(name, {})[variable] = value
    INSTALLED.device = "cuda" if config.getoption("--engine-device") == "cuda" else "cpu"


def skip_what_is_not_installed(items: list[pytest.Item]) -> None:
    # By its marks: an item's keywords are also its folders' names and its parameters.
    for item in items:
        for name in ENGINE_NAMES:
            if item.get_closest_marker(name) and name not in INSTALLED.python:
                item.add_marker(pytest.mark.skip(reason=f"needs --engine {name}=PYTHON"))
