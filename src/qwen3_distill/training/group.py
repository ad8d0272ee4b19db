"""Several learners that take each step together, seen as one learner.

Every rank holds the whole student (its base, its adapters or all trained weights, the optimizer's
moments) and the whole replay buffer, so that any rank could save them. What is divided is the work:
a step's rollouts are dealt to the ranks by their tokens, every rank divides by the denominator of
the whole step, and the gradients are added up once, before clipping. All ranks then take the same
optimizer step on the same numbers, and the digest of the weights is compared after it.

In a sharded group the ranks divide the trained weights, their gradients and moments, too
(`sharding`). Then each saves its own part, and all take part when whole weights are looked at.

A rank that fails leaves the others waiting in the sum. So the whole group is ended with it, and the
caller starts the group again and loads the last checkpoint, as for a single learner that is lost.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from qwen3_distill.errors import ConfigError, LearnerLost
from qwen3_distill.hosts.members import Span, no_span
from qwen3_distill.hosts.reserved_port import ReservedPort
from qwen3_distill.ports import WeightChannel
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.training.rank_place import RankPlace, shares_of
from qwen3_distill.types import Batch, Metric, ModelIdentity, ScoredRollout, Update, WeightVersion
from qwen3_distill.utils.concurrency import together
from qwen3_distill.weights.per_card import PerCardChannel

Result = TypeVar("Result")

_TOKENS = "train/input_tokens"
"""Metric of an update: tokens of a rank's passes in the step."""
_GRACE_S = 30.0
"""How long ranks may go on after one has failed: an error of all of them, such as a loss that is
not finite, reaches them at about the same time."""


def port_on_this_machine() -> ReservedPort:
    """Reserve a port at which ranks that are all on this machine meet."""
    return ReservedPort("127.0.0.1")


class GroupLearner:
    """A `ReplayingLearner` of several ranks.

    Args:
        ranks: one hosted learner per rank, all of the same settings; rank 0 saves and publishes.
        timeout_s: how long the group may take to form, and a rank may wait for the others.
        sharded: divide the student's layers, their gradients and moments over the ranks.
        rendezvous: reserves a port at which rank 0 can be reached by all; asked for before each
            start.

    Raises:
        ConfigError: there is no rank.
    """

    def __init__(
        self,
        ranks: Sequence[HostedLearner],
        *,
        timeout_s: float,
        sharded: bool = False,
        rendezvous: Callable[[], ReservedPort] = port_on_this_machine,
    ) -> None:
        if not ranks:
            raise ConfigError("a group of learners needs at least one rank")
        self._ranks = tuple(ranks)
        self._timeout_s = timeout_s
        self._sharded = sharded
        self._rendezvous = rendezvous
        self._num_starts = 0
        self._tokens_trained = [0.0] * len(ranks)
        self.span: Span = no_span
        """Records that a rank works; set by the run's recorder."""

    @property
    def ranks(self) -> tuple[HostedLearner, ...]:
        return self._ranks

    @property
    def identity(self) -> ModelIdentity:
        return self._ranks[0].identity

    @property
    def version(self) -> WeightVersion:
        return self._ranks[0].version

    @property
    def max_restarts(self) -> int:
        return self._ranks[0].max_restarts

    @property
    def counters(self) -> Mapping[str, float]:
        """Per rank: tokens of its passes, and restarts, which all ranks make together."""
        found: dict[str, float] = {}
        for rank, tokens in enumerate(self._tokens_trained):
            found[f"fleet/rank_{rank}_tokens"] = tokens
            found[f"fleet/rank_{rank}_restarts"] = max(0, self._num_starts - 1)
        return found

    def describe(self) -> Mapping[str, str]:
        """How rank 0 runs, and the number of ranks, for people; after `start`."""
        divided = ", weights and optimizer divided over them" if self._sharded else ""
        return {**self._ranks[0].describe(), "ranks": f"{len(self._ranks)}{divided}"}

    async def start(self) -> None:
        """Start all ranks; they meet while they are opened.

        Raises:
            EngineStartError: a rank does not start, or the ranks do not meet in time.
        """
        await self.close()
        self._num_starts += 1
        with closing(self._rendezvous()) as meeting:  # once they have met, rank 0 listens there
            for index, rank in enumerate(self._ranks):
                rank.place = RankPlace(
                    index=index,
                    count=len(self._ranks),
                    address=meeting.address,
                    timeout_s=self._timeout_s,
                    sharded=self._sharded,
                )
            try:
                await together(*(rank.start() for rank in self._ranks))
                self._require_same_weights()
            except BaseException:
                await self.close()
                raise

    async def update(self, batch: Batch) -> Update:
        shares = shares_of(batch, len(self._ranks), batch.lag_steps(self.version))
        calls = [
            self._traced(i, f"{share.num_rollouts} rollouts", rank.update_share(share))
            for i, (rank, share) in enumerate(zip(self._ranks, shares, strict=True))
        ]
        return self._of_all(await self._each(calls))

    async def admit(self, scored: Sequence[ScoredRollout]) -> None:
        await self._each(rank.admit(scored) for rank in self._ranks)

    async def update_replayed(self, num_rollouts: int) -> Update:
        calls = [
            self._traced(i, "replayed rollouts", rank.update_replayed(num_rollouts))
            for i, rank in enumerate(self._ranks)
        ]
        return self._of_all(await self._each(calls))

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        if isinstance(channel, PerCardChannel):
            ranks = self._ranks[: channel.num_cards]
            return (
                await self._each(
                    rank.publish(channel.of_card(card)) for card, rank in enumerate(ranks)
                )
            )[0]
        return await self._first(self._ranks[0].publish(channel))

    async def save_state(self, directory: Path) -> None:
        if not self._sharded:
            return await self._ranks[0].save_state(directory)
        writes = [rank.save_state(directory) for rank in self._ranks]
        # No rank waits for another here, so what one of them raises (a full disk) is the error.
        for failed in await asyncio.gather(*writes, return_exceptions=True):
            if failed is not None:
                raise failed

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        await self._each(rank.load_state(directory, version) for rank in self._ranks)

    async def save_student(self, directory: Path) -> None:
        await self._first(self._ranks[0].save_student(directory))

    async def close(self) -> None:
        await asyncio.gather(*(rank.close() for rank in self._ranks))

    async def _first(self, call: Coroutine[Any, Any, Result]) -> Result:
        """Make a call of rank 0 that looks at whole weights; the others take part in gathering.

        What rank 0 raises after that, such as a full disk, concerns no other rank.

        Raises:
            LearnerLost: a rank died or failed meanwhile; the group was ended.
        """
        if not self._sharded:
            return await call
        gathers = (rank.gather() for rank in self._ranks[1:])
        own, *others = await self._each([_outcome(call), *map(_outcome, gathers)])
        failed = [other for other in others if isinstance(other, BaseException)]
        if any(type(error) is not type(own) for error in failed):
            await self.close()
            raise LearnerLost(f"the weights could not be gathered from all ranks: {failed[0]}")
        if isinstance(own, BaseException):
            raise own
        return own

    async def _each(self, calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
        """Make one call per rank; end the group unless all ranks return, or all raise the same.

        Raises:
            LearnerLost: some ranks failed, and others returned, failed otherwise, or hang.
        """
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if pending:
                _, pending = await asyncio.wait(pending, timeout=_GRACE_S)
        except asyncio.CancelledError:
            await self._end(tasks)
            raise
        ended = {rank: task.exception() for rank, task in enumerate(tasks) if task.done()}
        errors = {rank: error for rank, error in ended.items() if error is not None}
        if not errors:
            return [task.result() for task in tasks]
        # A rank that died is the cause of what the others say of their sum.
        rank, first = min(errors.items(), key=lambda item: not isinstance(item[1], LearnerLost))
        if len(errors) == len(tasks) and len({type(error) for error in errors.values()}) == 1:
            raise first  # such as a loss that is not finite: nothing was stepped anywhere
        await self._end(tasks)
        raise LearnerLost(
            f"rank {rank} of {len(tasks)} failed, and the group was ended with it: {first}"
        ) from None

    async def _traced(self, rank: int, work: str, call: Coroutine[Any, Any, Update]) -> Update:
        """Make a call of one rank, recorded on its track."""
        with self.span(f"rank_{rank}", work):
            return await call

    async def _end(self, tasks: Sequence["asyncio.Future[Any]"]) -> None:
        await self.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _of_all(self, updates: Sequence[Update]) -> Update:
        """Combine the ranks' updates: numbers of the whole step are equal, metrics add up."""
        self._require_same_weights()
        combined: dict[str, Metric] = {}
        for rank, update in enumerate(updates):
            for metric in update.metrics:
                known = combined.get(metric.key)
                combined[metric.key] = metric if known is None else known.combined(metric)
                if metric.key == _TOKENS:
                    self._tokens_trained[rank] += metric.value
        first = updates[0]
        return Update(
            version=first.version,
            loss=first.loss,
            grad_norm=first.grad_norm,
            num_loss_tokens=first.num_loss_tokens,
            metrics=tuple(combined.values()),
        )

    def _require_same_weights(self) -> None:
        versions = {str(rank.version) for rank in self._ranks}
        if len(versions) > 1:
            raise LearnerLost(
                f"the ranks have different weights ({', '.join(sorted(versions))}): they computed "
                "different numbers, so the group cannot go on; use cards of one kind, and check "
                "their memory if they are"
            )


async def _outcome(call: Coroutine[Any, Any, Result | None]) -> Any:
    """Return what a call returns or raises; only the loss of a rank is raised."""
    try:
        return await call
    except LearnerLost:
        raise
    except Exception as error:  # noqa: BLE001 - judged by the caller
        return error
