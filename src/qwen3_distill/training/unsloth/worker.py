"""The process that trains with unsloth: one learner, served to the controller.

unsloth patches transformers and peft when it is imported, so it must come before them: this module
imports neither, and nothing of this package that does, before `open` is called.
"""

import contextlib
import importlib
import os
import sys
import tempfile
from importlib import metadata
from typing import Any

from qwen3_distill.config import UnslothTraining
from qwen3_distill.errors import EngineStartError
from qwen3_distill.hosts.child import how_to_install
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.training.learner_service import LearnerService
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import WeightVersion

UNSLOTH_VERSION = "2026.10.9"
"""The supported version: this package reaches below unsloth's public functions."""
TRANSFORMERS_VERSIONS = ((5, 12), (5, 17))
"""First and last supported, as major and minor: needed by this package, allowed by that unsloth."""
_INSTALL = how_to_install("unsloth", "training")


class UnslothWorker(LearnerService):
    """The object that the worker serves. All methods but `open` need an open learner."""

    def open(
        self, settings: LearnerSettings[UnslothTraining]
    ) -> tuple[WeightVersion, dict[str, str]]:
        """Load the student, in place of the previous one; return its first version, and a
        description.

        Raises:
            EngineStartError: unsloth is not installed, has another version, or cannot load it.
        """
        self.learner = None
        check_installation()
        version, description = self._serve(_engine().open_learner(settings))
        for key, value in description.items():  # into the worker's log
            sys.stderr.write(f"unsloth learner: {key}: {value}\n")
        return version, description


def check_installation() -> None:
    """Refuse an environment without unsloth, or with versions that this package does not support.

    Raises:
        EngineStartError: names what is there, what is needed, and the command.
    """
    for package in ("unsloth", "unsloth_zoo"):
        version = _version(package)
        if version != UNSLOTH_VERSION:
            found = "is not installed" if version is None else f"has version {version}"
            raise EngineStartError(
                f"unsloth learner: {package} {found} for {sys.executable}, "
                f"expected {UNSLOTH_VERSION}; {_INSTALL}"
            )
    version = _version("transformers")
    lowest, highest = TRANSFORMERS_VERSIONS
    if version is None or not lowest <= _major_minor(version) <= highest:
        raise EngineStartError(
            f"unsloth learner: transformers has version {version}, expected "
            f"{lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}; {_INSTALL}"
        )


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _engine() -> Any:
    """Import the module that imports unsloth: only here, and not before it is needed."""
    try:
        return importlib.import_module("qwen3_distill.training.unsloth.student")
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise EngineStartError(
            f"unsloth learner: unsloth {UNSLOTH_VERSION} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


if __name__ == "__main__":
    # Generated code; by default a folder in the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="compiled-"))
    serve_worker(UnslothWorker())
