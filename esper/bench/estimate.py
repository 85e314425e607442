"""A mean over seeds and its interval."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper.nissa.summary import number

LEAST: Final = 5
"""Fewest seeds for a bootstrap; with fewer the interval is Student's t."""

CONFIDENCE: Final = 0.95
BOOTSTRAP, STUDENT, NONE = "bootstrap", "Student's t", "none"

_RESAMPLES: Final = 9999
_STUDENT: Final = {2: 12.706, 3: 4.303, 4: 3.182}
"""Quantile .975 of Student's t for so many values."""


class Estimate(NamedTuple):
    """A mean over seeds and its two-sided 95 % interval.

    Args:
        mean: the mean; not a number where a run diverged.
        lower: lower end; not a number without an interval.
        upper: upper end.
        n: seeds.
        wins: values above 0.
        method: where the interval comes from: `bootstrap`, `Student's t`, or `none` for a single seed.
    """

    mean: float
    lower: float
    upper: float
    n: int
    wins: int
    method: str

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimate the mean of some values, one a seed.

        Differences of the same seeds make the interval a paired one.

        Example:
            >>> found = Estimate.of([1.0, 2.0, 3.0])
            >>> found.method, round(found.lower, 3), round(found.upper, 3)
            ("Student's t", -0.484, 4.484)
        """
        n, wins = len(values), sum(value > 0 for value in values)
        if n < 2 or not all(map(math.isfinite, values)):
            return cls(fmean(values) if values else math.nan, math.nan, math.nan, n, wins, NONE)
        lower, upper = _bootstrap(values) if n >= LEAST else _student(values)
        return cls(fmean(values), lower, upper, n, wins, BOOTSTRAP if n >= LEAST else STUDENT)

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.lower)

    def told(self, *, sign: bool = False) -> str:
        """Return it as text: the mean, and the interval in brackets.

        Example:
            >>> Estimate(0.0642, 0.028, 0.0841, 5, 5, "bootstrap").told(sign=True)
            '+.064 [+.028, +.084]'
        """
        if not math.isfinite(self.mean):
            return "diverged"
        scale = self.upper - self.lower if self.known and self.upper > self.lower else self.mean
        mean, *ends = (_signed(x, scale) if sign else number(x, scale) for x in (self.mean, self.lower, self.upper))
        return f"{mean} [{', '.join(ends)}]" if self.known else mean


def _signed(value: float, scale: float) -> str:
    text = number(value, scale)
    return text if text.startswith("-") or float(text) == 0 else f"+{text}"


def _student(values: Sequence[float]) -> tuple[float, float]:
    n, mean = len(values), fmean(values)
    half = _STUDENT[n] * stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the studentised interval, from the same resamples whenever asked.

    Each of the resamples gives `t = (mean* - mean) / se*`, with its own mean and standard error; the interval is `mean
    - q se` with q the quantiles of t. Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 12. The
    percentile and BCa intervals are too narrow for so few values: `docs/bench.md` has what was measured.
    """
    sample = np.asarray(values, dtype=np.float64)
    error = _errors(sample[None])[0]
    if error == 0:
        return values[0], values[0]
    drawn = sample[np.random.default_rng(0).integers(0, len(sample), (_RESAMPLES, len(sample)))]
    off, errors = drawn.mean(1) - sample.mean(), _errors(drawn)
    # A resample of one value many times over has no error of its own.
    t = np.divide(off, errors, out=np.copysign(np.inf, off), where=errors > 1e-9 * error)
    low, high = np.quantile(t, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="nearest")
    return float(sample.mean() - high * error), float(sample.mean() - low * error)


def _errors(samples_RN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of the mean of each row, [R]."""
    found: NDArray[np.float64] = samples_RN.std(axis=1, ddof=1) / math.sqrt(samples_RN.shape[1])
    return found
