"""One export from start to end: check, write, read back, describe, put in place, push."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from qwen3_distill.export.adapter import (
    TOLERANCE,
    check_adapter,
    read_adapter,
    require_lora,
    write_adapter,
)
from qwen3_distill.export.card import hub_base_model, write_card
from qwen3_distill.export.finished_run import FinishedRun, not_in_use, read_finished_run
from qwen3_distill.export.gguf_check import F16_TOLERANCE, check_gguf
from qwen3_distill.export.gguf_file import Quant, check_expressible, require_gguf, write_gguf
from qwen3_distill.export.hub import check_push, push
from qwen3_distill.export.target import check_target, written_whole
from qwen3_distill.utils.signals import signals_as_ctrl_c

Kind: TypeAlias = Literal["hf", "gguf", "adapter"]


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A request to export: the run, the format and the target."""

    run: Path
    to: Kind
    quant: Quant = "f16"
    """Number format of the weights in a GGUF file."""
    out: Path | None = None
    """None: next to the run folder, named after it."""
    push: str | None = None
    """Repository on the hub."""
    base_model: str | None = None
    """Hub id of the model that the student started from; None: as the run recorded it."""
    max_logit_diff: float = F16_TOLERANCE
    """Largest logit difference that rounding to float16 may cause."""


@dataclass(kw_only=True)
class _Outcome:
    """A writer's lines about the files that it wrote."""

    contents: list[str]
    """Paragraphs of the model card."""
    not_measured: list[str]
    figures: dict[str, float] = field(default_factory=dict)


class _Writer(Protocol):
    """Writes one kind of export into a folder. What can be refused was refused before."""

    def __call__(self, folder: Path) -> _Outcome: ...


def export_run(request: ExportRequest, say: Callable[[str], None]) -> Path:
    """Export a finished run's student; return the folder.

    Everything that can be refused is refused before the first write. The run folder is read only.

    Args:
        say: told what was written and what was measured of it.

    Raises:
        DistillError: one of the errors of the run folder, the target, the tokenizer or the hub.
    """
    run = read_finished_run(request.run)
    with ExitStack() as stack:
        stack.enter_context(signals_as_ctrl_c())
        stack.enter_context(not_in_use(run.path))
        teachers = [teacher.section.model for teacher in run.config.teachers]
        names = [run.config.student.model, *teachers]
        models = tuple(Path(name) for name in names)
        target = check_target(request.out or _default_target(run, request), (run.path, *models))
        base_model = request.base_model or hub_base_model(run)
        write = _WRITERS[request.to](run, request, say)
        if request.push is not None:
            check_push(request.push)
        record: dict[str, Any] = {"to": request.to, "run": run.name}
        with written_whole(target, record) as folder:
            outcome = write(folder)
            record["figures"] = outcome.figures
            write_card(
                folder,
                run,
                to=request.to,
                base_model=base_model,
                contents=outcome.contents,
                not_measured=outcome.not_measured,
            )
        say(f"exported to {target}")
        if request.push is not None:
            say(f"pushed: {push(target, request.push)}")
    return target


def _default_target(run: FinishedRun, request: ExportRequest) -> Path:
    suffix = f"gguf-{request.quant}" if request.to == "gguf" else request.to
    return run.path.with_name(f"{run.name}-{suffix}")


def _prepare_hf(run: FinishedRun, request: ExportRequest, say: Callable[[str], None]) -> _Writer:
    def write(folder: Path) -> _Outcome:
        shutil.copytree(run.student, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        return _Outcome(
            contents=[
                "The trained student as a Hugging Face model directory: the files that the run "
                "wrote, unchanged."
            ],
            not_measured=[],
        )

    return write


def _prepare_adapter(
    run: FinishedRun, request: ExportRequest, say: Callable[[str], None]
) -> _Writer:
    tuning = require_lora(run)
    adapter = read_adapter(run)
    base_model = request.base_model or hub_base_model(run) or run.config.student.model

    def write(folder: Path) -> _Outcome:
        write_adapter(folder, adapter, tuning, base_model)
        say("comparing the adapter on its base with the student")
        difference = check_adapter(run, folder)
        contents = [
            "The LoRA adapter alone, in peft's layout. It belongs on the weights that the student "
            "started from."
        ]
        if difference is None:
            say(f"not compared: {run.config.student.model} is not here")
            return _Outcome(
                contents=contents,
                not_measured=["Whether the adapter on its base gives the student's logits."],
            )
        tolerance = TOLERANCE[run.config.training.dtype]
        say(f"max abs logit difference to student/: {difference:.2e} (allowed {tolerance:g})")
        contents.append(
            "Checked: loaded with peft onto the base and merged in "
            f"{run.config.training.dtype}, its logits differ from the trained student's by at "
            f"most {difference:.1e} on 256 random positions."
        )
        return _Outcome(
            contents=contents,
            not_measured=["Accuracy of the adapter unmerged; the accuracy above is the student's."],
            figures={"adapter_max_abs_logit_diff": difference},
        )

    return write


def _prepare_gguf(run: FinishedRun, request: ExportRequest, say: Callable[[str], None]) -> _Writer:
    require_gguf()
    tokenizer = check_expressible(run.student)
    quant = request.quant

    def write(folder: Path) -> _Outcome:
        file = folder / f"{run.name}-{quant}.gguf"
        say(f"writing {file.name}")
        write_gguf(run.student, file, quant=quant, name=run.name, tokenizer=tokenizer)
        say("reading it back with transformers")
        check = check_gguf(run.student, file, quant, max_logit_diff=request.max_logit_diff)
        say(
            f"max abs logit difference to student/: {check.max_abs_logit_diff:.2e}; same most "
            f"likely token at {check.same_top_fraction:.1%} of {check.num_positions} positions"
        )
        return _Outcome(
            contents=[
                f"The trained student as one GGUF file ({quant}) with tokenizer and chat "
                "template, for llama.cpp and programs built on it.",
                "Checked: read back by transformers, its logits differ from the trained "
                f"student's by at most {check.max_abs_logit_diff:.1e} on {check.num_positions} "
                f"random positions; the most likely token is the same at "
                f"{check.same_top_fraction:.1%} of them.",
            ],
            not_measured=[
                "Accuracy of this file; the accuracy above is that of the trained student.",
                "Generation with llama.cpp or Ollama.",
            ],
            figures={
                f"gguf_{quant}_max_abs_logit_diff": check.max_abs_logit_diff,
                f"gguf_{quant}_same_top_fraction": check.same_top_fraction,
            },
        )

    return write


_WRITERS: dict[Kind, Callable[[FinishedRun, ExportRequest, Callable[[str], None]], _Writer]] = {
    "hf": _prepare_hf,
    "adapter": _prepare_adapter,
    "gguf": _prepare_gguf,
}
