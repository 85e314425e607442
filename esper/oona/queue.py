"""A bounded queue: the most urgent first, then in order of arrival."""

from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar, final

from esper.leyline.envelope import Priority

_T = TypeVar("_T")


class _Entry(NamedTuple):
    """What waits: `order` decides within a priority, and no two entries share it."""

    order: int
    since: float
    item: object


@final
class PriorityQueue(Generic[_T]):
    """Letters that wait for one consumer; not safe for several threads by itself.

    Example:
        >>> queue = PriorityQueue[str]()
        >>> queue.push(Priority.NORMAL, 1, "first")
        >>> queue.push(Priority.NORMAL, 2, "second")
        >>> queue.push(Priority.EMERGENCY, 3, "now")
        >>> [queue.pop() for _ in range(len(queue))]
        ['now', 'first', 'second']
    """

    def __init__(self) -> None:
        """Make an empty queue."""
        self._heaps: tuple[list[_Entry], ...] = tuple([] for _ in Priority)

    def push(self, priority: Priority, order: int, item: _T, since: float = 0.0) -> None:
        """Add an item.

        Args:
            priority: the lowest number comes out first.
            order: place among equal priorities, the lowest first; given once only.
            item: what waits.
            since: when it began to wait, in seconds of any clock; see `oldest`.
        """
        heappush(self._heaps[priority], _Entry(order, since, item))

    def pop(self) -> _T:
        """Take the next item out.

        Raises:
            IndexError: the queue is empty.
        """
        item: _T = heappop(next((heap for heap in self._heaps if heap), self._heaps[0])).item  # type: ignore[assignment]
        return item

    def peek(self) -> _T:
        """Return the next item and leave it in.

        Raises:
            IndexError: the queue is empty.
        """
        item: _T = next((heap for heap in self._heaps if heap), self._heaps[0])[0].item  # type: ignore[assignment]
        return item

    def drop(self) -> _T:
        """Take out the item that is missed least: the oldest one of the lowest priority.

        Raises:
            IndexError: the queue is empty.
        """
        item: _T = heappop(next((heap for heap in reversed(self._heaps) if heap), self._heaps[0])).item  # type: ignore[assignment]
        return item

    @property
    def urgency(self) -> int:
        """Priority of the next item; beyond the lowest one for an empty queue."""
        return next((priority for priority, heap in enumerate(self._heaps) if heap), len(self._heaps))

    @property
    def oldest(self) -> float | None:
        """When the item that waits longest among the heads began to wait; `None` for an empty queue."""
        return min((heap[0].since for heap in self._heaps if heap), default=None)

    def __len__(self) -> int:
        """Return how many items wait."""
        return sum(map(len, self._heaps))
