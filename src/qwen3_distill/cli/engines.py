"""``qwen3-distill engines``: the environments of vLLM, SGLang and unsloth on this machine."""

import sys
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from qwen3_distill.cli.terminal import say, warn
from qwen3_distill.errors import ConfigError

Kind = Literal["cuda", "cpu"]


def install(
    engines: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[vllm] [sglang] [unsloth]", help="Default: all three.", show_default=False
        ),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(help="Default: cuda where an NVIDIA driver is seen, else cpu."),
    ] = None,
    python: Annotated[
        str, typer.Option(help="The Python that environments are made with, 3.11 or newer.")
    ] = sys.executable,
) -> None:
    """Make the engines' environments, or find them. Runs of configs with `python: null` use them.

    Ctrl-C leaves nothing half made; the same command goes on with what was downloaded.
    """
    from qwen3_distill.environments.installed import ENGINES, machine_kind
    from qwen3_distill.environments.make import BuildError, default_cache, interpreter
    from qwen3_distill.utils.signals import signals_as_ctrl_c

    wanted = tuple(dict.fromkeys(engines or ENGINES))
    if unknown := [name for name in wanted if name not in ENGINES]:
        raise ConfigError(f"no engine {unknown[0]!r}; expected any of {', '.join(ENGINES)}")
    chosen = kind or machine_kind()
    if kind is None and chosen == "cpu":
        warn(
            "no NVIDIA driver is seen: this installs the CPU builds, for tests and small models; a "
            "machine with an NVIDIA GPU gets the CUDA builds (--kind cuda asks for them here)"
        )
    for number, engine in enumerate(wanted):
        try:
            with signals_as_ctrl_c():
                made = interpreter(f"{engine}-{chosen}", python, default_cache())
        except BuildError as error:
            raise ConfigError(f"{engine}-{chosen} was not made: {error}") from error
        except KeyboardInterrupt:
            left = " ".join(wanted[number:])
            warn(f"stopped; `qwen3-distill engines install {left}` goes on")
            raise typer.Exit(130) from None
        say(f"{engine}: {made}")


def list_engines() -> None:
    """List the environments of this machine: engine, kind, versions, size, path and state."""
    from qwen3_distill.environments.installed import ENGINES, installed, machine_kind
    from qwen3_distill.environments.make import default_cache
    from qwen3_distill.recording.text import gib

    columns = ("engine", "kind", "version", "torch", "GiB", "state", "folder")
    table = Table(*columns, box=None, pad_edge=False)
    there = installed()
    for one in there:
        versions = one.versions()
        state = "made" if one.is_current else "made by another version"
        state = state if one.works else "its Python is gone"
        shown = (versions.get("engine", "?"), versions.get("torch", "?"), gib(one.num_bytes()))
        table.add_row(one.engine, one.kind, *shown, state, one.path.name)
    kind = machine_kind()
    usable = {one.engine for one in there if one.kind == kind and one.is_current and one.works}
    for engine in ENGINES:
        if engine not in usable:
            table.add_row(engine, kind, "", "", "", "not made", "")
    # The width is the table's own: a folder's name that is cut cannot be removed.
    Console(width=200, soft_wrap=True).print(table)
    say(f"folder: {default_cache()}; this machine uses: {kind}")


def remove(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Engine, engine-kind or a folder of `list`."),
    ],
) -> None:
    """Remove environments. One that a run uses is refused."""
    from qwen3_distill.environments.installed import remove as remove_environments

    for environment in remove_environments(names):
        say(f"removed {environment.path.name}")
