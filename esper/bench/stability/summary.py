"""What rows come to: means over seeds, and the worst of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from esper.bench.rows import Row
from esper.bench.stability.defects import DEFECTS, finding
from esper.bench.stability.efficiency import FULL, SHARES, Point, Size, size_at


class Kept(NamedTuple):
    """What became of the original task in one condition: means over seeds after the last graft, and the worst of all.

    Args:
        loss: relative change of the original loss.
        worst_loss: the largest after any graft of any run.
        drift: behind the grafts.
        worst_drift: the largest after any graft of any run.
        upstream: the largest drift before the grafts.
        learned: what the loss on the trained domain fell by, in nats per byte.
    """

    loss: float
    worst_loss: float
    drift: float
    worst_drift: float
    upstream: float
    learned: float


def changes(row: Row) -> list[float]:
    """Return the relative change of the original loss after each graft, the state before the first one included."""
    before = row["history"][0]["original_loss"]
    return [entry["original_loss"] / before - 1 for entry in row["history"]]


def kept_by(rows: Sequence[Row]) -> Kept:
    """Return what rows of one condition come to; a loss or a drift that is not finite is infinitely bad."""
    entries = [entry for row in rows for entry in row["history"]]
    return Kept(
        fmean(_known(changes(row)[-1]) for row in rows),
        max(_known(change) for row in rows for change in changes(row)),
        fmean(row["history"][-1]["downstream"] for row in rows),
        max(entry["downstream"] for entry in entries),
        max(entry["upstream"] for entry in entries),
        fmean(row["history"][0]["trained_loss"] - row["history"][-1]["trained_loss"] for row in rows),
    )


def _known(value: float) -> float:
    return value if math.isfinite(value) else math.inf


class Mended(NamedTuple):
    """What became of one defect over seeds.

    Args:
        about: what was wrong.
        n: runs.
        gap: mean distance to the sound network.
        recovered: share of all gaps together that was made good.
        placed: runs with a child at the defect.
        right: runs with a child of the right kind there.
        resolved: runs in which the defect was resolved.
    """

    about: str
    n: int
    gap: float
    recovered: float
    placed: int
    right: int
    resolved: int


def mended(name: str, rows: Sequence[Row]) -> Mended:
    """Return what rows of one defect come to."""
    found = [finding(row, DEFECTS[name]) for row in rows]
    known = [each for each in found if math.isfinite(each.recovered)]
    counts = (sum(getattr(each, what) for each in found) for what in ("placed", "right", "resolved"))
    whole = sum(each.gap for each in known)
    recovered = sum(each.recovered * each.gap for each in known) / whole if known else math.nan
    return Mended(DEFECTS[name].about, len(found), fmean(each.gap for each in found), recovered, *counts)


def compared(rows: Mapping[str, Sequence[Row]]) -> Iterator[tuple[float, float, dict[str, Size]]]:
    """Yield, for each share of what full fine-tuning gains, that gain and the parameters that reach it by arm.

    Gains are means over the seeds; an arm that made no row is left out.
    """
    if not rows.get(FULL):
        return
    full = _mean_points(rows[FULL])
    most = max(point.gain for point in full)
    for share in SHARES:
        sizes = {arm: size_at(_mean_points(made), share * most) for arm, made in rows.items() if made}
        yield share, share * most, sizes | {FULL: Size(full[0].params)}


def _mean_points(rows: Sequence[Row]) -> list[Point]:
    """Return the points of an arm, with the mean gain over seeds."""
    sizes = zip(*(row["points"] for row in rows), strict=True)
    return [Point(found[0]["params"], fmean(point["gain"] for point in found)) for found in sizes]
