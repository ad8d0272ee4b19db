"""Shortens values and texts of unknown size for error messages."""

import reprlib

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 6
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlong = 40


def shown(value: object) -> str:
    """Return a value's ``repr``, at most a few hundred characters of it."""
    return shortened(_REPR.repr(value), 400)


def shortened(text: str, limit: int = 400) -> str:
    """Return a text with its middle left out where it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    kept = limit // 2
    return f"{text[:kept]} ... ({len(text) - 2 * kept:,} characters left out) ... {text[-kept:]}"
