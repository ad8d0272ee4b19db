"""Commands that read a config or a run folder and start no engine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qwen3_distill.cli.terminal import (
    ConfigOption,
    Overrides,
    begin_work,
    path_of,
    path_option,
    print_json,
    say,
    warn,
)
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import dump_config, load_config
from qwen3_distill.config.redaction import recordable
from qwen3_distill.errors import RunFolderError


def report(
    run_folder: Annotated[
        Path,
        typer.Argument(parser=path_of, metavar="RUN_FOLDER", help="A run folder, finished or not."),
    ],
    out: Annotated[Path | None, path_option("Default: report.html in the folder.")] = None,
) -> None:
    """Write a run's report.html again from its records."""
    config_file = run_folder / "config.json"
    if not config_file.is_file():
        raise RunFolderError(f"{run_folder} is not a run folder: it has no config.json")
    settings = load_config(config_file, for_records=True)
    from qwen3_distill.pipeline.own_folder import refuse_foreign_files_as_output
    from qwen3_distill.pipeline.summary import render_report

    if out is not None:
        refuse_foreign_files_as_output(out)
    begin_work()
    say(f"report: {render_report(run_folder, settings, out, warn)}")


def config_show(config: ConfigOption, overrides: Overrides = None) -> None:
    """Print the resolved config, defaults included, as JSON. What may be a secret is left out."""
    print_json(recordable(dump_config(load_config(config, overrides or ()))))


def config_check(config: ConfigOption, overrides: Overrides = None) -> None:
    """Check a config, its models' files, prompts and interpreters, and the space on its disk.

    It shows the first prompt as the chat template renders it. No weights are loaded and nothing is
    started. Exit status 2 when something is wrong.
    """
    settings = load_config(config, overrides or ())
    say(
        f"{config}: {settings.steps} steps of {settings.prompts_per_step} prompts x "
        f"{settings.samples_per_prompt} samples, objective {settings.objective.kind}"
    )
    from qwen3_distill.pipeline.assembly.machine import require_machine
    from qwen3_distill.pipeline.models import asks_hub, localize
    from qwen3_distill.pipeline.preflight import check_before_start, data_notes

    if asks_hub(settings):
        require_machine(settings)
    settings = localize(settings, say=say, warn=warn).config
    notes = check_before_start(settings)
    for note in (*notes, *data_notes(settings)):
        warn(note)
    from qwen3_distill.pipeline.first_prompt import first_prompt, template_notes
    from qwen3_distill.pipeline.parts import TextTools

    begin_work()
    text = TextTools(settings.student.model)
    for line in first_prompt(settings, text).lines():
        say(line)
    from qwen3_distill.pipeline.assembly.views import special_token_lines

    for line in special_token_lines(settings) or ():
        say(f"special token of the student, and the teacher's: {line}")
    for note in template_notes(settings, text):
        warn(note)
    say(f"{config} is valid")


def config_schema() -> None:
    """Print the JSON schema of a config, for editors and tools."""
    print_json(RunConfig.model_json_schema())


def config_reference() -> None:
    """Print the configuration reference (docs/configuration.md)."""
    from qwen3_distill.config.reference import config_reference

    sys.stdout.write(config_reference(RunConfig))
