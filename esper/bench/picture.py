"""`growth.png`: what each arm gains, with its interval and every seed."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from esper.bench.arms import ARMS, GROWN, OFF, WIDE
from esper.bench.results import Results
from esper.bench.verdict import verdict
from esper.files import replacing
from esper.leyline.errors import OutputError
from esper.nissa.palette import DECISION, FAINT, INK
from esper.nissa.palette import GROWN as GREEN

_WIDTH, _DPI = 9.0, 200
_NAMES: Final = {WIDE: "the static wide net at equal compute", OFF: "the host alone at equal compute"}


def draw(results: Results, path: Path) -> None:
    """Draw the gains; nothing is drawn where none is known.

    Raises:
        OutputError: the file cannot be written.
    """
    if not _shown(results):
        return
    try:
        with replacing(path) as file:
            figure_of(results).savefig(file, format="png", dpi=_DPI)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose a writable folder.") from error


def _shown(results: Results) -> list[str]:
    return [arm for arm in results.arms if results.gain(arm, results.reference)]


def figure_of(results: Results) -> Figure:
    """Return the picture as a figure."""
    arms = _shown(results)
    figure = Figure(figsize=(_WIDTH, 1.9 + 0.42 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(0, color=FAINT, linewidth=1)
    for place, arm in enumerate(arms):
        _draw_arm(axes, results, arm, place)
    _tidy(axes, results, arms)
    figure.suptitle(fill(verdict(results), 112), fontsize=9.5, color=INK)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_arm(axes: Axes, results: Results, arm: str, place: int) -> None:
    gain = results.gain(arm, results.reference)
    assert gain is not None and results.reference is not None
    colour = _colour(arm)
    seeds = list(results.gains(arm, results.reference).values())
    axes.scatter(seeds, [place] * len(seeds), s=14, color=colour, alpha=0.4, linewidths=0)
    if gain.known:
        axes.plot([gain.lower, gain.upper], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.scatter([gain.mean], [place], s=46, marker="D", color=colour, zorder=3, edgecolors="white", linewidths=0.8)
    _say_beside(axes, place, gain.told(sign=True), f"compute {results.compute(arm):.2f}")


def _say_beside(axes: Axes, place: int, *words: str) -> None:
    """Write words in columns to the right of the axes, at fixed distances, whatever the width of the axes."""
    for column, word in enumerate(words):
        axes.annotate(
            word,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(8 + 112 * column, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )


def _colour(arm: str) -> str:
    if arm == GROWN:
        return GREEN
    return DECISION if ARMS[arm].grows else INK


def _tidy(axes: Axes, results: Results, arms: Sequence[str]) -> None:
    axes.set_yticks(range(len(arms)), arms, fontsize=9)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    for label, arm in zip(axes.get_yticklabels(), arms, strict=True):
        label.set_fontweight("bold" if arm == GROWN else "normal")
    name = _NAMES.get(results.reference or "", "nothing")
    axes.set_xlabel(f"gain in report loss on {name}; to the right is better", fontsize=9)
    axes.tick_params(axis="x", labelsize=8, color=FAINT)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _legend() -> list[Line2D]:
    named = (("the live trial", GREEN), ("other ways to grow", DECISION), ("static", INK))
    arms = [Line2D([], [], color=c, marker="D", markersize=5, linewidth=2.2, label=name) for name, c in named]
    dot = Line2D([], [], color=FAINT, marker="o", markersize=4, linewidth=0, label="one seed")
    return [*arms, dot]
