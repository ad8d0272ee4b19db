"""Gives work to the member of a fleet that has the least of it."""

from collections.abc import Sequence


class OutstandingTokens:
    """Counts the tokens that every member of a fleet was given and has not answered.

    Args:
        num_members: size of the fleet.
    """

    def __init__(self, num_members: int) -> None:
        self._tokens = [0] * num_members

    def of(self, member: int) -> int:
        return self._tokens[member]

    def least(self, members: Sequence[int]) -> int:
        """The member with the fewest outstanding tokens; of equals, the first.

        Raises:
            ValueError: ``members`` is empty.
        """
        return min(members, key=lambda member: (self._tokens[member], member))

    def add(self, member: int, tokens: int) -> None:
        self._tokens[member] += tokens

    def remove(self, member: int, tokens: int) -> None:
        """Take off tokens that were added before and are answered or given up."""
        if tokens > self._tokens[member]:
            raise ValueError(
                f"member {member} has {self._tokens[member]} outstanding tokens, not {tokens}"
            )
        self._tokens[member] -= tokens
