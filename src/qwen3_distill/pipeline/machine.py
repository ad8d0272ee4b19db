"""Checks that this machine has the GPU and the engines that a config asks for."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from qwen3_distill.config import RunConfig
from qwen3_distill.environments.installed import find, machine_kind, missing_engines
from qwen3_distill.errors import ConfigError
from qwen3_distill.hosts.child import is_absent

Section: TypeAlias = Literal["generation", "scoring", "training"]
SECTIONS: tuple[Section, ...] = ("generation", "scoring", "training")


def machine_problems(config: RunConfig, sections: Sequence[Section] = SECTIONS) -> list[str]:
    """List what this machine lacks, with remedies: an NVIDIA driver, engines, interpreters.

    Args:
        sections: those whose engine will be started.
    """
    kind, found = machine_kind(), []
    on_cuda = [name for name in sections if _device(config, name) == "cuda"]
    if on_cuda and kind == "cpu":
        asked = ", ".join(f"{name}.device=cuda" for name in on_cuda)
        found.append(
            f"{asked}, but there is no CUDA device: no NVIDIA driver is seen, or "
            "CUDA_VISIBLE_DEVICES hides its GPUs (`nvidia-smi` must list one). Without a GPU use "
            "device=auto or cpu, or take configs/demo.yaml"
        )
        kind = "cuda"  # the engines that the config needs, too
    missing = [
        config_section.kind
        for name in sections
        if _needs_environment(config_section := getattr(config, name))
        and find(config_section.kind, kind) is None
    ]
    if missing:
        found.append(missing_engines(missing, kind))
    for name in sections:
        python = getattr(config, name).interpreter
        if python is not None and is_absent(python):
            found.append(
                f"{name}.python={python} does not exist or cannot be run; give the interpreter of "
                "an environment that has the engine, or null for the one that `qwen3-distill "
                "engines install` makes (docs/engines/install.md)"
            )
    return found


def require_machine(config: RunConfig, sections: Sequence[Section] = SECTIONS) -> None:
    """Raise one error with all of `machine_problems`, before anything is downloaded.

    Raises:
        ConfigError: something is missing.
    """
    if found := machine_problems(config, sections):
        raise ConfigError(listed("this machine lacks what the config asks for:", found))


def listed(head: str, problems: Sequence[str]) -> str:
    """One problem as it is, several as a list below ``head``."""
    return problems[0] if len(problems) == 1 else "\n  - ".join([head, *problems])


def _device(config: RunConfig, name: Section) -> str | None:
    return getattr(getattr(config, name), "device", None)


def _needs_environment(section: object) -> bool:
    """Whether a section's engine runs in an environment that is looked up."""
    if getattr(section, "kind", None) == "embedded" or getattr(section, "urls", ()):
        return False
    return getattr(section, "python", None) is None
