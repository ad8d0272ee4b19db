"""Which rollouts share a request to a server."""

from collections.abc import Sequence

from qwen3_distill.types import Rollout


def request_groups(rollouts: Sequence[Rollout], request_tokens: int) -> list[list[int]]:
    """Indices of the rollouts of each request: those of one prompt adjacent, by token budget.

    A server computes a prompt once for the sequences that follow one another with it.
    """
    first_of_prompt: dict[bytes, int] = {}
    for index, rollout in enumerate(rollouts):
        first_of_prompt.setdefault(rollout.prompt.token_ids.tobytes(), index)
    order = sorted(
        range(len(rollouts)),
        key=lambda index: (first_of_prompt[rollouts[index].prompt.token_ids.tobytes()], index),
    )
    groups: list[list[int]] = []
    used = 0
    for index in order:
        size = int(rollouts[index].prompt.token_ids.size + rollouts[index].response_ids.size)
        if groups and used + size <= request_tokens:
            groups[-1].append(index)
            used += size
        else:
            groups.append([index])
            used = size
    return groups
