"""A step's metrics by tag, where every tag of the prompts has a teacher of its own."""

from collections.abc import Mapping, Sequence

from qwen3_distill.data.tags import group_by_tag, tag_of
from qwen3_distill.types import Metric, Rollout, ScoredRollout, TrainingRollout


def tags_of(rollouts: Sequence[Rollout]) -> list[str]:
    """Return every rollout's tag; empty text for one without."""
    return [tag_of(rollout.prompt) or "" for rollout in rollouts]


def metrics_by_tag(
    trained: Sequence[TrainingRollout], rewards: Mapping[str, float]
) -> list[Metric]:
    """Return every tag's share, length, reward and distance from its teacher.

    Args:
        rewards: the verifier's, by id, of the rollouts that it judged.
    """
    metrics: list[Metric] = []
    for tag, indices in group_by_tag(tags_of([item.rollout for item in trained])).items():
        own = [trained[index] for index in indices]
        rollouts = [item.rollout for item in own]
        area = f"by_tag/{tag}"
        metrics += [
            Metric.mean(f"{area}_share", len(own), len(trained)),
            Metric.mean(
                f"{area}_response_tokens", sum(r.num_tokens for r in rollouts), len(rollouts)
            ),
        ]
        judged = [rewards[r.rollout_id] for r in rollouts if r.rollout_id in rewards]
        if judged:
            metrics.append(Metric.mean(f"{area}_accuracy", sum(judged), len(judged)))
        metrics += _distance(f"{area}_sampled_kl_nats", own)
    return metrics


def _distance(key: str, items: Sequence[TrainingRollout]) -> list[Metric]:
    """The mean over the student's tokens of behavior minus teacher logprob."""
    students = [
        item
        for item in items
        if isinstance(item, ScoredRollout) and item.rollout.sampled_by == "student"
    ]
    if not students:
        return []
    total = sum(
        float((item.rollout.behavior_logprobs - item.score.logprobs).sum()) for item in students
    )
    return [Metric.mean(key, total, sum(item.rollout.num_loss_tokens for item in students))]
