"""A loss curve of bounded length, however long the run."""

from dataclasses import dataclass, field
from typing import Any, Self

LIMIT = 2000
"""Most points that a curve keeps."""


@dataclass
class LossCurve:
    """Keeps a curve of at most `LIMIT` points: each is the mean of `stride` losses in a row.

    Args:
        points: step of the last loss that went into a mean, and the mean.
        stride: losses per point; doubles whenever the curve is full.
        waiting: losses that wait for their point.

    Example:
        >>> curve = LossCurve(stride=2)
        >>> for step, loss in enumerate((4.0, 2.0, 1.0), start=1):
        ...     curve.add(step, loss)
        >>> curve.points
        [(2, 3.0)]
    """

    points: list[tuple[int, float]] = field(default_factory=list)
    stride: int = 1
    waiting: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float) -> None:
        """Take in one loss."""
        self.waiting.append(loss)
        if len(self.waiting) >= self.stride:
            self.points.append((step, sum(self.waiting) / len(self.waiting)))
            self.waiting = []
        if len(self.points) > LIMIT:
            self._halve()

    def _halve(self) -> None:
        """Merge neighbours; an odd last point stays as it is."""
        pairs = zip(self.points[::2], self.points[1::2], strict=False)
        last = self.points[-1:] if len(self.points) % 2 else []
        self.points = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs] + last
        self.stride *= 2

    def to_plain(self) -> dict[str, Any]:
        """Return plain data."""
        return {"points": [list(p) for p in self.points], "stride": self.stride, "waiting": list(self.waiting)}

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Self:
        """Take back what `to_plain` returned."""
        return cls([(int(step), float(loss)) for step, loss in data["points"]], data["stride"], list(data["waiting"]))
