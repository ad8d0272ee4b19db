"""Reads a path as a user wrote it: one place decides what ``~``, a URL and a variable mean."""

import os
import re
import unicodedata
from pathlib import Path

from qwen3_distill.utils.shown import shown

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_NOT_IN_PATHS = ("Cc", "Zl", "Zp")
"""Unicode categories: control characters and breaks of lines."""
_VARIABLE = re.compile(r"\$[A-Za-z_{(]")


def plain_path(text: str) -> str:
    """Return the path with ``~`` and ``~user`` at its start replaced by the home directory.

    Applied to its own result it changes nothing. Libraries that are given the result find nothing
    to expand in another way.

    Raises:
        ValueError: the text is empty, too long, a URL, or has a variable or a control character;
            says what to write.
    """
    if not text.strip():
        raise ValueError(f"expected a path, got {text!r}")
    if odd := next((char for char in text if unicodedata.category(char) in _NOT_IN_PATHS), None):
        raise ValueError(f"{shown(text)} has {odd!r}, a control character; write a path without it")
    if len(os.fsencode(text)) > 4000 or any(len(os.fsencode(p)) > 255 for p in text.split("/")):
        raise ValueError(f"{shown(text)} is longer than any path, or has a name longer than any")
    if _URL.match(text):
        raise ValueError(f"{text!r} is a URL, expected {_instead_of_url(text)}")
    if found := _VARIABLE.search(text):
        raise ValueError(
            f"{text!r} has a variable ({text[found.start() :]!r}), and none is replaced in a path; "
            "write its value (in a shell, double quotes replace it), or ~ for the home directory"
        )
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if not os.path.isabs(expanded):
        raise ValueError(
            f"{text!r} names a home directory that is not known; write the whole path, or ./"
            f"{text} for a name that begins with ~"
        )
    return expanded


def cache_home() -> Path:
    """Return the folder of the user's caches: ``XDG_CACHE_HOME``, if absolute, or ``~/.cache``.

    The specification has a relative one ignored; ``~`` in it is not expanded by a shell's quotes.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    return Path(root) if os.path.isabs(root) else Path.home() / ".cache"


def _instead_of_url(text: str) -> str:
    scheme = text.partition(":")[0].lower()
    if scheme == "file":
        return f"the path in it: {re.sub('^[A-Za-z]+:/*', '/', text)}"
    if scheme == "hf":
        return "a local path, or where hub ids are accepted the id alone, e.g. openai/gsm8k"
    return "a path on this machine: copy or mount it, and give that path"
