"""What to compile when nobody asks: what is wanted most, what failed lately, what an old toolchain made."""

from collections.abc import Iterable
from enum import IntEnum, unique
from typing import Final, NamedTuple

from esper.leyline.artifacts import KernelSpec, Pipeline

HIGH_INTEREST: Final = 0.7
"""Interest from which a kernel is autotuned where that helps."""

LONG_QUEUE: Final = 40
"""Waiting jobs at which a kernel must be wanted with certainty to join the queue."""

RECENT_S: Final = 86_400.0
"""Age up to which a failure is recent, in seconds."""

PAUSE_S: Final = 600.0
"""Time before a failure is tried again, in seconds; it doubles with every try."""

MAX_TRIES: Final = 3
"""Tries of one kernel in idle time."""


@unique
class Tier(IntEnum):
    """Why a kernel is compiled in idle time, the most urgent reason first."""

    HIGH_INTEREST = 0
    RECENT_FAILURE = 1
    OUTDATED_TOOLCHAIN = 2


class Candidate(NamedTuple):
    """A kernel that could be compiled in idle time.

    Args:
        spec: the kernel.
        pipeline: how to compile it.
        tier: why.
        interest: how much it is wanted, 0 to 1.
        since: when it became a candidate, in seconds since the Unix epoch.
        tried: when it was last tried in vain, in seconds since the Unix epoch; 0 for never.
        tries: how often it was tried in vain.
    """

    spec: KernelSpec
    pipeline: Pipeline
    tier: Tier
    interest: float = 0.5
    since: float = 0.0
    tried: float = 0.0
    tries: int = 0


def next_idle(candidates: Iterable[Candidate], now: float) -> Candidate | None:
    """Return the candidate to compile now, or None: by tier, then by interest, then the one that waits longest.

    Example:
        >>> next_idle([], now=0.0) is None
        True
    """
    due = [candidate for candidate in candidates if _is_due(candidate, now)]
    return min(due, key=lambda c: (c.tier, -c.interest, c.since), default=None)


def _is_due(candidate: Candidate, now: float) -> bool:
    if candidate.tries >= MAX_TRIES:
        return False
    if candidate.tier is Tier.RECENT_FAILURE and now - candidate.since > RECENT_S:
        return False
    return candidate.tries == 0 or now - candidate.tried >= PAUSE_S * 2 ** (candidate.tries - 1)


def choose(asked: Pipeline | None, interest: float, waiting: int, over_budget: bool) -> Pipeline:
    """Return the pipeline for a request: the one asked for, or one by load and interest.

    A kernel that few want does not join a queue: it runs eagerly until there is idle time.

    Args:
        asked: pipeline asked for; None leaves the choice.
        interest: how much the kernel is wanted, 0 to 1.
        waiting: jobs that wait.
        over_budget: whether the day's processor time is spent.

    Example:
        >>> choose(None, 0.5, 0, False), choose(None, 0.2, 9, False), choose(None, 0.9, 0, False)
        ('standard', 'fast', 'aggressive')
    """
    if asked is not None:
        return asked
    if over_budget or interest < waiting / LONG_QUEUE:
        return "fast"
    return "aggressive" if interest >= HIGH_INTEREST and waiting == 0 else "standard"
