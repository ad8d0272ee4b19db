"""``qwen3-distill init``: a commented config for a machine, two models and prompts."""

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwen3_distill.cli.terminal import begin_work, model_option, path_option, say, warn
from qwen3_distill.errors import ConfigError

if TYPE_CHECKING:
    from qwen3_distill.config import RunConfig
    from qwen3_distill.planning.facts import PromptFacts
    from qwen3_distill.planning.machines import Machine

_MATH_SUFFIX = "\n\nReason step by step and put the final answer in \\boxed{}."

_Student = Annotated[str, model_option("The model that learns: a directory or a hub id.")]
_Teacher = Annotated[str, model_option("The model that scores: a directory or a hub id.")]
_Data = Annotated[
    str,
    typer.Option(
        metavar="FILE|ID|task",
        help="Prompts: a .jsonl or .parquet file, a dataset's hub id, or the built-in task.",
    ),
]
_Out = Annotated[Path, path_option("The config to write; a file that is there is refused.")]
_Field = Annotated[
    str | None, typer.Option(help="Field with the prompt; required except for the task.")
]
_AnswerField = Annotated[
    str | None, typer.Option(help="Field with the reference answer; without it: no verifier.")
]
_Verifier = Annotated[
    Literal["math", "exact", "choice"], typer.Option(help="How answers are judged.")
]
_HeldOut = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|SPLIT", help="Held-out problems: a file, or a split of the dataset."
    ),
]
_DatasetName = Annotated[str | None, typer.Option(help="Configuration of the dataset.")]
_Split = Annotated[str, typer.Option(help="Split of the dataset to train on.")]
_Suffix = Annotated[
    str | None,
    typer.Option(help="Text after every prompt; default: with math, to box the answer."),
]
_Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
_NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
_Thinking = Annotated[bool, typer.Option("--thinking", help="Let the models think.")]
_Streaming = Annotated[bool, typer.Option("--streaming", help="Run the stages concurrently.")]
_MachineName = Annotated[
    Literal["h200", "gb10"] | None,
    typer.Option(help="A machine to write for; default: this one."),
]
_Kind = Annotated[
    Literal["cuda", "cpu"] | None,
    typer.Option(help="Default: cuda where an NVIDIA driver is seen, else cpu."),
]
_Memory = Annotated[
    float | None,
    typer.Option(min=0.1, max=1_000_000, help="GiB to plan for; default: what is free now."),
]


def init(
    student: _Student,
    teacher: _Teacher,
    data: _Data,
    out: _Out,
    field: _Field = None,
    answer_field: _AnswerField = None,
    verifier: _Verifier = "math",
    held_out: _HeldOut = None,
    dataset_name: _DatasetName = None,
    split: _Split = "train",
    suffix: _Suffix = None,
    steps: _Steps = 100,
    max_new_tokens: _NewTokens = 512,
    thinking: _Thinking = False,
    streaming: _Streaming = False,
    machine: _MachineName = None,
    kind: _Kind = None,
    gpu_memory: _Memory = None,
) -> None:
    """Write a config for this machine: the largest settings that fit, with the memory plan.

    Nothing is asked. No weights are downloaded; of a hub id, config and tokenizer are.
    """
    command = _command(locals())
    _require_new(out)
    prompts = _prompts(data, field, answer_field, verifier, held_out, dataset_name, split, suffix)
    from qwen3_distill.planning.facts import Facts, Wishes, model_facts
    from qwen3_distill.planning.initial import initial_config

    begin_work()
    facts = Facts(
        machine=_machine(machine, kind, gpu_memory),
        student=model_facts(student, "--student"),
        teacher=model_facts(teacher, "--teacher"),
        prompts=prompts,
        wishes=Wishes(
            command=command,
            file=str(out),
            steps=steps,
            max_new_tokens=max_new_tokens,
            streaming=streaming,
            thinking=thinking,
        ),
    )
    made = initial_config(facts)
    _check_prompts(made.config)
    with out.open("x", encoding="utf-8") as file:
        file.write(made.text)
    say(f"wrote {out}")
    if machine is None:
        _say_what_is_missing(made.config)
    say(f"next: qwen3-distill config check --config {shlex.quote(str(out))}")


def _command(values: Mapping[str, Any]) -> str:
    """The command line that gives these values, without defaults, in the order of the options."""
    words = ["qwen3-distill", "init"]
    for name, parameter in inspect.signature(init).parameters.items():
        if (value := values[name]) != parameter.default:
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [option, _quoted(str(value))]
    return " ".join(words)


def _quoted(text: str) -> str:
    """A word for a shell, in one line: line breaks and the like as Bash reads them in ``$''``."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else _escape(c) for c in escaped) + "'"


def _escape(character: str) -> str:
    return {"\n": "\\n", "\t": "\\t"}.get(character, f"\\U{ord(character):08x}")


def _require_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists already; remove it, or choose another name")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")


def _prompts(
    data: str,
    field: str | None,
    answer_field: str | None,
    verifier: Literal["math", "exact", "choice"],
    held_out: str | None,
    dataset_name: str | None,
    split: str,
    suffix: str | None,
) -> "PromptFacts":
    """Read the options that name prompts; one that is needed and missing is named."""
    from qwen3_distill.modeling.hub import parse_id
    from qwen3_distill.planning.facts import PromptFacts

    if data == "task":
        return PromptFacts(kind="task", held_out="eval", verifier="task")
    if field is None:
        raise ConfigError(
            "--field is missing: the field of --data with the prompt, e.g. --field question"
        )
    if held_out is not None and answer_field is None:
        raise ConfigError("--held-out needs --answer-field, the field with the reference answer")
    path = Path(data)
    known = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl"}
    kinds = [kind for ending, kind in known.items() if path.name.endswith(ending)]
    if path.is_dir() or (not kinds and parse_id(data) is not None):
        kinds = ["hf"]
    if not kinds or (kinds != ["hf"] and not path.is_file()):
        raise ConfigError(
            f"--data {data}: expected a .jsonl or .parquet file that exists, a dataset's hub id "
            "(namespace/name), or task"
        )
    boxed = _MATH_SUFFIX if answer_field is not None and verifier == "math" else ""
    return PromptFacts(
        kind=kinds[0],  # type: ignore[arg-type]
        path=data,
        field=field,
        answer_field=answer_field,
        name=dataset_name,
        split=split,
        held_out=held_out,
        verifier=verifier if answer_field is not None else None,
        suffix=boxed if suffix is None else suffix,
    )


def _machine(
    name: str | None, kind: Literal["cuda", "cpu"] | None, memory_gib: float | None
) -> "Machine":
    """Return the machine to write for."""
    from dataclasses import replace

    from qwen3_distill.environments.installed import machine_kind
    from qwen3_distill.planning.machines import MACHINES, this_machine

    if name is not None and kind == "cpu":
        raise ConfigError(f"--machine {name} has a GPU, and --kind is cpu; drop one of them")
    seen = machine_kind()
    if name is None and kind == "cuda" and seen == "cpu" and memory_gib is None:
        raise ConfigError(
            "--kind cuda, but no NVIDIA driver is seen here; say which GPU to write for: "
            "--machine h200, --machine gb10, or --gpu-memory GIB"
        )
    found = MACHINES[name] if name is not None else this_machine(kind or seen)
    on_gpu = (kind or seen) == "cuda"
    if memory_gib is None:
        if on_gpu and found.kind == "cpu":
            raise ConfigError("nvidia-smi does not tell the GPU's memory; give --gpu-memory GIB")
        return found
    if found.kind == "cpu" and on_gpu:
        found = replace(found, kind="cuda", label="one GPU")
    label = f"{found.label} with {memory_gib:g} GiB"
    return replace(found, label=label, free_bytes=int(memory_gib * 2**30))


def _check_prompts(config: "RunConfig") -> None:
    """Read prompts of local files, so that a wrong field is found now.

    Raises:
        DataError: a file or a field is not as told.
    """
    from qwen3_distill.data.sources import build_source

    sections = [config.prompts, config.evaluation.prompts if config.evaluation else None]
    for section in sections:
        if section is not None and section.kind in ("jsonl", "parquet"):
            build_source(section)


def _say_what_is_missing(config: "RunConfig") -> None:
    from qwen3_distill.pipeline.assembly.machine import machine_problems

    for problem in machine_problems(config):
        warn(problem)
