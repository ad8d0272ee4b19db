"""Which jobs share a request to a server."""

from collections.abc import Sequence

from qwen3_distill.types import ScoringJob


def request_groups(
    jobs: Sequence[ScoringJob], request_tokens: int, *, max_jobs: int | None = None
) -> list[list[int]]:
    """Group jobs into requests of at most ``request_tokens`` tokens; return their indices.

    A request has at most ``max_jobs`` jobs.

    Jobs with the same context follow one another, see `first_of_contexts`.
    """
    first_of_context: dict[bytes, int] = {}
    for index, job in enumerate(jobs):
        first_of_context.setdefault(job.context_ids.tobytes(), index)
    order = sorted(
        range(len(jobs)),
        key=lambda index: (first_of_context[jobs[index].context_ids.tobytes()], index),
    )
    groups: list[list[int]] = []
    used = 0
    for index in order:
        size = int(jobs[index].token_ids.size)
        fits = groups and used + size <= request_tokens
        if fits and (max_jobs is None or len(groups[-1]) < max_jobs):
            groups[-1].append(index)
            used += size
        else:
            groups.append([index])
            used = size
    return groups


def first_of_contexts(
    group: Sequence[int], jobs: Sequence[ScoringJob]
) -> tuple[list[int], list[int]]:
    """Divide a request: the first job of each context, and those whose context one of them has.

    A server computes a context once only if its cache has it when the second job begins. Jobs of
    one request are computed together, each with its context.
    """
    first: dict[bytes, int] = {}
    for index in group:
        first.setdefault(jobs[index].context_ids.tobytes(), index)
    leading = set(first.values())
    return [*first.values()], [index for index in group if index not in leading]
