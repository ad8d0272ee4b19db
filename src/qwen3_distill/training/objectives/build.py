"""From a config's objective to the object that computes it."""

from torch import Tensor

from qwen3_distill.config import (
    FullDivergence,
    ObjectiveConfig,
    SampledReverseKL,
    TopKDivergence,
)
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.head import (
    TokenStatistics,
)
from qwen3_distill.training.objectives.base import Objective
from qwen3_distill.training.objectives.divergences import FullObjective, TopKObjective
from qwen3_distill.training.objectives.sampled import SampledObjective


def build_objective(
    config: ObjectiveConfig,
    *,
    teacher_head_VD: Tensor | None,
    chunk_tokens: int,
    token_statistics: TokenStatistics | None = None,
) -> Objective:
    """The objective of a config.

    Args:
        teacher_head_VD: the teacher's output head, for objectives over hidden states.
        chunk_tokens: rows of logits that exist at a time.
        token_statistics: how the sampled tokens' logprobs and entropies are computed; None: in
            chunks of logits. Other statistics always are.

    Raises:
        ConfigError: the objective needs the teacher's output head and there is none.
    """
    match config:
        case SampledReverseKL():
            full = config.kl_baseline.kind == "full"
            head_VD = _need_head(teacher_head_VD) if full else None
            return SampledObjective(config, head_VD, chunk_tokens, token_statistics)
        case TopKDivergence():
            return TopKObjective(config, chunk_tokens)
        case FullDivergence():
            return FullObjective(config, _need_head(teacher_head_VD), chunk_tokens)


def _need_head(teacher_head_VD: Tensor | None) -> Tensor:
    if teacher_head_VD is None:
        raise ConfigError(
            "this objective needs the teacher's full distribution, and the scorer gives no "
            "hidden states; use scoring.kind=embedded, or objective.kind=top_k"
        )
    return teacher_head_VD
