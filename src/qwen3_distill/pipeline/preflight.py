"""Checks a config's models, prompts, interpreters and disk before anything is loaded or started."""

import os
from collections.abc import Callable

from qwen3_distill.config import (
    JsonlPrompts,
    ParquetPrompts,
    PromptsConfig,
    RunConfig,
    ScoringConfig,
    VerifierConfig,
)
from qwen3_distill.data.rollout_files import read_training
from qwen3_distill.data.sources import build_source
from qwen3_distill.data.verifiers import check_references
from qwen3_distill.errors import ConfigError, DataError, ModelError, RunFolderError
from qwen3_distill.modeling.hub import is_snapshot
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.modeling.student_directory import check_student
from qwen3_distill.pipeline.assembly.data import overlap_of
from qwen3_distill.pipeline.assembly.machine import listed, machine_problems
from qwen3_distill.pipeline.disk_space import check_run_space
from qwen3_distill.pipeline.own_folder import require_own_folder
from qwen3_distill.scoring.cache import check_cache_folder


def problems_of(
    config: RunConfig, *, reads_prompts: bool = True, downloaded: bool = True
) -> list[str]:
    """List a config's unusable models, prompts, engines, folders and disk, with remedies.

    Args:
        reads_prompts: also read the training prompts, which takes a while for millions, and check
            reference answers. False where `build_parts` will do both; training prompts need only
            exist then. Held-out problems are always read.
        downloaded: False: models of the hub may lack their weights.
    """
    student, scoring = config.student.model, config.scoring
    checks: list[Callable[[], object]] = [
        lambda: check_student(student, weights=downloaded or not is_snapshot(student)),
        *([] if scoring is None else _teacher_checks(scoring, downloaded=downloaded)),
        lambda: require_own_folder(config.output_path),
    ]
    if (file := config.rollouts.file) is not None:
        checks.append(lambda: read_training(file))
    prompts = config.prompts
    is_file = isinstance(prompts, JsonlPrompts | ParquetPrompts)
    if reads_prompts or (is_file and not os.path.exists(prompts.path)):
        checks.append(lambda: _read(prompts, config.verifier))
    if (evaluation := config.evaluation) is not None:
        verifier = evaluation.verifier if reads_prompts else None
        checks.append(lambda: _read(evaluation.prompts, verifier))
    found = [problem for check in checks if (problem := _problem(check))]
    if not found:  # the space depends on the student's weights
        found += [problem] if (problem := _problem(lambda: check_run_space(config))) else []
    return list(dict.fromkeys([*found, *machine_problems(config)]))


def check_before_start(
    config: RunConfig, *, reads_prompts: bool = True, downloaded: bool = True
) -> None:
    """Raise one error with all of `problems_of`, before engines take minutes to start.

    Raises:
        ConfigError: something is missing.
    """
    found = problems_of(config, reads_prompts=reads_prompts, downloaded=downloaded)
    if found:
        raise ConfigError(listed("the config names what is not there:", found))


def data_notes(config: RunConfig) -> list[str]:
    """List what the user should know about a config's prompts; the prompts are not rendered."""
    trained_on = build_source(config.prompts)
    notes = [*trained_on.notes]
    if config.evaluation is not None:
        held_out = build_source(config.evaluation.prompts)
        notes += [f"evaluation: {note}" for note in held_out.notes]
        overlap = overlap_of(config, trained_on, held_out)
        notes += [str(overlap)] if overlap else []
    return notes


def _teacher_checks(scoring: ScoringConfig, *, downloaded: bool) -> list[Callable[[], object]]:
    teacher, cache = scoring.model, scoring.cache_folder
    checks: list[Callable[[], object]] = [
        lambda: load_identity(teacher, weights=downloaded or not is_snapshot(teacher))
    ]
    if cache is not None:
        checks.append(lambda: check_cache_folder(cache))
    return checks


def _read(prompts: PromptsConfig, verifier: VerifierConfig | None) -> None:
    source = build_source(prompts)
    if verifier is not None:
        check_references(verifier, source)


def _problem(check: Callable[[], object]) -> str | None:
    try:
        check()
    except (ModelError, DataError, RunFolderError) as error:
        return str(error)
    return None
