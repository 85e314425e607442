"""The share that every child had in its layer's output, over the steps of a run; of bounded length."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

LIMIT = 400
"""Most points that a ramp keeps."""


@dataclass
class Ramp:
    """Alpha of one seed wherever it changed; at most `LIMIT` points.

    Args:
        points: training steps done, and alpha from then on.
        stride: steps within which only the last change is kept; doubles whenever the ramp is full.

    Example:
        >>> ramp = Ramp()
        >>> for step, alpha in enumerate((0.0, 0.5, 1.0, 1.0), start=10):
        ...     ramp.add(step, alpha)
        >>> ramp.points
        [(10, 0.0), (11, 0.5), (12, 1.0)]
    """

    points: list[tuple[int, float]] = field(default_factory=list)
    stride: int = 1

    def add(self, step: int, alpha: float) -> None:
        """Take in the alpha of one step; what comes again from an earlier step replaces what came after it."""
        while self.points and self.points[-1][0] >= step:
            self.points.pop()
        if self.points and self.points[-1][1] == alpha:
            return
        if len(self.points) > 1 and step - self.points[-2][0] <= self.stride:
            self.points.pop()
        self.points.append((step, alpha))
        while len(self.points) > LIMIT:
            self._thin()

    def _thin(self) -> None:
        told, self.points = self.points, []
        self.stride *= 2
        for step, alpha in told:
            self.add(step, alpha)


@dataclass
class Ramps:
    """The ramps of all seeds that held a child.

    Args:
        of: ramp by seed id.

    Example:
        >>> ramps = Ramps()
        >>> ramps.note(10, {"net.0#0.0": 0.25})
        >>> ramps.note(11, {})
        >>> ramps.of["net.0#0.0"].points
        [(10, 0.25), (11, 0.0)]
    """

    of: dict[str, Ramp] = field(default_factory=dict)

    def note(self, step: int, alphas: Mapping[str, float]) -> None:
        """Take in the alphas of all children there are; a seed whose child is gone has none in the output.

        Args:
            step: training steps done.
            alphas: share by seed id, 0 to 1.
        """
        # A fit that begins again before a child's first step knows nothing of it.
        self.of = {seed: ramp for seed, ramp in self.of.items() if seed in alphas or ramp.points[0][0] < step}
        for seed in [*self.of, *(seed for seed in alphas if seed not in self.of)]:
            self.of.setdefault(seed, Ramp()).add(step, alphas.get(seed, 0.0))

    def until(self, step: float) -> Self:
        """Return what was noted up to a step."""
        kept = {seed: [p for p in ramp.points if p[0] <= step] for seed, ramp in self.of.items()}
        return type(self)({seed: Ramp(points, self.of[seed].stride) for seed, points in kept.items() if points})

    def to_plain(self) -> dict[str, Any]:
        """Return plain data."""
        return {seed: {"points": [list(p) for p in r.points], "stride": r.stride} for seed, r in self.of.items()}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """Take back what `to_plain` returned."""
        return cls(
            {
                seed: Ramp([(int(step), float(alpha)) for step, alpha in ramp["points"]], int(ramp["stride"]))
                for seed, ramp in data.items()
            }
        )
