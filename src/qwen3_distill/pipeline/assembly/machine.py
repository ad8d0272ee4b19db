"""Checks that this machine has the GPU and the engines that a config asks for."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from qwen3_distill.config import (
    GenerationConfig,
    RunConfig,
    ScoringConfig,
    SglangScoring,
    TrainingConfig,
    UnslothTraining,
    VllmGeneration,
)
from qwen3_distill.environments.installed import find, machine_kind, missing_engines
from qwen3_distill.errors import ConfigError
from qwen3_distill.hosts.child import is_absent

Name: TypeAlias = Literal["generation", "scoring", "training"]
NAMES: tuple[Name, ...] = ("generation", "scoring", "training")
_Section: TypeAlias = GenerationConfig | ScoringConfig | TrainingConfig


def machine_problems(config: RunConfig, sections: Sequence[Name] = NAMES) -> list[str]:
    """List what this machine lacks, with remedies: an NVIDIA driver, engines, interpreters.

    Args:
        sections: those whose engine will be started.
    """
    kind, found = machine_kind(), []
    chosen = {name: section for name in sections if (section := _section(config, name)) is not None}
    on_cuda = [name for name, section in chosen.items() if _asks_cuda(section)]
    if on_cuda and kind == "cpu":
        asked = ", ".join(f"{name}.device=cuda" for name in on_cuda)
        found.append(
            f"{asked}, but there is no CUDA device: no NVIDIA driver is seen, or "
            "CUDA_VISIBLE_DEVICES hides its GPUs (`nvidia-smi` must list one). Without a GPU use "
            "device=auto or cpu, or take configs/demo.yaml"
        )
        kind = "cuda"  # the engines that the config needs, too
    looked_up = [section.kind for section in chosen.values() if _is_looked_up(section)]
    missing = [engine for engine in looked_up if find(engine, kind) is None]
    if missing:
        found.append(missing_engines(missing, kind))
    for name, section in chosen.items():
        python = section.interpreter
        if python is not None and is_absent(python):
            found.append(
                f"{name}.python={python} does not exist or cannot be run; give the interpreter of "
                "an environment that has the engine, or null for the one that `qwen3-distill "
                "engines install` makes (docs/engines/install.md)"
            )
    return found


def require_machine(config: RunConfig, sections: Sequence[Name] = NAMES) -> None:
    """Raise one error with all of `machine_problems`, before anything is downloaded.

    Raises:
        ConfigError: something is missing.
    """
    if found := machine_problems(config, sections):
        raise ConfigError(listed("this machine lacks what the config asks for:", found))


def listed(head: str, problems: Sequence[str]) -> str:
    """One problem as it is, several as a list below ``head``."""
    return problems[0] if len(problems) == 1 else "\n  - ".join([head, *problems])


def _section(config: RunConfig, name: Name) -> _Section | None:
    sections: dict[Name, _Section | None] = {
        "generation": config.generation,
        "scoring": config.loaded_teacher,
        "training": config.training,
    }
    return sections[name]


def _asks_cuda(section: _Section) -> bool:
    if isinstance(section, VllmGeneration | UnslothTraining):  # have no such setting
        return False
    return section.device == "cuda"


def _is_looked_up(section: _Section) -> bool:
    """Whether the engine runs in the environment that is installed on this machine."""
    match section:
        case VllmGeneration() | UnslothTraining():
            return section.python is None
        case SglangScoring():
            return section.python is None and not section.urls
        case _:
            return False
