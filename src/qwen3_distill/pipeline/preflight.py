"""Checks a config, its models, prompts, engines' environments and disk before anything starts.

`CHECKS` is the one list: `qwen3-distill doctor` shows every line of it, `qwen3-distill config
check` and a run refuse what would stop the run later.
"""

from collections.abc import Iterator

from qwen3_distill.config import RunConfig
from qwen3_distill.data.sources import build_source
from qwen3_distill.errors import ConfigError
from qwen3_distill.pipeline.assembly.data import overlap_of
from qwen3_distill.pipeline.assembly.machine import listed
from qwen3_distill.pipeline.assembly.machine_checks import MACHINE_CHECKS
from qwen3_distill.pipeline.data_checks import DATA_CHECKS, TRAINING_FILE
from qwen3_distill.pipeline.finding import Check, Finding, Status, ask
from qwen3_distill.pipeline.model_checks import DISK_CHECKS, FILE_CHECKS, PAIR_CHECKS
from qwen3_distill.pipeline.tokenizer_checks import TOKENIZER_CHECKS

CHECKS: tuple[Check, ...] = (
    *FILE_CHECKS,
    *DATA_CHECKS,
    *DISK_CHECKS,
    *MACHINE_CHECKS,
    *PAIR_CHECKS,
    *TOKENIZER_CHECKS,
)
"""Every check that starts no engine, in the order in which they are made."""


def findings(config: RunConfig, checks: tuple[Check, ...] = CHECKS) -> Iterator[Finding]:
    """Yield one finding per check, as they are made; where teachers differ, one for each."""
    statuses: dict[str, Status] = {}
    for check in checks:
        found: list[Status] = []
        for name, asked in check.each(config):
            finding = ask(check, asked, statuses, name)
            found.append(finding.status)
            yield finding
        statuses[check.name] = Status.FAIL if Status.FAIL in found else found[-1]


def check_before_start(config: RunConfig, *, reads_prompts: bool = True) -> list[str]:
    """Check what keeps a run from starting, before engines take minutes to start.

    Args:
        reads_prompts: also read the training prompts, which takes a while for millions, and check
            reference answers. False where `build_parts` will do both; training prompts need only
            exist then. Held-out problems are always read.

    Returns:
        What the user should know of this machine and of the engines' versions.

    Raises:
        ConfigError: one error with all that is missing, with remedies.
    """
    checks = tuple(
        check
        for check in CHECKS
        if (check.refuses_run or check.notes_run) and (reads_prompts or not check.reads_prompts)
    )
    found = _refused(config, checks if reads_prompts else (*checks, TRAINING_FILE))
    telling = {check.name for check in checks if check.notes_run}
    return [
        f"{finding.name}: {finding.verdict.text}"
        for finding in found
        if finding.status is Status.WARN and finding.name in telling
    ]


def check_weights(config: RunConfig) -> None:
    """Check models and disk again, now that the weights of models from the hub are there.

    Raises:
        ConfigError: something is missing.
    """
    _refused(config, (*FILE_CHECKS, *DISK_CHECKS))


def _refused(config: RunConfig, checks: tuple[Check, ...]) -> list[Finding]:
    """Make checks; return their findings, or raise one error with all failures."""
    found = [*findings(config, checks)]
    failed = [finding.verdict.text for finding in found if finding.status is Status.FAIL]
    if failed:
        raise ConfigError(listed("the config names what is not there:", [*dict.fromkeys(failed)]))
    return found


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
