"""Reads raw prompts from files, Hugging Face datasets and procedural tasks.

Rows follow TRL's prompt-only format: the prompt is a string (one user message) or a list of
``{"role", "content"}`` messages that ends with the user's. Files and datasets are read and
checked completely when the source is built, so a bad row fails before a run starts.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

from qwen3_distill.config import (
    HuggingFacePrompts,
    JsonlPrompts,
    ParquetPrompts,
    PromptsConfig,
    TaskPrompts,
)
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.errors import DataError

RowPrompts: TypeAlias = JsonlPrompts | ParquetPrompts | HuggingFacePrompts

ANSWER_KEY = "answer"
"""Key of `RawPrompt.task_data` that holds the reference answer."""
PROBLEM_KEY = "problem"
"""Key of `RawPrompt.task_data` that holds the problem's text, for procedural tasks only."""

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPrompt:
    """A prompt before the chat template: messages, the last of them the user's."""

    prompt_id: str
    messages: tuple[Message, ...]
    task_data: Mapping[str, str] = field(default_factory=dict)
    """Input of the verifier: `ANSWER_KEY`, `PROBLEM_KEY`; empty without an answer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_data", MappingProxyType(dict(self.task_data)))


class PromptSource(Protocol):
    """Gives prompts by number. The same number always gives the same prompt."""

    @property
    def num_prompts(self) -> int | None:
        """Number of prompts; None: endless."""
        ...

    def get(self, index: int) -> RawPrompt:
        """Return prompt number ``index``, from 0.

        Raises:
            IndexError: ``index`` is negative or not below `num_prompts`.
        """
        ...


class FixedSource:
    """A source of given prompts, at least one."""

    def __init__(self, prompts: Sequence[RawPrompt]) -> None:
        if not prompts:
            raise DataError("a prompt source has no prompts, expected at least one")
        self._prompts = tuple(prompts)

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    def get(self, index: int) -> RawPrompt:
        _check_index(index, self.num_prompts)
        return self._prompts[index]


class TaskSource:
    """A source of one split of a procedural task; problems are made on demand."""

    def __init__(self, task: ChainTask, split: Literal["train", "eval"], limit: int | None) -> None:
        self._task = task
        self._split: Literal["train", "eval"] = split
        self._limit = limit

    @property
    def num_prompts(self) -> int | None:
        return self._limit

    def get(self, index: int) -> RawPrompt:
        _check_index(index, self._limit)
        problem = self._task.problem(self._split, index)
        return RawPrompt(
            prompt_id=problem.problem_id,
            messages=(Message(role="user", content=problem.text),),
            task_data={PROBLEM_KEY: problem.text, ANSWER_KEY: problem.answer},
        )


def build_source(config: PromptsConfig) -> PromptSource:
    """Build the source that ``config`` describes.

    Raises:
        DataError: a file or dataset cannot be read, is empty, or has a row that is not a prompt.
            The message names the file and the line (JSONL, from 1) or row (Parquet and hf, from 0).
    """
    if isinstance(config, TaskPrompts):
        return TaskSource(ChainTask(), config.split, config.limit)
    if isinstance(config, JsonlPrompts):
        name, rows = Path(config.path).name, _jsonl_rows(Path(config.path))
    elif isinstance(config, ParquetPrompts):
        name, rows = Path(config.path).name, _parquet_rows(Path(config.path), config)
    else:
        name, rows = _dataset_name(config), _dataset_rows(config)
    prompts = [
        _raw_prompt(row, where, f"{name}:{number}", config)
        for number, (where, row) in enumerate(islice(rows, config.limit))
    ]
    if not prompts:
        raise DataError(f"{config.path} has no rows, expected at least one prompt; check the path")
    return FixedSource(prompts)


def _check_index(index: int, num_prompts: int | None) -> None:
    if index < 0 or (num_prompts is not None and index >= num_prompts):
        raise IndexError(f"prompt {index} of a source with {num_prompts or 'endless'} prompts")


# --- Rows: (location for error messages, fields) --------------------------------------------------

_Row: TypeAlias = tuple[str, Mapping[str, Any]]


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    _require_file(path)
    first_blank: int | None = None  # an error only if a row follows: files may end in blank lines
    # Lines are split as bytes: text mode would also split at a lone carriage return.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                first_blank = first_blank or number
                continue
            if first_blank is not None:
                raise DataError(
                    f"{path}, line {first_blank} is blank, expected one JSON object on every line; "
                    "remove the line"
                )
            yield f"{path}, line {number}", _json_object(line, f"{path}, line {number}")


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's fields; by default the last of two equal keys would win."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs]}")
    return fields


def _json_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_refuse_duplicate_keys)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}), expected one JSON "
            "object on every line"
        ) from error
    except (ValueError, RecursionError) as error:  # a key twice, a number or a nesting too large
        raise DataError(f"{where} cannot be read as JSON ({error}); correct the line") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{where} is a JSON {type(value).__name__}, expected an object such as "
            '{"prompt": "..."}'
        )
    return value


def _parquet_rows(path: Path, config: ParquetPrompts) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_file(path)
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(names, config, str(path))
            for number, row in enumerate(_batched_rows(file, config)):
                yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({error}); expected a whole Parquet file, write it "
            "again"
        ) from error


def _batched_rows(file: Any, config: ParquetPrompts) -> Iterator[Mapping[str, Any]]:
    for batch in file.iter_batches(columns=_wanted_fields(config)):
        yield from batch.to_pylist()


def _dataset_name(config: HuggingFacePrompts) -> str:
    name = Path(config.path).resolve().name if Path(config.path).is_dir() else config.path
    if config.revision is not None:
        name += f"@{config.revision}"
    return "/".join([name, *([config.name] if config.name else []), config.split])


def _dataset_rows(config: HuggingFacePrompts) -> Iterator[_Row]:
    where = _dataset_name(config)
    dataset = _load_dataset(config, where)
    _check_columns(dataset.column_names, config, where)
    for number, row in enumerate(dataset.select_columns(_wanted_fields(config))):
        yield f"{where}, row {number}", row


def _load_dataset(config: HuggingFacePrompts, where: str) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(
            "prompts.kind=hf needs the `datasets` library; install it or use kind=jsonl or parquet"
        ) from error
    try:
        if _is_saved_to_disk(Path(config.path)):
            return _saved_split(datasets.load_from_disk(config.path), config)
        return datasets.load_dataset(
            config.path, config.name, split=config.split, revision=config.commit
        )
    except DataError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"dataset {where} cannot be loaded ({error}); expected a hub id or a local directory "
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


def _require_file(path: Path) -> None:
    if not path.is_file():
        state = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(f"prompt file {path} {state}, expected a file; change prompts.path")


def _wanted_fields(config: RowPrompts) -> list[str]:
    fields = [config.prompt_field, config.answer_field]
    return list(dict.fromkeys(name for name in fields if name is not None))


def _check_columns(present: Iterable[str], config: RowPrompts, where: str) -> None:
    present = list(present)
    settings = {"prompt_field": config.prompt_field, "answer_field": config.answer_field}
    for setting, name in settings.items():
        if name is None or name in present:
            continue
        near = get_close_matches(name, present, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"{where} has no field {name!r}{hint}; its fields are {present}. Change prompts."
            f"{setting} or the data"
        )


# --- One row --------------------------------------------------------------------------------------


def _raw_prompt(
    row: Mapping[str, Any], where: str, prompt_id: str, config: RowPrompts
) -> RawPrompt:
    _check_columns(row, config, where)
    messages = _messages(row[config.prompt_field], f"{where}, field {config.prompt_field!r}")
    if config.system is not None:
        if messages[0].role == "system":
            raise DataError(
                f"{where} brings a system message and prompts.system is set; remove one of them"
            )
        messages = [Message(role="system", content=config.system), *messages]
    for message in messages:
        _require_encodable(message.content, where)
    last = Message(role="user", content=messages[-1].content + config.suffix)
    task_data: dict[str, str] = {}
    if config.answer_field is not None:
        answer_where = f"{where}, field {config.answer_field!r}"
        task_data[ANSWER_KEY] = _answer(row[config.answer_field], answer_where)
    return RawPrompt(prompt_id=prompt_id, messages=(*messages[:-1], last), task_data=task_data)


def _messages(value: Any, where: str) -> list[Message]:
    if isinstance(value, str):
        messages = [Message(role="user", content=value)]
    elif isinstance(value, list):
        messages = [_message(item, f"{where}, message {i}") for i, item in enumerate(value)]
    else:
        raise DataError(
            f"{where} is of type {type(value).__name__}, expected a string or a list of messages "
            'such as [{"role": "user", "content": "..."}]'
        )
    if not messages or not messages[-1].content.strip():
        raise DataError(f"{where} is an empty prompt; fill it or remove the row")
    if messages[-1].role != "user":
        raise DataError(
            f"{where} ends with a message of role {messages[-1].role!r}, expected the last message "
            "to be the user's; remove the messages after it"
        )
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where} is of type {type(value).__name__}, expected an object with role and content"
        )
    # Columnar files give every message all keys that any message has, null where it has none.
    given = {key: item for key, item in value.items() if item is not None}
    if set(given) != {"role", "content"}:
        raise DataError(
            f"{where} has the keys {sorted(given)}, expected role and content only: a dropped key "
            "would change the prompt"
        )
    if given["role"] not in _ROLES:
        raise DataError(f"{where} has role {given['role']!r}, expected one of {list(_ROLES)}")
    if not isinstance(given["content"], str):
        raise DataError(
            f"{where} has content of type {type(given['content']).__name__}, expected a string"
        )
    return Message(role=given["role"], content=given["content"])


def _answer(value: Any, where: str) -> str:
    # A float is refused: 0.1 + 0.2 or 1e22 have no unique spelling to compare with.
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{where} is of type {type(value).__name__}, expected the reference answer as a string "
            "or an integer"
        )
    if not str(value).strip():
        raise DataError(f"{where} is empty, expected a reference answer")
    _require_encodable(str(value), where)
    return str(value)


def _require_encodable(text: str, where: str) -> None:
    """Refuse halves of surrogate pairs: JSON may hold them, no tokenizer and no file takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds {text[error.start]!r}, half of a character; correct the row"
        ) from error
