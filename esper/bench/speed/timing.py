"""Times calls against each other on a machine that is never quite still."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Call = Callable[[], object]

_BATCHES = 10


class Median(NamedTuple):
    """A median and the 95 % interval of it, from order statistics alone."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Median":
        """Summarise values: ranks `n / 2 -+ 0.98 * sqrt(n)` bound the median with 95 % confidence.

        Example:
            >>> Median.of([3.0, 1.0, 2.0])
            Median(value=2.0, low=1.0, high=3.0)
        """
        ordered, n = sorted(values), len(values)
        reach = 0.98 * n**0.5
        low, high = max(0, int(n / 2 - reach)), min(n - 1, int(n / 2 + reach))
        return cls(statistics.median(ordered), ordered[low], ordered[high])

    def percent(self) -> str:
        """Show a ratio as a difference from 1, in percent.

        Example:
            >>> Median(1.01, 0.99, 1.02).percent()
            '+1.00 % [-1.00, +2.00]'
        """
        return f"{100 * (self.value - 1):+.2f} % [{100 * (self.low - 1):+.2f}, {100 * (self.high - 1):+.2f}]"


def seconds(call: Call, clock: Callable[[], float] = time.process_time) -> float:
    """Return how long one call takes, in seconds of processor time or of another clock."""
    start = clock()
    call()
    return clock() - start


def timed(call: Call, times: int) -> list[float]:
    """Return the seconds on the clock of each of so many calls, after one that does not count."""
    call()
    return [seconds(call, time.perf_counter) for _ in range(times)]


def least(call: Call, times: int) -> float:
    """Return the least mean of a call over ten batches of them, in seconds: what else the machine does only adds."""
    rounds = range(max(1, times // _BATCHES))

    def batch() -> None:
        for _ in rounds:
            call()

    return min(timed(batch, _BATCHES)) / len(rounds)


def blocks(
    calls: Mapping[str, Call], count: int, repeats: int = 1, prepare: Callable[[str], object] = lambda name: None
) -> list[dict[str, float]]:
    """Return one dict of seconds per block: the least that each call took in it.

    In a block every call runs `2 * repeats` times: there and back (A B C C B A), beginning with another call in each
    block, so that a slow drift of the machine hits all alike; what else the machine does only ever adds to a time.
    Python's garbage collection waits between the blocks. `prepare` is called with a call's name before it, untimed.
    """
    names, found = list(calls), []
    for block in range(count):
        order = names[block % len(names) :] + names[: block % len(names)]
        times = dict.fromkeys(names, float("inf"))
        gc.collect()
        gc.disable()
        try:
            for name in (order + order[::-1]) * repeats:
                prepare(name)
                times[name] = min(times[name], seconds(calls[name]))
        finally:
            gc.enable()
        found.append(times)
    return found
