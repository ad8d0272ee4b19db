"""Grouping sequences into padded batches and packed rows."""

from collections.abc import Sequence


def padded_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return groups of indices whose padded size, rows x longest, is at most ``max_tokens``.

    Longest first, so that rows of one group are of similar length. A sequence longer than
    ``max_tokens`` gets a group of its own. Deterministic; every index occurs exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def packed_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return groups of indices whose lengths sum to at most ``max_tokens``.

    Longest first, each into the first group that has room. A longer sequence gets a group
    of its own. Deterministic; every index occurs exactly once.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = (group for group, free in enumerate(room) if free >= lengths[index])
        group = next(fits, None)
        if group is None:
            groups.append([index])
            room.append(max_tokens - lengths[index])
        else:
            groups[group].append(index)
            room[group] -= lengths[index]
    return groups
