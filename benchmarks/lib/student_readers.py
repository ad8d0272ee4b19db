"""Lets other interpreters read model directories, and compares their logits with those here."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

_READER = Path(__file__).with_name("student_reader.py")
TEXT = "17+5*3-8= Zwei Wörter, \n\t 漢字."


@dataclass(frozen=True)
class Reading:
    """The values that one program read from one directory."""

    transformers: str
    """Its version."""
    facts: dict[str, Any]
    """Token ids, chat, dtype, rotary base, end-of-sequence ids, missing weights."""
    logits_TV: Tensor


def read_with(python: str, directories: Sequence[Path]) -> list[Reading]:
    """Read directories with the transformers of another interpreter.

    Raises:
        RuntimeError: it could not; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.safetensors"
        command = [python, str(_READER), str(out), TEXT, *map(str, directories)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{python} cannot read the directories:\n{done.stderr}")
        told = json.loads(done.stdout.splitlines()[-1])
        logits = load_file(out)
    return [
        Reading(told["transformers"], facts, logits[str(number)])
        for number, facts in enumerate(told["read"])
    ]


def logits_here(directory: Path) -> tuple[list[int], Tensor]:
    """The text's token ids and their logits [T, V], read by this process."""
    ids = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return ids, model.eval()(torch.tensor([ids])).logits[0].float()
