"""Defines the kinds of faults: what a reply may be instead of a score."""

from dataclasses import dataclass
from enum import Enum

from qwen3_distill.utils.secrets import text_of_others


class FaultKind(str, Enum):
    """Kinds of bad or missing replies; retries are counted by kind."""

    GARBAGE = "garbage"
    """Not the expected JSON, or larger than an answer to the request can be."""
    COUNT = "count"
    """Another number of sequences than was sent."""
    LENGTH = "length"
    """Another number of tokens than was sent."""
    MISALIGNED = "misaligned"
    """Scores of other tokens than those sent, or of the same tokens at other positions."""
    MISSING = "missing"
    """A logprob that is None, NaN or infinite."""
    POSITIVE = "positive"
    """A logprob above 0."""
    CANDIDATES = "candidates"
    """Candidates other than K distinct tokens of the vocabulary, most likely first."""
    ABORTED = "aborted"
    """The server aborted the sequence."""
    REFUSED = "refused"
    """The server rejected the request; a retry would not help."""
    STATUS = "status"
    """An HTTP status other than 200; a retry may help."""
    TIMEOUT = "timeout"
    """No whole answer in time."""
    CONNECTION = "connection"
    """No connection, or a broken one."""


@dataclass(frozen=True)
class Fault:
    """Why a job got no score from this reply. The detail may hold words of a server."""

    kind: FaultKind
    detail: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", text_of_others(self.detail))


class _FaultError(Exception):
    def __init__(self, kind: FaultKind, detail: str) -> None:
        self.fault = Fault(kind, detail)
        super().__init__(self.fault.detail)


class Unanswered(_FaultError):
    """A request got no answer; it may be sent again."""


class ReplyError(_FaultError):
    """A reply that cannot be matched with the request: none of it is used."""


class Refused(Exception):
    """The server refused a request; sending it again changes nothing."""

    def __init__(self, detail: str) -> None:
        super().__init__(text_of_others(detail))
