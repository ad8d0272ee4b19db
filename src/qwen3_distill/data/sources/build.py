"""Builds the prompt source that a config describes."""

from itertools import islice
from pathlib import Path

from qwen3_distill.config import (
    ContextConfig,
    JsonlPrompts,
    ParquetPrompts,
    PromptsConfig,
    TaskPrompts,
)
from qwen3_distill.data.sources.dataset import dataset_name, dataset_rows
from qwen3_distill.data.sources.fields import read_field
from qwen3_distill.data.sources.files import jsonl_rows, parquet_rows
from qwen3_distill.data.sources.records import FixedSource, PromptSource, RawPrompt, TaskSource
from qwen3_distill.data.sources.row import has_final_answer, raw_prompt
from qwen3_distill.data.tasks import TASKS
from qwen3_distill.errors import DataError


def build_source(config: PromptsConfig, context: ContextConfig | None = None) -> PromptSource:
    """Build the source that ``config`` describes.

    Args:
        context: the teacher's, whose templates read fields of the rows; None: no row is kept.

    Raises:
        DataError: a file or dataset cannot be read, is empty, or has a row that is not a prompt.
            The message names the file and the line (JSONL, from 1) or row (Parquet and hf, from 0).
    """
    if isinstance(config, TaskPrompts):
        return TaskSource(TASKS[config.task], config.split, config.limit, first=config.first)
    if isinstance(config, JsonlPrompts):
        name, rows = Path(config.path).name, jsonl_rows(Path(config.path))
    elif isinstance(config, ParquetPrompts):
        name, rows = Path(config.path).name, parquet_rows(Path(config.path), config, context)
    else:
        name, rows = dataset_name(config), dataset_rows(config, context)
    prompts: list[RawPrompt] = []
    answered = 0
    for number, (where, row) in enumerate(islice(rows, config.limit)):
        prompt_id = f"{name}:{number}"
        prompts.append(raw_prompt(row, where, prompt_id, config, keeps_row=context is not None))
        answered += has_final_answer(read_field(row, config.prompt_field, "prompt_field", where))
    if not prompts:
        raise DataError(f"{config.path} has no rows, expected at least one prompt; check the path")
    notes = []
    if answered:
        notes.append(
            f"{name}: {answered} of {len(prompts)} conversations end with an assistant turn, which "
            "is not part of the prompt"
        )
    return FixedSource(prompts, notes)
