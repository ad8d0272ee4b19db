"""What can be seen to be missing before anything is loaded or started."""

import os
from collections.abc import Callable

from qwen3_distill.config import (
    JsonlPrompts,
    ParquetPrompts,
    PromptsConfig,
    RunConfig,
    VerifierConfig,
)
from qwen3_distill.data.sources import build_source
from qwen3_distill.data.verifiers import check_references
from qwen3_distill.errors import ConfigError, DataError, ModelError
from qwen3_distill.hosts.child import is_absent
from qwen3_distill.modeling.loading import check_model_dir


def problems_of(config: RunConfig, *, reads_prompts: bool = True) -> list[str]:
    """Models, prompts and interpreters of a config that are not there, each with what to change.

    Args:
        reads_prompts: whether the training prompts are read, which takes a while if there are
            millions, or only looked for, and reference answers are checked: what builds a run's
            parts does both. Held-out problems are always read.
    """
    checks: list[Callable[[], object]] = [
        lambda: check_model_dir(config.student.model),
        lambda: check_model_dir(config.scoring.model),
    ]
    prompts = config.prompts
    is_file = isinstance(prompts, JsonlPrompts | ParquetPrompts)
    if reads_prompts or (is_file and not os.path.exists(prompts.path)):
        checks.append(lambda: _read(prompts, config.verifier))
    if (evaluation := config.evaluation) is not None:
        verifier = evaluation.verifier if reads_prompts else None
        checks.append(lambda: _read(evaluation.prompts, verifier))
    found = [problem for check in checks if (problem := _problem(check))]
    for name in ("generation", "scoring", "training"):
        python = getattr(getattr(config, name), "python", None)
        if python is not None and is_absent(python):
            found.append(
                f"{name}.python={python} does not exist or cannot be run; give the interpreter of "
                "an environment that has the engine (docs/engines.md)"
            )
    return list(dict.fromkeys(found))


def check_before_start(config: RunConfig, *, reads_prompts: bool = True) -> None:
    """Raise for all of `problems_of` at once: engines take minutes to start.

    Raises:
        ConfigError: something is missing.
    """
    found = problems_of(config, reads_prompts=reads_prompts)
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        raise ConfigError("\n  - ".join(["the config names what is not there:", *found]))


def _read(prompts: PromptsConfig, verifier: VerifierConfig | None) -> None:
    source = build_source(prompts)
    if verifier is not None:
        check_references(verifier, source)


def _problem(check: Callable[[], object]) -> str | None:
    try:
        check()
    except (ModelError, DataError) as error:
        return str(error)
    return None
