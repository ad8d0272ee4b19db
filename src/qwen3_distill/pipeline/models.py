"""Turns the hub ids of a config into local directories, once and before anything else runs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from qwen3_distill.config import HuggingFacePrompts, PromptsConfig, RunConfig
from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.hub import (
    HubCommit,
    ModelSource,
    fetch_weights,
    locate_dataset,
    locate_model,
    parse_id,
)
from qwen3_distill.utils.json_text import read_json

Say = Callable[[str], None]


HubRecord: TypeAlias = Mapping[str, Mapping[str, str]]
"""Repository, revision and commit by role (``student``, ``teacher``) or setting (``prompts``)."""


def _silent(message: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """A config whose models are directories of this machine."""

    config: RunConfig
    """Models are directories. Datasets of the hub know their commit."""
    sources: Mapping[str, ModelSource]
    """By role: ``student``, ``teacher``; with several teachers ``teacher.math``."""
    datasets: Mapping[str, HubCommit]
    """By setting: ``prompts``, ``evaluation.prompts``; without local ones."""

    @property
    def hub(self) -> dict[str, dict[str, str]]:
        """The commits that came from the hub, as JSON values, by role or setting."""
        models = {role: source.hub for role, source in self.sources.items() if source.hub}
        return {name: commit.record() for name, commit in {**models, **self.datasets}.items()}

    def fetch_weights(self, say: Say, roles: Sequence[str] = ("student", "teacher")) -> None:
        """Download the weights of models that were found on the hub; others need nothing.

        Raises:
            ModelError: see `qwen3_distill.modeling.hub.fetch_weights`.
        """
        for role, source in self.sources.items():
            if _belongs(role, roles):
                fetch_weights(source, say)


def _belongs(role: str, roles: Sequence[str]) -> bool:
    """Whether a model's role is among those asked for; ``teacher`` asks for every teacher."""
    return role in roles or role.partition(".")[0] in roles


def asks_hub(config: RunConfig) -> bool:
    """Whether `localize` may have to ask the hub for something of a config."""
    models = (config.student.model, *(teacher.section.model for teacher in config.teachers))
    sources = [config.prompts, config.evaluation.prompts if config.evaluation else None]
    return any(isinstance(source, HuggingFacePrompts) for source in sources) or any(
        parse_id(model) is not None and not Path(model).exists() for model in models
    )


def recorded_hub(manifest: Path) -> HubRecord:
    """Read the commits of a run's last start from its manifest; empty where it has none."""
    keys = {"repo", "revision", "commit"}
    with suppress(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        hub = read_json(manifest)["starts"][-1]["hub"]
        return {
            name: record
            for name, record in hub.items()
            if set(record) == keys and all(isinstance(text, str) for text in record.values())
        }
    return {}


def localize(
    config: RunConfig,
    *,
    recorded: HubRecord | None = None,
    say: Say = _silent,
    warn: Say = _silent,
    roles: Sequence[str] = ("student", "teacher"),
    datasets: bool = True,
) -> LocalConfig:
    """Find what a config names on the hub. Config and tokenizer are downloaded, weights are not.

    Args:
        recorded: `LocalConfig.hub` of an earlier start, whose commits are used again.
        say: told which directory or commit is used.
        warn: told that a branch has moved, or that the hub was not asked.
        roles: which models to find; the others stay as they are named.
        datasets: whether to find datasets, too.

    Raises:
        ModelError: a model is neither a directory nor an accessible repository.
        DataError: the same of a dataset.
    """
    earlier = {name: HubCommit(**record) for name, record in (recorded or {}).items()}
    sources = _located(config, roles, earlier, say, warn)
    found_datasets: dict[str, HubCommit] = {}

    def pinned(prompts: PromptsConfig, setting: str) -> PromptsConfig:
        if not datasets or not isinstance(prompts, HuggingFacePrompts):
            return prompts
        found = locate_dataset(
            prompts.path,
            prompts.revision,
            f"{setting}.path",
            recorded=earlier.get(setting),
            warn=warn,
        )
        if found is None:
            return prompts
        found_datasets[setting] = found
        return prompts.at_commit(found.commit)

    changes: dict[str, Any] = {"prompts": pinned(config.prompts, "prompts")}
    if "student" in sources:
        update = {"model": sources["student"].directory}
        changes["student"] = config.student.model_copy(update=update)
    sections = {
        teacher.name: teacher.section.model_copy(update={"model": sources[teacher.role].directory})
        for teacher in config.teachers
        if teacher.role in sources
    }
    if (evaluation := config.evaluation) is not None:
        prompts = pinned(evaluation.prompts, "evaluation.prompts")
        changes["evaluation"] = evaluation.model_copy(update={"prompts": prompts})
    return LocalConfig(
        config=config.with_sections(sections).model_copy(update=changes),
        sources=sources,
        datasets=found_datasets,
    )


def _located(
    config: RunConfig,
    roles: Sequence[str],
    earlier: Mapping[str, HubCommit],
    say: Say,
    warn: Say,
) -> dict[str, ModelSource]:
    """Find the models of some roles; return their sources by role."""
    named = {"student": ("student.model", config.student.model)}
    for teacher in config.teachers:
        named[teacher.role] = f"{teacher.setting}.model", teacher.section.model
    return {
        role: locate_model(name, setting, recorded=earlier.get(role), say=say, warn=warn)
        for role, (setting, name) in named.items()
        if _belongs(role, roles)
    }


def localize_again(
    config: RunConfig,
    manifest: Path,
    *,
    say: Say = _silent,
    roles: Sequence[str] = ("student", "teacher"),
    datasets: bool = True,
) -> LocalConfig:
    """Find what a run had from the hub, at the commits of its manifest.

    A model that was a directory, or that cannot be had any more, stays as it is named.

    Args:
        say: told which commit is used.
        roles: which models to find.
        datasets: whether to find datasets, too.
    """
    recorded = recorded_hub(manifest)
    local = localize(config, recorded=recorded, warn=say, roles=(), datasets=datasets)
    for role in ["student", *(teacher.role for teacher in config.teachers)]:
        if role in recorded and _belongs(role, roles):
            with suppress(ModelError):
                found = localize(
                    local.config,
                    recorded=recorded,
                    say=say,
                    warn=say,
                    roles=(role,),
                    datasets=False,
                )
                local = replace(
                    local, config=found.config, sources={**local.sources, **found.sources}
                )
    return local


def local_model(name: str, setting: str, say: Say) -> str:
    """Return the directory, with weights, of a model that an option names."""
    source = locate_model(name, setting, say=say, warn=say)
    fetch_weights(source, say)
    return source.directory
