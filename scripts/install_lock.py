"""Install the packages of a lock file into the interpreter that runs this script.

    PYTHONPATH=src .venv/bin/python scripts/install_lock.py requirements.lock

The lock's first line names the Python version and the platform that it was made on. On another one
nothing is installed, so that the versions are left to pip and the ranges of pyproject.toml.
"""

import sys
from pathlib import Path

from qwen3_distill.environments.make import BuildError, install_lock, python_tag

_MARK = "# for: "


def made_for(lock: Path) -> str:
    """Return the version and platform in the lock's first line, e.g. ``3.11 linux-x86_64``."""
    first = lock.read_text(encoding="utf-8").partition("\n")[0]
    if not first.startswith(_MARK):
        sys.exit(
            f"error: {lock} begins with {first!r}, expected {_MARK!r} and a Python version and "
            "platform; add that line"
        )
    return first.removeprefix(_MARK).strip()


def main(lock: Path) -> None:
    """Install the lock, or say why the newest allowed versions are taken instead."""
    wanted, found = made_for(lock), python_tag(sys.executable)
    if wanted != found:
        print(
            f"{lock} is for Python {wanted}, this is Python {found}: not used; pip takes the "
            "newest versions that pyproject.toml allows",
            file=sys.stderr,
        )
        return
    try:
        install_lock(lock, Path(sys.executable))
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
