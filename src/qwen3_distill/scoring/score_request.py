"""What an objective needs from the teacher, beyond the sampled token's logprob."""

from dataclasses import dataclass
from typing import TypeAlias

from qwen3_distill.config import ObjectiveConfig


@dataclass(frozen=True)
class SampledRequest:
    """The sampled token's logprob only."""


@dataclass(frozen=True)
class TopKRequest:
    """Also the k most likely tokens."""

    k: int


@dataclass(frozen=True)
class HiddenRequest:
    """Also the last hidden states, from which the learner rebuilds the full distribution."""


ScoreRequest: TypeAlias = SampledRequest | TopKRequest | HiddenRequest


def request_for(objective: ObjectiveConfig) -> ScoreRequest:
    """The least that the objective can be computed from."""
    match objective.kind:
        case "top_k":
            return TopKRequest(k=objective.k)
        case "full":
            return HiddenRequest()
        case "sampled_reverse_kl":
            baseline = objective.kl_baseline
            if baseline.kind == "top_k":
                return TopKRequest(k=baseline.k)
            return HiddenRequest() if baseline.kind == "full" else SampledRequest()
