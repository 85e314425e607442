"""What growth cost and what it was worth: parameters, measured gains, several runs beside each other."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from matplotlib.typing import LineStyleType

from esper.leyline.states import SeedState
from esper.nissa.page.growth_charts import MOST_ROWS, fit, legend, place, steps_axis, thinned
from esper.nissa.page.runs import Run
from esper.nissa.page.svg import Shown, Table, show
from esper.nissa.palette import FAINT, GROWN, HOST, INK, STAGES
from esper.nissa.summary import GraftLine, gain_scale, graft_lines, number

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours of runs beside each other, after Okabe and Ito."""


def parameters(run: Run, key: str) -> Shown:
    """Return the parameters of host, children on trial, and what was kept."""
    chronicle = run.chronicle
    host, end = chronicle.host_params, max(1, chronicle.steps)
    added = _to_the_end(chronicle.added_params_over_time, end)
    kept = _to_the_end(chronicle.kept_params_over_time, end)

    def draw(axes: Axes, _width: float) -> None:
        axes.fill_between([s for s, _ in added], host, [host + n for _, n in added], **_area("GRAFTING"))  # type: ignore[arg-type]
        axes.fill_between([s for s, _ in kept], host, [host + n for _, n in kept], **_area("FOSSILIZED"))  # type: ignore[arg-type]
        axes.fill_between([0, end], 0, host, color=HOST, linewidth=0)
        axes.set_ylim(0, max(1, *(host + n for _, n in added)) * 1.12)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        steps_axis(axes, end, "parameters")
        legend(
            axes,
            [
                Patch(color=HOST, label="host"),
                Patch(color=GROWN, label="kept"),
                Patch(color=STAGES[SeedState.GRAFTING], label="on trial"),
            ],
        )

    caption = "Parameters of the network over the run: the host, what was kept, and children that were on trial."
    rows, note = thinned(added)
    cells = [(f"{step:,}", f"{host:,}", f"{int(n):,}", f"{host + int(n):,}") for step, n in rows]
    table = Table(("step", "host", "children", "together"), cells, note)
    return show(f"{key}-parameters", "Parameters", caption, table, 2.6, draw)


def _area(state: str) -> dict[str, object]:
    return {"step": "post", "linewidth": 0, "color": STAGES[SeedState(state)]}


def _to_the_end(points: Sequence[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    told = [(0, 0), *points]
    return [*told, (end, told[-1][1])] if told[-1][0] < end else told


def gains(run: Run, key: str) -> Shown | None:
    """Return the measured gain of every adaptation with its interval and its price; None if none was measured."""
    lines = [line for line in graft_lines(run.chronicle) if line.gain is not None][:MOST_ROWS]
    if not lines:
        return None

    def draw(axes: Axes, width: float) -> None:
        axes.axvline(0, color=FAINT, linewidth=0.8)
        for row, line in enumerate(lines):
            _gain(axes, row, line, width)
        axes.set_ylim(len(lines) - 0.5, -0.9)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("gain in decision loss", fontsize=9)
        legend(axes, _gain_handles())

    caption = (
        "The evidence: what the decision loss rises by when a child is switched off, on the same samples, with its "
        "interval. A child earns its place if the whole interval is right of its price."
    )
    table = Table(("child", "gain", "at least", "at most", "price", "samples", "outcome"), _gain_rows(lines))
    return show(f"{key}-gains", "Gain and price of every adaptation", caption, table, 0.42 * len(lines) + 1.2, draw)


def _gain(axes: Axes, row: int, line: GraftLine, width: float) -> None:
    assert line.gain is not None and line.lower is not None and line.upper is not None
    colour = GROWN if line.kept else STAGES[SeedState.CULLED]
    low = line.lower if math.isfinite(line.lower) else line.gain
    high = line.upper if math.isfinite(line.upper) else line.gain
    axes.plot([low, high], [row, row], color=colour, linewidth=2)
    axes.plot([line.gain], [row], "D" if line.kept else "o", color=colour, markersize=6)
    axes.plot([line.price], [row], "|", color=INK, markersize=11, markeredgewidth=1.6)
    text = place(line.seed_id, line.blueprint, width)
    # Names stand over the bars from the left edge of the axes, whatever the gains; lines stop at them.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    at = {"xy": (0, row - 0.24), "xycoords": ("axes fraction", "data")}
    axes.annotate(text, fontsize=8.5, va="bottom", parse_math=False, bbox=box, **at)  # type: ignore[arg-type]


def _gain_handles() -> list[Line2D | Patch]:
    lost = STAGES[SeedState.CULLED]
    return [
        Line2D([], [], marker="D", color=GROWN, label="kept"),
        Line2D([], [], marker="o", color=lost, label="removed"),
        Line2D([], [], marker="|", linestyle="", color=INK, markersize=10, label="price"),
    ]


def _gain_rows(lines: Sequence[GraftLine]) -> list[tuple[str, ...]]:
    scale = gain_scale(lines)
    return [
        (
            f"{line.seed_id} · {line.blueprint}",
            *(number(x, scale) if x is not None else "–" for x in (line.gain, line.lower, line.upper)),
            number(line.price),
            f"{line.samples:,}",
            line.outcome.lower().replace("_", " "),
        )
        for line in lines
    ]


def comparison(runs: Sequence[Run]) -> Shown | None:
    """Return the decision losses of several runs and their twins in one figure; None if fewer than two have any."""
    told = [line for index, run in enumerate(runs) for line in _lines(index, run) if line.points]
    if len(told) < 2:
        return None
    end = max(line.points[-1][0] for line in told)

    def draw(axes: Axes, _width: float) -> None:
        for line in told:
            xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
            axes.plot(xs, ys, color=line.colour, linestyle=line.style, linewidth=1.5)
        fit(axes, [p for line in told for p in line.points if p[0] >= 0.06 * end])
        steps_axis(axes, end, "decision loss")
        legend(axes, [Line2D([], [], color=x.colour, linestyle=x.style, label=x.title) for x in told])

    caption = "Loss on the decision part at every boundary, all runs; dashed: the same run without growth."
    rows = [(x.title, f"{step:,}", number(loss)) for x in told for step, loss in thinned(x.points)[0]]
    return show("comparison", "Decision loss of all runs", caption, Table(("run", "step", "loss"), rows), 3.6, draw)


class _Line(NamedTuple):
    title: str
    points: list[tuple[int, float]]
    colour: str
    style: LineStyleType


def _lines(index: int, run: Run) -> Iterator[_Line]:
    colour, again = SERIES[index % len(SERIES)], index // len(SERIES) % 2
    yield _Line(run.title, run.chronicle.decision_losses, colour, ("-", "-.")[again])
    if run.twin is not None:
        yield _Line(f"{run.title}, without growth", run.twin.decision_losses, colour, ("--", ":")[again])
