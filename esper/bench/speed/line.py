"""One measured thing: its value, its target, and what the bare thing beside it costs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What became of a target."""

    MET = "met"
    MISSED = "missed"
    NONE = "no target"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table.

    Args:
        what: what is measured.
        value: the measured value; None where it is not measured here.
        unit: of value, target and limit.
        target: most that is allowed, least where `at_least`; None for no target.
        at_least: whether the value must not be below its target.
        limit: what the bare thing beside it costs; None where there is none.
        of: what the bare thing is.
        why: why it is not measured here.
        numbers: everything else that was measured.

    Example:
        >>> Line(what="cached hit", value=0.5, unit="µs", target=10.0, limit=0.1, of="a dict lookup").verdict.value
        'met'
    """

    what: str
    value: float | None
    unit: str
    target: float | None = None
    at_least: bool = False
    limit: float | None = None
    of: str = ""
    why: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether the target is met."""
        if self.value is None:
            return Verdict.NOT_MEASURED
        if self.target is None:
            return Verdict.NONE
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return Verdict.MET if met else Verdict.MISSED

    def told(self, value: float | None) -> str:
        """Return a value of this line with its unit, to three digits; nothing for None."""
        return "" if value is None else f"{short(value)} {self.unit}".rstrip()

    def bound(self) -> str:
        """Return the target in words.

        Example:
            >>> Line(what="hits", value=100.0, unit="%", target=99.5, at_least=True).bound()
            'at least 99.5 %'
        """
        return "" if self.target is None else f"at {'least' if self.at_least else 'most'} {self.told(self.target)}"

    def plain(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "at_least": self.at_least,
            "limit": self.limit,
            "limit_of": self.of,
            "verdict": self.verdict.value,
            "why": self.why,
            "numbers": dict(self.numbers),
        }


def not_measured(what: str, unit: str, target: float | None, why: str) -> Line:
    """Return the line of what cannot be measured here, or was not asked for."""
    return Line(what=what, value=None, unit=unit, target=target, why=why)


def short(value: float) -> str:
    """Return a number with three digits, or all of those before the point.

    Example:
        >>> short(0.012345), short(1.2), short(99.5), short(123456.0), short(0.0)
        ('0.0123', '1.2', '99.5', '123,456', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
