"""Writes the reference of all commands in docs/reference/cli.md, from the commands themselves.

python -m qwen3_distill.cli.reference docs/reference/cli.md
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

BEGIN = "<!-- Below: written by `make docs` from the commands. -->\n"
_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def update(page: str) -> str:
    """Return the page with everything below its mark written anew."""
    return page.partition(BEGIN)[0] + BEGIN + "\n" + cli_reference()


def cli_reference() -> str:
    """Return a table of the commands, and a section for each with its arguments and options."""
    from qwen3_distill.cli.main import app

    commands = list(commands_of(app))
    index = ["| command | what it does |", "|---|---|"]
    for name, command in commands:
        first = " ".join((inspect.getdoc(command) or "").partition("\n\n")[0].split())
        index.append(f"| [{name}](#{name.replace(' ', '-')}) | {first} |")
    return "\n".join([*index, "", *(_section(name, command) for name, command in commands)])


def commands_of(
    app: typer.Typer, name: str = "qwen3-distill"
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """List the commands of an app and of its groups, as one types them, with their functions."""
    for command in app.registered_commands:
        if command.callback is not None:
            own = command.name or command.callback.__name__.replace("_", "-")
            yield f"{name} {own}", command.callback
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from commands_of(group.typer_instance, f"{name} {group.name}")


def _section(name: str, command: Callable[..., Any]) -> str:
    paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n")]
    lines = [f"## {name}", "", "\n\n".join(paragraphs), ""]
    hints = get_type_hints(command, include_extras=True)
    rows = [
        _row(parameter, hints[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
    ]
    if rows:
        lines += ["| argument or option | meaning | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _row(parameter: inspect.Parameter, hint: Any) -> str:
    info = hint.__metadata__[0]
    shown = _code(info.metavar or _metavar(hint.__origin__))
    if not isinstance(info, ArgumentInfo):
        assert isinstance(info, OptionInfo)
        # Within Annotated the first of an option's names is in the place of its default.
        given = (info.default, *(info.param_decls or ()))
        names = [name for name in given if isinstance(name, str)]
        names = names or [f"--{parameter.name.replace('_', '-')}"]
        shown = f"{', '.join(map(_code, names))} {shown}".strip()
    return f"| {shown} | {_meaning(info)} | {_default(parameter)} |"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _meaning(info: Any) -> str:
    return re.sub(r"\s+", " ", info.help or "").replace("|", "\\|")


def _metavar(kind: Any) -> str:
    """Return what stands for an option's value; empty for a flag."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "" if kind is bool else _METAVARS.get(kind, "TEXT")


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value is False:
        return ""
    return "this Python" if value == sys.executable else f"`{value}`"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(update(file.read_text(encoding="utf-8")), encoding="utf-8")
