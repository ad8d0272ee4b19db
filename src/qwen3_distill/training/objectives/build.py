"""From an objective's config to the object that computes it."""

from importlib import import_module

from torch import Tensor

from qwen3_distill.config import ObjectiveSchema
from qwen3_distill.modeling.head import TokenStatistics
from qwen3_distill.training.objectives.base import Objective, ObjectiveSetup


def build_objective(
    config: ObjectiveSchema,
    *,
    teacher_head_VD: Tensor | None,
    chunk_tokens: int,
    token_statistics: TokenStatistics | None = None,
    has_exact_statistics: bool = False,
) -> Objective:
    """Import the class that the config names, and construct it.

    Args:
        teacher_head_VD: the teacher's output head, for objectives over hidden states.
        chunk_tokens: rows of logits that exist at a time.
        token_statistics: computes the sampled tokens' logprobs and entropies; None: in chunks of
            logits.
        has_exact_statistics: that function does not round logits (`ObjectiveSetup`).

    Raises:
        ConfigError: the objective needs the teacher's output head and there is none.
    """
    module, _, name = config.implementation.partition(":")
    implementation = getattr(import_module(module), name)
    return implementation(
        ObjectiveSetup(
            config=config,
            teacher_head_VD=teacher_head_VD,
            chunk_tokens=chunk_tokens,
            token_statistics=token_statistics,
            has_exact_statistics=has_exact_statistics,
        )
    )
