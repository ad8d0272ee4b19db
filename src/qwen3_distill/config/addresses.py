"""Checks the addresses of servers: what passes here can be asked over HTTP."""

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from qwen3_distill.utils.secrets import without_user

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_EXAMPLE = "expected e.g. http://10.0.0.2:30000"


def checked_url(url: str) -> str:
    """Return the address of a server if a request can be sent to it.

    Raises:
        ValueError: it is none; says what is wrong, and shows no user name or password.
    """
    shown = repr(without_user(url))
    if not all("!" <= char <= "~" for char in url):
        raise ValueError(
            "an address has a blank, a control character or one beyond ASCII (not shown: it may "
            f"hold a password); {_EXAMPLE}"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{shown} is no address ({_reason(error)}); {_EXAMPLE}") from None
    if parts.scheme not in ("http", "https") or "://" not in url:
        raise ValueError(f"{shown} is no address; {_EXAMPLE}")
    if port == 0:
        raise ValueError(f"{shown} has port 0; ports are 1 to 65535")
    if "?" in url or "#" in url or "\\" in url:
        raise ValueError(f"{shown} has a ?, # or \\, and /generate is put at its end; {_EXAMPLE}")
    _check_user(parts, shown)
    if not _is_host(parts.hostname or "") or not _can_be_asked(url):
        raise ValueError(
            f"{shown} has no host that can be looked up: a name of letters, digits, - and . with "
            f"at most 63 characters between dots, or an IP address; {_EXAMPLE}"
        )
    return url


def has_user(url: str) -> bool:
    """Whether an address holds a user's name or password."""
    return "@" in urlsplit(url).netloc


def _check_user(parts: SplitResult, shown: str) -> None:
    user, at, _ = parts.netloc.rpartition("@")
    if at and ("@" in user or not user.strip(":")):
        raise ValueError(
            f"{shown}: before the @ belongs user:password, with every @ in it written as %40"
        )


def _is_host(host: str) -> bool:
    if ":" in host:  # a zone (%eth0) is taken as it stands: %25eth0 would be another one
        return "%25" not in host and _is_ipv6(host)
    labels = host.removesuffix(".").split(".")
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels)


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _can_be_asked(url: str) -> bool:
    """Whether the HTTP client takes the address: it decodes ``xn--`` names, and reads brackets and
    numbers by other rules."""
    import httpx  # noqa: PLC0415 - loaded for served teachers only

    try:
        return bool(httpx.URL(url).host)
    except (httpx.InvalidURL, UnicodeError):  # `idna.IDNAError` is a UnicodeError
        return False


def _reason(error: ValueError) -> str:
    return "its port is not 1 to 65535" if "ort" in str(error) else "it cannot be read"
