"""``qwen3-distill export``: a finished run's student for others to use."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen3_distill.cli.terminal import say


def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    to: Annotated[
        Literal["hf", "gguf", "adapter"],
        typer.Option(
            help="hf: a model directory; gguf: a file for llama.cpp and Ollama; adapter: the "
            "LoRA alone, for peft."
        ),
    ],
    quant: Annotated[
        Literal["f16", "q8_0"], typer.Option(help="Type of the matrices, with --to gguf.")
    ] = "f16",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default: next to RUN, e.g. RUN-gguf-f16."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Also upload to this repository of the Hugging Face Hub; a new one is private.",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Hub id of the model that the student started from, for the model card, when "
            "the run read it from a directory.",
        ),
    ] = None,
    max_logit_diff: Annotated[
        float,
        typer.Option(min=0.0, help="Refuse an f16 file whose logits differ by more than this."),
    ] = 1e-2,
) -> None:
    """Export a finished run's student, with a model card of the run's facts.

    RUN is not changed. An earlier export in the folder is replaced; any other content is refused.
    """
    import transformers

    from qwen3_distill.export.export import ExportRequest, export_run

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    request = ExportRequest(
        run=run_folder,
        to=to,
        quant=quant,
        out=out,
        push=push,
        base_model=base_model,
        max_logit_diff=max_logit_diff,
    )
    export_run(request, say)
