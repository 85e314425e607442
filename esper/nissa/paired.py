"""The paired interval of a difference of two runs, measured on the same samples."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

MIN_SAMPLES = 5
"""Fewest pairs that an interval is given for."""


class Interval(NamedTuple):
    """A mean and its two-sided interval, over n pairs."""

    mean: float
    lower: float
    upper: float
    n: int


def paired_interval(
    without: Sequence[float] | None, with_growth: Sequence[float] | None, confidence: float = 0.95
) -> Interval | None:
    """Return the interval of the mean of `without - with_growth`, or None where the samples do not allow one.

    `mean ± t * sd / sqrt(n)`, with t the quantile of Student's distribution with n - 1 degrees of freedom.

    Args:
        without: [n] losses of the run without growth.
        with_growth: [n] losses of the grown run on the same samples, in the same order.
        confidence: two-sided.

    Example:
        >>> interval = paired_interval([2.0, 3.1, 2.0, 3.0, 2.0], [1.0, 2.0, 1.0, 2.0, 1.1])
        >>> round(interval.mean, 3), round(interval.lower, 3), round(interval.upper, 3)
        (1.0, 0.912, 1.088)
    """
    if without is None or with_growth is None or len(without) != len(with_growth):
        return None
    gains = [a - b for a, b in zip(without, with_growth, strict=True)]
    if len(gains) < MIN_SAMPLES or not all(map(math.isfinite, gains)):
        return None
    half = student_quantile((1 + confidence) / 2, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5
    mean = fmean(gains)
    return Interval(mean, mean - half, mean + half, len(gains))


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution; within .5 % from four degrees of freedom on, up to p = .975.

    Cornish-Fisher expansion, Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.5.

    Example:
        >>> round(student_quantile(0.975, 10), 3)
        2.228
    """
    z = NormalDist().inv_cdf(probability)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
