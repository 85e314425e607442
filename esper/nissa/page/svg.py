"""Figures as SVG inside a page: text stays text, colours follow the page, nothing is loaded."""

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import NamedTuple

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from esper.nissa.palette import DECISION, FAINT, INK, TRAIN

WIDTHS = {"wide": 8.4, "narrow": 4.3}
"""Width in inches of the figure for a desk or for paper, and of the one for a phone."""

VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    TRAIN: "--train",
    DECISION: "--decision",
    "#000000": "--ink",
    "#FFFFFF": "--paper",
}
"""Colours that differ between the light and the dark page, and the variable of the style sheet."""

_BARE = {"Creator": None, "Date": None, "Format": None, "Type": None}


class Table(NamedTuple):
    """The numbers of a figure.

    Args:
        columns: titles.
        rows: as many cells each.
        note: what was left out; empty for nothing.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


class Shown(NamedTuple):
    """A figure of the page.

    Args:
        key: id in the page.
        title: what it shows, in a few words.
        caption: how to read it.
        drawings: SVG by the name of its width.
        table: its numbers.
    """

    key: str
    title: str
    caption: str
    drawings: dict[str, Markup]
    table: Table


def show(key: str, title: str, caption: str, table: Table, height: float, draw: Callable[[Axes, float], None]) -> Shown:
    """Draw a figure once for every width.

    Args:
        key: id in the page.
        title: what it shows.
        caption: how to read it.
        table: its numbers.
        height: of the figure, in inches.
        draw: draws on axes, given the figure's width in inches.
    """
    drawings = {}
    for name, width in WIDTHS.items():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        _tidy(axes)
        draw(axes, width)
        drawings[name] = inline(figure, f"{key}-{name}", title, caption)
    return Shown(key, title, caption, drawings, table)


def _tidy(axes: Axes) -> None:
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(labelsize=9, color=FAINT)


def inline(figure: Figure, key: str, title: str, words: str) -> Markup:
    """Return a figure as an `svg` element with a title and a description.

    Args:
        figure: the figure.
        key: put before every id, because a page has several figures.
        title: accessible name.
        words: accessible description.
    """
    # Text as text: it can be searched, copied and read aloud, and takes the font of the page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "path.simplify_threshold": 0.5}):
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        out = StringIO()
        figure.savefig(out, format="svg", metadata=_BARE)
    body = out.getvalue().partition("<svg")[2]
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="([\d. ]+)"', head)
    assert box is not None
    names = f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-words">{escape(words)}</desc>'
    opening = f'<svg role="img" aria-labelledby="{key}-title" aria-describedby="{key}-words" viewBox="{box[1]}">'
    return Markup(opening + names + _own(rest, key))


def _own(body: str, key: str) -> str:
    """Make ids those of this figure and colours those of the page."""
    # Its style element would hold for the whole page; the style sheet says the same for figures alone.
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(?<= id=")', f"{key}-", body)
    body = re.sub(r'(?<=url\(#)|(?<=xlink:href="#)', f"{key}-", body).replace("xlink:href", "href")
    body = re.sub(r"(font(?:-family)?: [^;\"]*?)'[^;\"]*sans-serif", r"\1inherit", body)
    for colour, variable in VARIABLES.items():
        body = re.sub(rf"(?<=: ){colour}\b", f"var({variable})", body, flags=re.IGNORECASE)
    return body
