"""What one group of subscribers still has to acknowledge, and who holds which letter; kept in memory."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple, final

from esper.leyline.envelope import Priority
from esper.oona.contracts import BusLimits
from esper.oona.journal import Waiting
from esper.oona.queue import PriorityQueue


class Lease(NamedTuple):
    """A letter is with a member until the deadline, in seconds of the exchange's clock."""

    member: str
    deadline: float


@final
@dataclass
class Member:
    """One subscriber.

    Args:
        name: unique name.
        group: name of its group.
        heard: when it last said something, in seconds of the exchange's clock; infinite for one that cannot vanish.
        telemetry: letters outside the journal that wait for it.
        dropped: telemetry that it has lost.
        told: how many lost ones the last alert told of.
    """

    name: str
    group: str
    heard: float = inf
    telemetry: PriorityQueue[bytes] = field(default_factory=PriorityQueue)
    dropped: int = 0
    told: int = 0


@final
class Group:
    """The letters of one group: each is ready, or leased to one member.

    Args:
        name: unique name.
        topics: what it listens to.
        lasting: whether it outlives its members.
        limits: bounds of the bus.
    """

    def __init__(self, name: str, topics: tuple[str, ...], lasting: bool, limits: BusLimits) -> None:
        """Make a group for which nothing waits."""
        self.name, self.topics, self.lasting = name, topics, lasting
        self.alarm = 0
        self.heard = 0.0
        self._limits = limits
        self._clear(0)

    def _clear(self, floor: int) -> None:
        self._floor = floor
        self._load = 0
        self._waiting: dict[int, Priority] = {}
        self._ready = PriorityQueue[int]()
        self._leases: dict[int, Lease] = {}
        self._next_expiry = inf

    def load(self, waiting: Iterable[Waiting], floor: int, now: float) -> None:
        """Take over what the journal says; letters up to `floor` are a replay and do not count as a backlog."""
        self._clear(floor)
        for offset, priority in waiting:
            self.push(offset, priority, now)

    def push(self, offset: int, priority: Priority, now: float) -> None:
        """Add a new letter."""
        self._waiting[offset] = priority
        self._load += offset > self._floor
        self._ready.push(priority, offset, offset, now)

    @property
    def backlog(self) -> int:
        """Letters that wait or are not acknowledged, without those of a replay."""
        return self._load

    @property
    def full(self) -> bool:
        """Whether publishers must wait."""
        return self._load >= self._limits.capacity

    @property
    def urgency(self) -> int:
        """Priority of the next letter; beyond the lowest one when none is ready."""
        self._skip_acknowledged()
        return self._ready.urgency

    def lag_s(self, now: float) -> float:
        """Age of the oldest letter that waits, in seconds."""
        oldest = self._ready.oldest
        return 0.0 if oldest is None else max(0.0, now - oldest)

    def lease(self, member: str, now: float) -> int:
        """Hand the next letter to a member; return its offset."""
        self._skip_acknowledged()
        offset = self._ready.pop()
        self._leases[offset] = Lease(member, now + self._limits.visibility_s)
        self._next_expiry = min(self._next_expiry, now + self._limits.visibility_s)
        return offset

    def _skip_acknowledged(self) -> None:
        """Forget ready letters that were acknowledged after all."""
        while self._ready and self._ready.peek() not in self._waiting:
            self._ready.pop()

    def renew(self, member: str, offsets: Iterable[int], now: float) -> None:
        """Start the visibility time of these letters anew, as the member has not even looked at them."""
        for offset in offsets:
            if (lease := self._leases.get(offset)) is not None and lease.member == member:
                self._leases[offset] = Lease(member, now + self._limits.visibility_s)

    def ack(self, offsets: Iterable[int]) -> None:
        """Forget letters that are done with."""
        for offset in offsets:
            if self._waiting.pop(offset, None) is not None:
                self._load -= offset > self._floor
            self._leases.pop(offset, None)

    def expire(self, now: float) -> float:
        """Make letters ready whose visibility time is over; return when the next one's will be."""
        if now >= self._next_expiry:
            self._return([offset for offset, lease in self._leases.items() if lease.deadline <= now], now)
            self._next_expiry = min((lease.deadline for lease in self._leases.values()), default=inf)
        return self._next_expiry

    def release(self, member: str, now: float) -> None:
        """Make everything ready that a member holds."""
        self._return([offset for offset, lease in self._leases.items() if lease.member == member], now)

    def _return(self, offsets: list[int], now: float) -> None:
        for offset in offsets:
            del self._leases[offset]
            self._ready.push(self._waiting[offset], offset, offset, now)
