"""The command line; `main.main` is the entry point, each other file has a group of commands.

A command reads its config first and imports what is slow after that. It decides nothing itself.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return `main.main` as ``cli.main``, for scripts written when this was a module."""
    if name == "main":
        from qwen3_distill.cli.main import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
