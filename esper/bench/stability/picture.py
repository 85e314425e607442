"""`stability.png`: original loss and drift, graft by graft."""

from pathlib import Path
from statistics import fmean
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esper.bench.rows import Row
from esper.bench.stability.parts import CONDITIONS, GRAFTS
from esper.bench.stability.run import Results
from esper.bench.stability.summary import changes
from esper.files import replacing
from esper.leyline.errors import OutputError
from esper.nissa.palette import DECISION, FAINT, GROWN, INK

_SIZE, _DPI = (9.0, 6.4), 200
_COLOURS: Final = {"plain": INK, "rehearsed": DECISION, "gated": GROWN}
_LIMITS: Final = (5.0, 0.05)
_ROWS: Final = ("original loss, rise in %", "drift behind the grafts")


def draw(results: Results, path: Path) -> bool:
    """Draw the new domain, where there are grafts; return whether there was anything to draw.

    Raises:
        OutputError: the file cannot be written.
    """
    if not any(results.of(GRAFTS, *names) for names in CONDITIONS):
        return False
    try:
        with replacing(path) as file:
            figure_of(results).savefig(file, format="png", dpi=_DPI)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose a writable folder.") from error
    return True


def figure_of(results: Results) -> Figure:
    """Return the picture: a column for each domain and host, the original loss above, the drift below."""
    columns = [(domain, host) for domain in ("new", "same") for host in ("frozen", "live")]
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(columns), sharex=True, sharey="row")
    for column, (domain, host) in enumerate(columns):
        for row in (0, 1):
            _tidy(grid[row][column], row, column)
        for names in CONDITIONS:
            if names[:2] == (domain, host):
                _lines(grid[0][column], grid[1][column], names[2], results.of(GRAFTS, *names))
        grid[0][column].set_title(f"{domain} domain, {host} host", fontsize=9, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _lines(above: Axes, below: Axes, child: str, rows: list[Row]) -> None:
    """Draw every seed faintly, and their mean."""
    losses = [[100 * change for change in changes(row)] for row in rows]
    drifts = [[entry["downstream"] for entry in row["history"]] for row in rows]
    for axes, series in ((above, losses), (below, drifts)):
        for one in series:
            axes.plot(one, color=_COLOURS[child], linewidth=0.7, alpha=0.35)
        if series:
            mean = [fmean(step) for step in zip(*series, strict=True)]
            axes.plot(mean, color=_COLOURS[child], linewidth=1.8, label=child)


def _tidy(axes: Axes, row: int, column: int) -> None:
    axes.axhline(_LIMITS[row], color=FAINT, linewidth=1, linestyle="--", label="limit" if column == 0 else None)
    axes.tick_params(labelsize=8, color=FAINT)
    if column == 0:
        axes.set_ylabel(_ROWS[row], fontsize=8.5)
    if row == 1:
        axes.set_xlabel("grafts", fontsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
