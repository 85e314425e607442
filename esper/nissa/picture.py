"""`growth.png`: losses, the life of every seed, and parameters over the steps of a run."""

import math
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from esper.leyline.errors import OutputError
from esper.leyline.states import IN_PROGRESS, SeedState
from esper.nissa.chronicle import Chronicle
from esper.nissa.lanes import choose_lanes, draw_lanes, stage_legend
from esper.nissa.palette import DECISION, FAINT, GROWN, HOST, INK, STAGES, TRAIN
from esper.nissa.summary import headline

Points = list[tuple[int, float]]

_WIDTH, _DPI = 9.0, 200
_ORDER = {state: rank for rank, state in enumerate(SeedState)}


def draw(chronicle: Chronicle, path: str | Path, *, twin: Chronicle | None = None, title: str = "") -> Path:
    """Draw a run.

    Args:
        chronicle: the run.
        path: PNG file to write.
        twin: the same run without growth; its decision loss is drawn dashed.
        title: name of the run, put before the headline.

    Raises:
        OutputError: the file cannot be written.
    """
    target = Path(path)
    figure = make_figure(chronicle, twin=twin, title=title)
    try:
        # A file that is there is whole, also when a run is killed while it draws.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        figure.savefig(partial, format="png", dpi=_DPI)
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; choose a writable folder.") from error
    return target


def make_figure(chronicle: Chronicle, *, twin: Chronicle | None = None, title: str = "") -> Figure:
    """Return the picture of a run as a figure."""
    lanes = choose_lanes(chronicle)
    heights = [2.9, 0.19 * len(lanes.lives) + 0.1, 1.0] if lanes.lives else [2.9, 1.0]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    end = max(1, chronicle.steps)
    _draw_losses(rows[0], chronicle, twin)
    if lanes.lives:
        draw_lanes(rows[1], lanes, end)
    _draw_parameters(rows[-1], chronicle, end)
    for axes in rows:
        _tidy(axes)
    rows[-1].set_xlabel("training steps", fontsize=9)
    rows[-1].set_xlim(0, end)
    told = headline(chronicle, twin)
    figure.suptitle(fill(f"{title}: {told}" if title else told, 120), fontsize=9.5, color=INK)
    if lanes.lives:
        figure.legend(handles=stage_legend(lanes), loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return figure


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(axis="x", labelsize=8, color=FAINT)


def _draw_losses(axes: Axes, chronicle: Chronicle, twin: Chronicle | None) -> None:
    raw, decision = chronicle.train_losses, chronicle.decision_losses
    smooth = smoothed(raw)
    for start, stop, state in bands(chronicle):
        axes.axvspan(start, stop, color=STAGES[state], alpha=0.16, linewidth=0)
    _line(axes, raw, color=TRAIN, linewidth=0.6, alpha=0.3)
    _line(axes, smooth, color=TRAIN, linewidth=1.4, label="training")
    other = twin.decision_losses if twin is not None else []
    _line(axes, other, color=INK, linewidth=1.4, linestyle="--", label="decision part, same run without growth")
    _line(axes, decision, color=DECISION, linewidth=1.6, marker="o", markersize=3, clip_on=False, label="decision part")
    _limit(axes, smooth, decision + other, chronicle.steps)
    axes.set_ylabel("loss", fontsize=9)
    axes.tick_params(axis="y", labelsize=8, color=FAINT)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=8, frameon=False)


def _line(axes: Axes, points: Points, **style: object) -> None:
    finite = [(x, y if math.isfinite(y) else math.nan) for x, y in points]
    if any(not math.isnan(y) for _, y in finite):
        axes.plot([x for x, _ in finite], [y for _, y in finite], **style)  # type: ignore[arg-type]


def _limit(axes: Axes, smooth: Points, decision: Points, steps: int) -> None:
    """Fit the axis to what comes after the first steps, whose losses would flatten the rest."""
    late = [y for x, y in smooth if x >= 0.06 * steps] + [y for _, y in decision]
    shown = [y for y in late if math.isfinite(y)]
    if shown and max(shown) > min(shown):
        room = max(shown) - min(shown)
        axes.set_ylim(min(shown) - 0.08 * room, max(shown) + 0.08 * room)


def smoothed(points: Points) -> Points:
    """Return a centred moving average over about a thirtieth of the curve; what is not finite stays a gap.

    Example:
        >>> smoothed([(1, 3.0), (2, 1.0), (3, 2.0)])
        [(1, 2.0), (2, 2.0), (3, 1.5)]
    """
    reach = max(1, len(points) // 60)
    result = []
    for place, (step, loss) in enumerate(points):
        near = [y for _, y in points[max(0, place - reach) : place + reach + 1] if math.isfinite(y)]
        result.append((step, sum(near) / len(near) if math.isfinite(loss) else math.nan))
    return result


def bands(chronicle: Chronicle) -> list[tuple[int, int, SeedState]]:
    """Return when adaptations were under way, each stretch with the stage that most of them were in.

    Example:
        >>> bands(Chronicle())
        []
    """
    end = chronicle.steps
    stages = [s for life in chronicle.lives() for s in life.stages if s.state in IN_PROGRESS]
    spans = [(s.start, end if s.end is None else s.end, s.state) for s in stages]
    edges = sorted({edge for start, stop, _ in spans for edge in (start, stop)})
    found: list[tuple[int, int, SeedState]] = []
    for left, right in pairwise(edges):
        counts = Counter(state for start, stop, state in spans if start <= left and stop >= right)
        if counts:
            # Of two stages with as many seeds the later one is shown.
            found.append((left, right, max(counts, key=lambda state: (counts[state], _ORDER[state]))))
    return found


def _draw_parameters(axes: Axes, chronicle: Chronicle, end: int) -> None:
    host = chronicle.host_params
    points = [(0, 0), *chronicle.added_params_over_time]
    points.append((end, points[-1][1]))
    steps = [step for step, _ in points]
    total = [host + added for _, added in points]
    axes.fill_between(steps, 0, host, step="post", color=HOST, linewidth=0)
    axes.fill_between(steps, host, total, step="post", color=STAGES[SeedState.GRAFTING], linewidth=0)
    kept = [(0, 0), *chronicle.kept_params_over_time]
    kept.append((end, kept[-1][1]))
    height = [host + added for _, added in kept]
    axes.fill_between([step for step, _ in kept], host, height, step="post", color=GROWN, linewidth=0)
    axes.set_ylim(0, max(1, *total) * 1.3)
    axes.set_ylabel("parameters", fontsize=9)
    axes.yaxis.set_major_formatter(_short)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(axis="y", labelsize=8, color=FAINT)
    added = points[-1][1]
    share = f" ({100 * added / host:+.1f} %)" if host else ""
    axes.annotate(f"{added:,} grown{share}", (0.995, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=8)
    trial = " (orange: on trial)" if max(total) > host else ""
    axes.annotate(f"{host:,} host{trial}", (0.005, 0.12), xycoords="axes fraction", fontsize=8)


def _short(value: float, _position: object = None) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
