"""Refusing rollout requests that do not fit a model's context."""

from collections.abc import Sequence

from qwen3_distill.errors import DataError
from qwen3_distill.types import RolloutRequest


def check_context(requests: Sequence[RolloutRequest], max_model_tokens: int) -> None:
    """Check that prompt and longest response of every request fit together.

    Raises:
        DataError: one does not.
    """
    for request in requests:
        prompt_tokens = request.prompt.token_ids.size
        if prompt_tokens + request.sampling.max_new_tokens > max_model_tokens:
            raise DataError(
                f"rollout {request.rollout_id}: {prompt_tokens} prompt tokens + max_new_tokens "
                f"{request.sampling.max_new_tokens} exceed the model's context of "
                f"{max_model_tokens}"
            )
