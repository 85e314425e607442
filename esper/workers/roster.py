"""Who works for a pool at the moment, as its messages tell."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import zmq

from esper.workers.contracts import WorkerStatus


@dataclass
class Hand:
    """A connected worker.

    Args:
        name: the worker.
        socket: socket that it is connected to.
        identity: its address there.
        remote: whether somebody else started it.
        job: id of the job that it holds; empty for none.
        attempt: which try of the job that is.
        heard: when it was last heard, on the monotonic clock.
        unfit: ids of jobs that are for another machine than its own.
    """

    name: str
    socket: "zmq.Socket[bytes]"
    identity: bytes
    remote: bool
    job: str = ""
    attempt: int = 0
    heard: float = field(default_factory=time.monotonic)
    unfit: set[str] = field(default_factory=set)

    def status(self) -> WorkerStatus:
        """Return what others may know of it."""
        silent_s = time.monotonic() - self.heard
        return WorkerStatus(name=self.name, job=self.job, silent_s=silent_s, remote=self.remote)


@final
class Roster:
    """The connected workers, by name and by address."""

    def __init__(self) -> None:
        """Start with nobody."""
        self._hands: dict[str, Hand] = {}

    def __iter__(self) -> Iterator[Hand]:
        """Go over all of them, whoever leaves meanwhile."""
        return iter(list(self._hands.values()))

    def find(self, socket: "zmq.Socket[bytes]", identity: bytes) -> Hand | None:
        """Return the worker at an address."""
        return next((hand for hand in self if hand.socket is socket and hand.identity == identity), None)

    def join(self, hand: Hand) -> None:
        """Note a worker, in the place of an earlier connection of the same name."""
        earlier = self._hands.get(hand.name)
        if earlier is not None:
            hand.unfit |= earlier.unfit
        self._hands[hand.name] = hand

    def leave(self, name: str) -> Hand | None:
        """Strike a worker off and return it, if it was there."""
        return self._hands.pop(name, None)

    def release(self, name: str, job: str) -> None:
        """Note that a worker no longer holds a job, should it be thought to."""
        if (hand := self._hands.get(name)) and hand.job == job:
            hand.job = ""

    def silent(self, limit_s: float) -> list[Hand]:
        """Return those that were not heard for longer than a time, in seconds."""
        now = time.monotonic()
        return [hand for hand in self if now - hand.heard > limit_s]
