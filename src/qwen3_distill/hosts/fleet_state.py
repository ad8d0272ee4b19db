"""States of a fleet's members: a pure state machine, without processes, clocks or Ray.

    STARTING --started--> STALE --verified--> SERVING
       ^                    ^                    |
       |                    +------outdated------+
       |
    restarting <-- LOST <--lost-- (any of the three above)
                     |
                     +--> RETIRED, when the restart budget is spent

Only a SERVING member is given work. A member that was started again is STALE until what it serves
was verified: a rollout replica has loaded the wanted version and read its digest back, a teacher
has the id of the others. Every start has a number, so a report about an earlier start of a member
changes nothing.
"""

from dataclasses import dataclass
from enum import Enum

from qwen3_distill.errors import EngineLost


class MemberState(str, Enum):
    """The state of a fleet's member decides whether it gets work."""

    STARTING = "starting"
    """Its engine is being started."""
    STALE = "stale"
    """It runs, and serves nothing: what it holds is not verified, or is not wanted any more."""
    SERVING = "serving"
    """It gets work."""
    LOST = "lost"
    """It died or hung; it will be started again."""
    RETIRED = "retired"
    """It died too often and is not started again."""


@dataclass
class _Member:
    state: MemberState = MemberState.STARTING
    start: int = 1
    """Number of its current start."""
    first_start: int = 1
    """Number of the start from which its restarts count."""
    reason: str = ""
    """The cause of its last loss."""


class FleetState:
    """The states of a fleet's members, by index.

    Args:
        num_members: size of the fleet; all of them begin as STARTING.
        max_restarts: how often each member may be started again.
        minimum: with fewer members that are not retired, the fleet has failed.
    """

    def __init__(self, num_members: int, *, max_restarts: int, minimum: int) -> None:
        if not 1 <= minimum <= num_members:
            raise ValueError(f"a fleet of {num_members} cannot need {minimum} members")
        self._members = [_Member() for _ in range(num_members)]
        self._max_restarts = max_restarts
        self._minimum = minimum

    def state(self, index: int) -> MemberState:
        return self._members[index].state

    def start_of(self, index: int) -> int:
        """The number of a member's current start, which its reports must name."""
        return self._members[index].start

    def reason(self, index: int) -> str:
        """The cause of a member's last loss; empty if there was none."""
        return self._members[index].reason

    def in_state(self, *states: MemberState) -> list[int]:
        """Indices of the members in any of the states, in order."""
        return [i for i, member in enumerate(self._members) if member.state in states]

    @property
    def serving(self) -> list[int]:
        """Indices of the members that get work."""
        return self.in_state(MemberState.SERVING)

    @property
    def num_restarts(self) -> int:
        """Starts of all members after their first ones."""
        return sum(member.start - member.first_start for member in self._members)

    def restarts_of(self, index: int) -> int:
        member = self._members[index]
        return member.start - member.first_start

    def is_current(self, index: int, start: int) -> bool:
        """Whether ``start`` is the member's current start, and it was not lost since."""
        member = self._members[index]
        is_over = member.state in (MemberState.LOST, MemberState.RETIRED)
        return member.start == start and not is_over

    def begin_anew(self) -> None:
        """Let all members be STARTING again, with a new budget; reports of before count no more."""
        for i, member in enumerate(self._members):
            self._members[i] = _Member(start=member.start + 1, first_start=member.start + 1)

    def started(self, index: int, start: int) -> None:
        """Note that a member's engine runs: STARTING becomes STALE."""
        if self.is_current(index, start) and self.state(index) is MemberState.STARTING:
            self._members[index].state = MemberState.STALE

    def verified(self, index: int, start: int) -> None:
        """Note that what a member holds is what is wanted: STALE becomes SERVING."""
        if self.is_current(index, start) and self.state(index) is MemberState.STALE:
            self._members[index].state = MemberState.SERVING

    def outdated(self, index: int, start: int) -> None:
        """Note that something else is wanted of a member now: SERVING becomes STALE."""
        if self.is_current(index, start) and self.state(index) is MemberState.SERVING:
            self._members[index].state = MemberState.STALE

    def lost(self, index: int, start: int, reason: str) -> bool:
        """Note a member's death: LOST, or RETIRED when its restarts are used up.

        Returns:
            Whether this report changed the state, so that one caller of many restarts it.
        """
        if not self.is_current(index, start):
            return False
        member = self._members[index]
        member.reason = reason
        may_restart = member.start - member.first_start < self._max_restarts
        member.state = MemberState.LOST if may_restart else MemberState.RETIRED
        return True

    def restarting(self, index: int) -> int:
        """Note that a LOST member is started again; return the number of that start."""
        member = self._members[index]
        if member.state is not MemberState.LOST:
            raise ValueError(f"member {index} is {member.state.value}, not lost")
        member.start += 1
        member.state = MemberState.STARTING
        return member.start

    def check(self) -> None:
        """Check that enough members are left.

        Raises:
            EngineLost: more members were retired than the minimum allows; says how each was lost.
        """
        retired = self.in_state(MemberState.RETIRED)
        left = len(self._members) - len(retired)
        if left < self._minimum:
            reasons = "\n  ".join(f"member {i}: {self.reason(i)}" for i in retired)
            raise EngineLost(
                f"{left} of {len(self._members)} members are left, fewer than the minimum of "
                f"{self._minimum}; each was restarted {self._max_restarts} times. Lost:\n  "
                f"{reasons}"
            )
