"""Turns one row of a file or dataset into a raw prompt, or refuses it.

A prompt is a string (one user message) or a list of messages, in OpenAI's form (``role``,
``content``) or ShareGPT's (``from``, ``value``). A final assistant turn is not part of the prompt.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, get_args

from qwen3_distill.config.data import Tagging
from qwen3_distill.data.sources.fields import RowPrompts, read_field
from qwen3_distill.data.sources.records import ANSWER_KEY, Message, RawPrompt, Role
from qwen3_distill.data.tags import TAG_KEY
from qwen3_distill.errors import DataError
from qwen3_distill.utils.shown import shown

_ROLES: tuple[Role, ...] = get_args(Role)
_MAX_DIGITS = 1200
"""Most digits of a number that is a reference answer, and its largest exponent."""
_SHAREGPT: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    **{role: role for role in _ROLES},
}
"""ShareGPT's ``from`` to roles."""


def raw_prompt(
    row: Mapping[str, Any],
    where: str,
    prompt_id: str,
    config: RowPrompts,
    *,
    keeps_row: bool = False,
) -> RawPrompt:
    """Return the prompt of a row.

    Args:
        keeps_row: keep the row's fields with the prompt.

    Raises:
        DataError: the row is not a prompt, or has no usable reference answer.
    """
    value = read_field(row, config.prompt_field, "prompt_field", where)
    messages = _messages(value, f"{where}, field {config.prompt_field!r}")
    if config.system is not None:
        if any(message.role in ("system", "developer") for message in messages):
            raise DataError(
                f"{where} brings a system message and prompts.system is set; remove one of them"
            )
        messages = [Message(role="system", content=config.system), *messages]
    for message in messages:
        _require_encodable(message.content, where)
    task_data: dict[str, str] = {}
    if config.answer_field is not None:
        answer = read_field(row, config.answer_field, "answer_field", where)
        task_data[ANSWER_KEY] = _answer(answer, f"{where}, field {config.answer_field!r}")
    if config.tagging is not None:
        task_data[TAG_KEY] = _tag(row, where, config.tagging)
    return RawPrompt(
        prompt_id=prompt_id,
        messages=tuple(_with_suffix(messages, config.suffix)),
        task_data=task_data,
        row=row if keeps_row else {},
    )


def _tag(row: Mapping[str, Any], where: str, tagging: Tagging) -> str:
    """Return the tag of a row, which has a teacher."""
    value = read_field(row, tagging.field, "scoring.by", where)
    tag = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if tag is None or tag not in tagging.known:
        raise DataError(
            f"{where}, field {tagging.field!r} is {shown(value)}, and there is no teacher of that "
            f"name, expected one of {', '.join(tagging.known)}; add it to scoring.teachers, or "
            "correct or remove the row"
        )
    return tag


def has_final_answer(value: Any) -> bool:
    """Return whether a prompt is a conversation that ends with an assistant turn after others."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and isinstance(value[-1], Mapping)
        and _role(value[-1]) == "assistant"
    )


def _role(message: Mapping[str, Any]) -> str | None:
    if message.get("role") is not None:
        return message["role"] if isinstance(message["role"], str) else None
    return _SHAREGPT.get(str(message.get("from")))


def _with_suffix(messages: Sequence[Message], suffix: str) -> list[Message]:
    """Append the suffix to the last user message."""
    last = max(index for index, message in enumerate(messages) if message.role == "user")
    changed = Message(role="user", content=messages[last].content + suffix)
    return [*messages[:last], changed, *messages[last + 1 :]]


def _messages(value: Any, where: str) -> list[Message]:
    if isinstance(value, str):
        messages = [Message(role="user", content=value)]
    elif isinstance(value, list):
        turns = value[:-1] if has_final_answer(value) else value
        messages = [_message(item, f"{where}, message {i}") for i, item in enumerate(turns)]
    else:
        raise DataError(
            f"{where} is of type {_type_name(value)}, expected a string or a list of messages "
            'such as [{"role": "user", "content": "..."}]'
        )
    if not messages or not messages[-1].content.strip():
        raise DataError(f"{where} is an empty prompt; fill it or remove the row")
    if messages[-1].role not in ("user", "tool"):
        raise DataError(
            f"{where} ends with a message of role {messages[-1].role!r}, expected the last message "
            "to be the user's; remove the messages after it"
        )
    if all(message.role != "user" for message in messages):
        raise DataError(f"{where} has no user message, expected at least one; correct the row")
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where} is of type {_type_name(value)}, expected an object with role and content"
        )
    # Columnar files give every message all keys that any message has, null where it has none.
    given = {key: item for key, item in value.items() if item is not None}
    if set(given) == {"from", "value"}:
        if not isinstance(given["from"], str) or given["from"] not in _SHAREGPT:
            raise DataError(
                f"{where} is from {shown(given['from'])}, expected one of {list(_SHAREGPT)}; "
                "correct the row, or write the conversation with role and content"
            )
        given = {"role": _SHAREGPT[given["from"]], "content": given["value"]}
    if set(given) != {"role", "content"}:
        raise DataError(
            f"{where} has the keys {shown(sorted(given, key=str))}, expected role and content "
            "only: a dropped key would change the prompt"
        )
    if given["role"] not in _ROLES:
        raise DataError(f"{where} has role {shown(given['role'])}, expected one of {list(_ROLES)}")
    return Message(role=given["role"], content=_content(given["content"], where))


def _content(value: Any, where: str) -> str:
    """Return a message's text: a string, or the texts of its parts, joined without a separator."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where} has content of type {_type_name(value)}, expected a string")
    texts: list[str] = []
    for index, part in enumerate(value):
        # Columnar files give every part all keys that any part has.
        given = (
            {key: item for key, item in part.items() if item is not None}
            if isinstance(part, Mapping)
            else {}
        )
        if set(given) != {"type", "text"} or given["type"] != "text":
            kind = given.get("type", type(part).__name__)
            raise DataError(
                f"{where} has content of type list whose part {index} is of type {shown(kind)}, "
                'expected {"type": "text", "text": "..."}: only text is read; remove the row'
            )
        if not isinstance(given["text"], str):
            raise DataError(f"{where} has a part {index} whose text is no string; correct the row")
        texts.append(given["text"])
    return "".join(texts)


def _answer(value: Any, where: str) -> str:
    """Return a reference answer as text; a number in decimal digits, 3.0 as ``3``."""
    if isinstance(value, Decimal):
        _, digits, exponent = value.as_tuple()
        if max(len(digits), abs(int(exponent))) > _MAX_DIGITS:
            raise DataError(f"{where} is a number of more than {_MAX_DIGITS} digits")
    if isinstance(value, Decimal) or (isinstance(value, float) and math.isfinite(value)):
        value = _decimal_digits(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        number = f" ({value})" if isinstance(value, float) else ""
        raise DataError(
            f"{where} is of type {type(value).__name__}{number}, expected the reference answer "
            "as a string or a finite number"
        )
    if isinstance(value, int) and value.bit_length() > 4096:
        raise DataError(f"{where} is a number of {value.bit_length()} bits, expected an answer")
    if not str(value).strip():
        raise DataError(f"{where} is empty, expected a reference answer")
    _require_encodable(str(value), where)
    return str(value)


def _type_name(value: Any) -> str:
    return "number" if isinstance(value, Decimal) else type(value).__name__


def _decimal_digits(value: float | Decimal) -> str:
    """Write a number as its shortest decimal without exponent: 3.0 is 3, 1e-7 is 0.0000001."""
    digits = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return "0" if digits in ("-0", "") else digits


def _require_encodable(text: str, where: str) -> None:
    """Refuse halves of surrogate pairs: JSON may hold them, no tokenizer and no file takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds {text[error.start]!r}, half of a character; correct the row"
        ) from error
