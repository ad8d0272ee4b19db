"""Reads the rows of Hugging Face datasets: by hub id, from data files, or saved to disk."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_distill.config import ContextConfig, HuggingFacePrompts
from qwen3_distill.data.sources.fields import Row, check_columns, wanted_columns
from qwen3_distill.errors import DataError
from qwen3_distill.utils.shown import shortened


def dataset_name(config: HuggingFacePrompts) -> str:
    """Return the dataset's name with revision, configuration and split."""
    name = Path(config.path).resolve().name if Path(config.path).is_dir() else config.path
    if config.revision is not None:
        name += f"@{config.revision}"
    return "/".join([name, *([config.name] if config.name else []), config.split])


def dataset_rows(config: HuggingFacePrompts, context: ContextConfig | None = None) -> Iterator[Row]:
    """Yield the rows of a dataset's split; only the columns that the config names are read."""
    where = dataset_name(config)
    dataset = _load_dataset(config, where)
    check_columns(dataset.column_names, config, where, context)
    columns = wanted_columns(config, dataset.column_names, context)
    rows = iter(dataset.select_columns(columns))
    for number in range(len(dataset)):
        try:
            row = next(rows)
        except Exception as error:  # of the columns' decoders, by what is wrong
            raise DataError(
                f"{where}, row {number} cannot be read ({shortened(str(error))}); correct the data"
            ) from error
        yield f"{where}, row {number}", row


def _load_dataset(config: HuggingFacePrompts, where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "prompts.kind=hf needs the `datasets` library; install it or use kind=jsonl or parquet"
        ) from error
    try:
        if _is_saved_to_disk(Path(config.path)):
            return _saved_split(datasets.load_from_disk(os.path.abspath(config.path)), config)
        return datasets.load_dataset(
            config.path, config.name, split=config.split, revision=config.commit
        )
    except DataError:
        raise
    except Exception as error:  # of the library, of the hub and of the files' readers
        reason = shortened(" ".join(str(error).split()))
        raise DataError(
            f"dataset {where} cannot be loaded ({reason}); expected a hub id or a local directory "
            "with this split: check prompts.path, name, split and revision, and the network for a "
            "hub id"
        ) from error


def _is_saved_to_disk(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved_split(loaded: Any, config: HuggingFacePrompts) -> Any:
    if config.name is not None or config.revision is not None:
        raise DataError(
            f"{config.path} was written by save_to_disk and has neither configurations nor "
            f"revisions, but name={config.name} and revision={config.revision}; set both to null"
        )
    if isinstance(loaded, dict):
        found = {str(name): split for name, split in loaded.items()}
    else:
        # A single dataset may not know its split; then the config names it.
        found = {str(loaded.split or config.split): loaded}
    if config.split not in found:
        raise DataError(
            f"{config.path} has the splits {sorted(found)}, not {config.split!r}; change "
            "prompts.split"
        )
    return found[config.split]
