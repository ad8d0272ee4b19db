"""The command that runs a config."""

import typer

from qwen3_distill.cli.terminal import ConfigOption, Overrides, begin_work, warn
from qwen3_distill.config.load import load_config


def run(config: ConfigOption, overrides: Overrides = None) -> None:
    """Distil: generate, score and train for all steps, then evaluate and report.

    The same command continues a run from its newest checkpoint. The first Ctrl-C finishes the
    step and saves; exit status 130.
    """
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline.run import INTERRUPTED_EXIT_CODE
    from qwen3_distill.pipeline.run import run as run_pipeline
    from qwen3_distill.recording.console import make_reporter

    begin_work()
    try:
        if run_pipeline(settings, make_reporter(settings.steps), warn) is not None:
            return
        warn("stopped and saved; start the same command again to continue")
    except KeyboardInterrupt:
        warn("stopped at once; the same command continues from the newest checkpoint, if any")
    raise typer.Exit(INTERRUPTED_EXIT_CODE)
