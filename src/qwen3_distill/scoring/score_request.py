"""What an objective asks of the teacher, beyond the sampled token's logprob."""

from qwen3_distill.config.objective import ObjectiveSchema
from qwen3_distill.types import HiddenRequest, SampledRequest, ScoreRequest, TopKRequest

__all__ = ["HiddenRequest", "SampledRequest", "ScoreRequest", "TopKRequest", "request_for"]


def request_for(objective: ObjectiveSchema) -> ScoreRequest:
    """Return the least that the objective can be computed from."""
    return objective.score_request
