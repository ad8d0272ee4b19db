"""Errors a user can meet. Each message says what was wrong, what was expected and what to change.

Every class also refines a standard error, so that callers who do not know this package can catch
the right kind. The command line turns any `DistillError` into one line on stderr and exit
status `DistillError.exit_code`; anything else is a bug and keeps its traceback.
"""


class DistillError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code = 2


class ConfigError(DistillError, ValueError):
    """A setting is missing, unknown, of the wrong type, or contradicts another one."""


class DataError(DistillError, ValueError):
    """A prompt file, rollout file or record is empty, malformed or does not fit the model."""


class ModelError(DistillError, ValueError):
    """A model directory is missing, incomplete or not a Qwen3-like causal language model."""


class HandshakeError(DistillError, ValueError):
    """Student and teacher (or learner and engine) differ in something that must be equal."""


class AlignmentError(DistillError, ValueError):
    """Per-token arrays of one rollout do not describe the same tokens."""


class WeightVersionError(DistillError, RuntimeError):
    """An engine does not serve the weights it was asked to serve."""


class RunFolderError(DistillError, OSError):
    """The run folder cannot be used: unwritable, full, locked, or made by another config."""


class CheckpointError(DistillError, RuntimeError):
    """No checkpoint of the run can be read."""


class NonFiniteError(DistillError, ArithmeticError):
    """Loss, gradient norm or weights are NaN or infinite. Nothing of it is published or saved."""

    exit_code = 3


class EngineError(DistillError, RuntimeError):
    """An engine failed, or its answer is not a valid one."""

    exit_code = 3


class StallError(EngineError):
    """Nothing happened for longer than the config allows. The message names what was awaited."""


class EngineLost(EngineError):
    """The engine's process died; calls it had not answered are lost. The caller may restart it."""


class LearnerLost(EngineLost):
    """The learner's process died and its weights are lost.

    The newest surviving ones are in the last checkpoint.
    """


class EngineStartError(EngineError):
    """An engine does not start: not installed, wrong version, no memory, port taken."""

    exit_code = 2


class MpsUnavailable(DistillError, RuntimeError):
    """No MPS daemon can be started on this machine. A run warns about it and goes on without."""
