"""Gives every engine of a run its share of the memory and its log file."""

from pathlib import Path

from qwen3_distill.config import RunConfig
from qwen3_distill.pipeline.own_folder import require_own_folder
from qwen3_distill.planning.cards import plan_cards, plan_of
from qwen3_distill.planning.memory import Engine
from qwen3_distill.planning.plan import MemoryPlan


def plan_memory(config: RunConfig, engine: Engine = "learner") -> MemoryPlan | None:
    """Plan the card of an engine; None where all are embedded and share one allocator.

    Without a cluster all engines have the same card.

    Raises:
        ConfigError: an engine does not fit its card.
    """
    return None if all_embedded(config) else plan_of(engine, plan_cards(config))


def all_embedded(config: RunConfig) -> bool:
    """Tell whether no engine of a config is a library with a memory of its own."""
    kinds = {config.generation.kind, config.training.kind}
    kinds |= {teacher.section.kind for teacher in config.loaded_teachers}
    return kinds == {"embedded"}


def require_plan(plan: MemoryPlan | None) -> MemoryPlan:
    """The plan, which exists wherever an engine is real."""
    assert plan is not None, "real engines have a plan"
    return plan


def engine_log(config: RunConfig, name: str) -> Path:
    """The file that an engine's process writes its output to.

    Raises:
        RunFolderError: ``output_dir`` holds files of something else.
    """
    require_own_folder(config.output_path)
    return config.output_path / "logs" / f"{name}.log"
