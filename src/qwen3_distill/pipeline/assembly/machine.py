"""Checks that this machine has the GPU and the engines that a config asks for."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from qwen3_distill.config import (
    GenerationConfig,
    RunConfig,
    ScoringConfig,
    ServedScoring,
    TrainingConfig,
    UnslothTraining,
    VllmGeneration,
)
from qwen3_distill.environments.installed import find, machine_kind, missing_engines
from qwen3_distill.errors import ConfigError
from qwen3_distill.hosts.child import is_absent

Name: TypeAlias = Literal["generation", "scoring", "training"]
NAMES: tuple[Name, ...] = ("generation", "scoring", "training")
Section: TypeAlias = GenerationConfig | ScoringConfig | TrainingConfig


def machine_problems(config: RunConfig, sections: Sequence[Name] = NAMES) -> list[str]:
    """List what this machine lacks, with remedies: an NVIDIA driver, engines, interpreters.

    Args:
        sections: those whose engine will be started.
    """
    found = [
        device_problem(config, sections),
        missing_environments(config, sections),
        *(interpreter_problem(config, name) for name in sections),
    ]
    return [problem for problem in found if problem is not None]


def device_problem(config: RunConfig, sections: Sequence[Name] = NAMES) -> str | None:
    """Say which sections ask for a CUDA device where there is none, and what to do."""
    on_cuda = _on_cuda(config, sections)
    if not on_cuda or machine_kind() == "cuda":
        return None
    asked = ", ".join(f"{name}.device=cuda" for name in on_cuda)
    return (
        f"{asked}, but there is no CUDA device: no NVIDIA driver is seen, or "
        "CUDA_VISIBLE_DEVICES hides its GPUs (`nvidia-smi` must list one); without a GPU use "
        "device=auto or cpu, or take configs/demo.yaml"
    )


def missing_environments(config: RunConfig, sections: Sequence[Name] = NAMES) -> str | None:
    """Say which engines are looked up on this machine and not installed, and what to do."""
    # A config for a GPU needs the engines of one, also where the GPU is still missing.
    kind = "cuda" if _on_cuda(config, sections) else machine_kind()
    chosen = [section for name in sections for section in sections_of(config, name).values()]
    looked_up = dict.fromkeys(section.kind for section in chosen if _is_looked_up(section))
    missing = [engine for engine in looked_up if find(engine, kind) is None]
    return missing_engines(missing, kind) if missing else None


def interpreter_problem(config: RunConfig, name: Name) -> str | None:
    """Say that a section's interpreter is not there, and what to do.

    Args:
        name: of the section.
    """
    for setting, section in sections_of(config, name).items():
        python = section.interpreter
        if python is not None and is_absent(python):
            return (
                f"{setting}.python={python} does not exist or cannot be run; give the interpreter "
                "of an environment that has the engine, or null for the one that `qwen3-distill "
                "engines install` makes (docs/engines/install.md)"
            )
    return None


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


def sections_of(config: RunConfig, name: Name) -> dict[str, Section]:
    """Return a section of a config by its setting: of `scoring` each loaded teacher's."""
    if name == "scoring":
        return {teacher.setting: teacher.section for teacher in config.loaded_teachers}
    return {name: getattr(config, name)}


def _on_cuda(config: RunConfig, sections: Sequence[Name]) -> list[str]:
    return [
        setting
        for name in sections
        for setting, section in sections_of(config, name).items()
        if _asks_cuda(section)
    ]


def _asks_cuda(section: Section) -> bool:
    if isinstance(section, VllmGeneration | UnslothTraining):  # have no such setting
        return False
    return section.device == "cuda"


def _is_looked_up(section: Section) -> bool:
    """Whether the engine runs in the environment that is installed on this machine."""
    match section:
        case VllmGeneration() | UnslothTraining():
            return section.python is None
        case ServedScoring():
            return section.python is None and not section.urls
        case _:
            return False
