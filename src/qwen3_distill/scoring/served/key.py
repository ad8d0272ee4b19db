"""Reads the key of the servers that run elsewhere. No error shows it."""

from pathlib import Path

from qwen3_distill.errors import ConfigError
from qwen3_distill.utils.secrets import remember_secret

_MAX_BYTES = 8192


def read_api_key(file: str) -> str:
    """Read a key: one line of printable ASCII characters without blanks.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    where = f"scoring.api_key_file {file}"
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"{where} cannot be read: {reason}") from error
    lines = content.strip().splitlines()
    if not lines:
        raise ConfigError(f"{where} is empty; expected a key, alone on one line")
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{where} has more than {_MAX_BYTES} bytes; expected a key, alone")
    if len(lines) > 1:
        raise ConfigError(f"{where} has {len(lines)} lines; expected a key, alone on one line")
    if not all(0x21 <= byte <= 0x7E for byte in lines[0]):
        raise ConfigError(
            f"{where} has a character that no key in an HTTP header may have: a blank, a control "
            "character or one beyond ASCII; write the key alone, as its server shows it"
        )
    key = lines[0].decode("ascii")
    remember_secret(key)
    return key
