"""Makes text of others harmless on a terminal and in a log."""

import unicodedata

_HARMFUL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of characters that move the cursor, change the colour or the direction, or
cannot be written as UTF-8."""


def printable(text: str) -> str:
    """Return the text with control, format and unassigned characters as escapes, e.g. ``\\x1b``.

    Line feeds and tabs stay. Applied to its own result it changes nothing.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escaped(char) if unicodedata.category(char) in _HARMFUL and char not in "\n\t" else char
        for char in text
    )


def _escaped(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def excerpt(text: str, limit: int = 300) -> str:
    """Return a printable single line of at most about ``limit`` characters."""
    line = " ".join(printable(text[: 4 * limit]).split())
    return line if len(line) <= limit else line[:limit] + "..."
