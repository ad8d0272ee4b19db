"""Reads raw prompts from files, Hugging Face datasets and procedural tasks.

`build_source` makes the source that a config describes. Files and datasets are read and checked
completely when the source is built, so a bad row fails before a run starts. Nothing here renders
a prompt or knows a tokenizer.
"""

from qwen3_distill.data.sources.build import build_source
from qwen3_distill.data.sources.records import (
    ANSWER_KEY,
    PROBLEM_KEY,
    FixedSource,
    Message,
    PromptSource,
    RawPrompt,
    TaskSource,
)

__all__ = [
    "ANSWER_KEY",
    "PROBLEM_KEY",
    "FixedSource",
    "Message",
    "PromptSource",
    "RawPrompt",
    "TaskSource",
    "build_source",
]
