"""How health moves from boundary to boundary: the slope of a line through the last ones.

Shapes: W boundaries, R rows of health, K followed metrics.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper.kasmina.telemetry import COLUMN

WINDOW: Final = 8
"""Boundaries that a trend looks back on."""
FOLLOWED = MappingProxyType(
    {"gradient_norm": True, "dead_node_ratio": False, "effective_rank": True, "growth_potential": True}
)
"""Metrics that have a trend, and whether it is relative to their mean in the window."""
TREND_METRICS = tuple(f"{name}_trend" for name in FOLLOWED)

_COLUMNS = [COLUMN[name] for name in FOLLOWED]
_RELATIVE = np.array(list(FOLLOWED.values()))


def no_history(rows: int) -> NDArray[np.float32]:
    """Return [W, R, K] for a layer that has seen no boundary: NaN everywhere."""
    return np.full((WINDOW, rows, len(FOLLOWED)), np.nan, dtype=np.float32)


def remember(history_WRK: NDArray[np.float32], health_RM: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the history with one more boundary at its end, unless nothing was sampled before that boundary."""
    if np.isnan(health_RM).all():
        return history_WRK
    return np.concatenate([history_WRK[1:], health_RM[None, :, _COLUMNS]])


def slopes(histories: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return [sum of R, K]: the trends of some layers, one below the other.

    Least squares over the boundaries b of the window at which a metric v was sampled:
    `slope = sum_b (b - mean b) v_b / sum_b (b - mean b)^2`, and `slope / |mean v|` for the metrics that are followed
    relative to their size. The unit is per boundary. 0 until there are two such boundaries.

    Example:
        >>> history = no_history(1)
        >>> history[-3:, 0, 1] = [0.1, 0.2, 0.3]
        >>> slopes([history])[0].round(3).tolist()
        [0.0, 0.10000000149011612, 0.0, 0.0]
    """
    if not histories:
        return np.zeros((0, len(FOLLOWED)), dtype=np.float32)
    v_WRK = np.concatenate(histories, axis=1).astype(np.float64)
    seen_WRK = np.isfinite(v_WRK)
    v_WRK = np.where(seen_WRK, v_WRK, 0.0)
    count_RK = np.maximum(seen_WRK.sum(0), 1)
    b_WRK = seen_WRK * np.arange(WINDOW, dtype=np.float64)[:, None, None]
    b_WRK = np.where(seen_WRK, b_WRK - b_WRK.sum(0) / count_RK, 0.0)
    spread_RK, size_RK = np.square(b_WRK).sum(0), np.abs(v_WRK.sum(0)) / count_RK
    slope_RK = _ratio((b_WRK * v_WRK).sum(0), spread_RK)
    return np.where(_RELATIVE, _ratio(slope_RK, size_RK), slope_RK).astype(np.float32)


def _ratio(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(over, under, out=np.zeros_like(over), where=under > 0)
