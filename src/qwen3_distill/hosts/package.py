"""Tells whether two nodes run the same version of this package."""

import hashlib
from functools import cache
from pathlib import Path

from qwen3_distill import __version__

_PACKAGE = Path(__file__).parents[1]


@cache
def package_fingerprint() -> str:
    """Return this package's version, with a digest of its source files.

    Records cross nodes as pickles, so the sources must be equal, not only the version's number.
    """
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode())
        digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
