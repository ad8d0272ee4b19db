"""Settings that engines share: how their processes are started and watched."""

import json

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import NonNegativeInt, PathText, Schema, Seconds, Threads
from qwen3_distill.utils.secrets import is_secret_name


class Supervised(Schema):
    """Settings of a supervised process: its start timeout and restart limit."""

    start_timeout_s: Seconds = 900.0
    """Limit for the start, loading and compiling included."""
    max_restarts: NonNegativeInt = 3
    """How often per run the process is restarted after it died."""


class Watched(Supervised):
    """A process that answers a heartbeat."""

    hang_timeout_s: Seconds = 900.0
    """A process that does not answer the heartbeat for this long is killed and restarted. Set it
    above the longest call that keeps it from answering: a learner's step, a teacher's forward
    pass, a decode step of an embedded engine. The start has its own limit."""


class EmbeddedProcess(Watched):
    """A PyTorch engine, in the controller's process or in its own."""

    own_process: bool = False
    """Run in its own process: stages then compute concurrently, and a process that dies is
    restarted. The process settings apply only then."""
    threads: Threads | None = None
    """PyTorch threads in that process; null: PyTorch's default, one per core."""

    @property
    def interpreter(self) -> str | None:
        """Interpreter of an environment of the engine's own: the embedded engines have none."""
        return None

    @model_validator(mode="after")
    def _threads_need_own_process(self) -> Self:
        if self.threads is not None and not self.own_process:
            raise ValueError(
                f"threads={self.threads} with own_process=false would apply to everything in the "
                "controller's process; set own_process=true, or drop threads"
            )
        return self


class EngineProcess(Supervised):
    """Settings of an engine that always runs in its own process."""

    python: PathText | None = None
    """Python interpreter of an environment that has the engine; null: the environment that
    ``qwen3-distill engines install`` made on this machine. Name an interpreter that has the engine
    among its own packages, e.g. ``python3``."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the engine's process, added to the inherited ones, e.g.
    ``PYTHONPATH``."""

    @property
    def interpreter(self) -> str | None:
        """The interpreter that is named; None: that of the environment installed here."""
        return self.python

    @field_validator("environment", mode="before")
    @classmethod
    def _variables_are_names_and_texts(cls, environment: object) -> object:
        if not isinstance(environment, dict):
            return environment  # its type is refused next
        for name, value in environment.items():
            if not name or "=" in name or "\0" in name:
                raise ValueError(f"{name!r} is no name of a variable: it is empty or has a `=`")
            if not isinstance(value, str):
                hides = is_secret_name(name) or isinstance(value, dict | list)
                found = "no text" if hides else f"{value!r} ({type(value).__name__})"
                written = "VALUE" if hides else json.dumps(value)
                raise ValueError(
                    f'{name} is {found}, and variables are text; write {name}: "{written}"'
                )
            if "\0" in value:
                raise ValueError(f"{name} holds a NUL character, which no variable may")
        return environment
