"""The secrets of this process: no error, log or record shows one.

Whoever reads a key remembers it here. Whoever makes text of what others sent asks here first: a
server may send a request's headers back, a process may print its environment.
"""

import base64
import json
import re
from urllib.parse import quote, unquote

from qwen3_distill.utils.printable import excerpt

_LONGEST = 600
HIDDEN = "(hidden)"
_WINDOW = 8
"""Characters of a secret in a row that are hidden: a text may hold a part of it."""
_SHORTEST = 4
"""Characters of the shortest secret: hiding every ``a`` would hide all words."""
_SECRET_WORDS = {
    *("key", "apikey", "keys", "token", "password", "passwd", "pass", "passphrase"),
    *("secret", "credential", "credentials", "pat", "auth", "authorization"),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_USER_IN_URL = re.compile(r"(?<=://)[^/?#\s'\"]*@")

_secrets: set[str] = set()
_windows: set[str] = set()


def remember_secret(text: str) -> None:
    """Have `without_secrets` hide a text and its usual encodings, until the process ends."""
    plain = unquote(text)
    forms = {text, plain, quote(plain, safe=""), json.dumps(plain)[1:-1], repr(plain)[1:-1]}
    encoded = plain.encode("utf-8", "surrogatepass")
    forms |= {base64.b64encode(encoded).decode(), encoded.hex()}
    for form in forms:
        if len(form) >= _WINDOW:
            _windows.update(form[at : at + _WINDOW] for at in range(len(form) - _WINDOW + 1))
        elif len(form) >= _SHORTEST:
            _secrets.add(form)


def without_secrets(text: str) -> str:
    """Return the text without remembered secrets, parts of them, and user names in URLs."""
    text = without_user(text)
    found = _places(text)
    if not found:
        return text
    parts: list[str] = []
    shown_to = 0
    for start, stop in found:
        parts += [text[shown_to:start], HIDDEN]
        shown_to = stop
    return "".join([*parts, text[shown_to:]])


def text_of_others(text: str) -> str:
    """Return a text that may hold others' words as one short printable line without secrets."""
    return excerpt(without_secrets(text), _LONGEST)


def without_user(url: str) -> str:
    """Return the text with ``user:password@`` of the URLs in it hidden."""
    return _USER_IN_URL.sub(f"{HIDDEN}@", url)


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option of this name holds a secret, e.g. ``HF_TOKEN``."""
    words = [word.lower() for word in _WORD.findall(name)]
    return bool(words) and words[-1] in _SECRET_WORDS


def _places(text: str) -> list[tuple[int, int]]:
    """Return the ranges to hide, in order, overlapping and touching ones joined."""
    hits = [
        (at, at + _WINDOW)
        for at in range(len(text) - _WINDOW + 1 if _windows else 0)
        if text[at : at + _WINDOW] in _windows
    ]
    hits += [found.span() for secret in _secrets for found in re.finditer(re.escape(secret), text)]
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(hits):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
