"""Holds what a first config is made from: machine, models, prompts and wishes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen3_distill.modeling.hub import locate_model
from qwen3_distill.modeling.shapes import QWEN3_SHAPES, ModelShape, named_shape, read_shape
from qwen3_distill.planning.machines import Machine

_KNOWN = re.compile(r"Qwen/Qwen3-([\d.]+B(?:-FP8)?)(?:@.*)?")
"""Hub ids of the first dense Qwen3 models, whose shapes and template are known without the hub."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model, as far as a config depends on it."""

    name: str
    """Directory or hub id, as given."""
    shape: ModelShape
    can_think: bool
    """Whether its chat template reads ``enable_thinking``."""


@dataclass(frozen=True, kw_only=True)
class PromptFacts:
    """Where prompts come from and how answers are judged."""

    kind: Literal["task", "jsonl", "parquet", "hf"]
    path: str = ""
    """File, dataset or hub id; empty for the task."""
    field: str = "prompt"
    answer_field: str | None = None
    name: str | None = None
    """Configuration of a dataset."""
    split: str = "train"
    held_out: str | None = None
    """File or split of held-out problems; None: no evaluation."""
    verifier: Literal["task", "math", "exact", "choice"] | None = None
    suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Further wishes for a config."""

    command: str
    """The command line that asked."""
    file: str
    """The file to write, as given."""
    steps: int
    max_new_tokens: int
    streaming: bool
    thinking: bool

    @property
    def output_dir(self) -> str:
        """The run folder: the file's name below ``runs``."""
        return f"runs/{Path(self.file).stem}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything a first config is made from."""

    machine: Machine
    student: ModelFacts
    teacher: ModelFacts
    prompts: PromptFacts
    wishes: Wishes

    @property
    def trains_adapters(self) -> bool:
        """Whether LoRA is trained: all weights of a model are trained if it is very small."""
        return self.student.shape.num_parameters >= 100_000_000


def model_facts(name: str, option: str) -> ModelFacts:
    """Read what a config has to know of a model; config and tokenizer of a hub id are downloaded.

    Args:
        option: the option that names it, for errors.

    Raises:
        ModelError: it is neither a Qwen3 directory nor an accessible repository of one.
    """
    known = _KNOWN.fullmatch(name)
    if known and known[1].removesuffix("-FP8") in QWEN3_SHAPES and not Path(name).exists():
        return ModelFacts(name=name, shape=named_shape(known[1]), can_think=True)
    directory = Path(locate_model(name, option).directory)
    shape = read_shape(directory)
    templates = [directory / "chat_template.jinja", directory / "tokenizer_config.json"]
    can_think = any(b"enable_thinking" in file.read_bytes() for file in templates if file.is_file())
    return ModelFacts(name=name, shape=shape, can_think=can_think)
