"""Tables and picture show every arm, in any terminal."""

from io import StringIO

import pytest
from rich.console import Console

from esper.bench.arms import ARMS, GROWN
from esper.bench.picture import figure_of
from esper.bench.results import Results
from esper.bench.table import markdown, terminal
from tests.bench.samples import plain_row

RESULTS = Results(
    "mine", {(arm, s): plain_row(1 + 0.1 * n + 0.01 * s * n) for n, arm in enumerate(ARMS) for s in range(5)}
)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_terminal_cuts_a_row(width: int) -> None:
    out = StringIO()
    Console(file=out, width=width).print(terminal(RESULTS, width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in out.getvalue()
    shown = "".join(line[: 24 if width > 50 else 14].strip() for line in lines)
    assert all(arm in shown for arm in ARMS)
    assert ("parameters" in out.getvalue()) is (width >= 90)


def test_markdown_has_as_many_cells_in_every_line() -> None:
    table = [line for line in markdown(RESULTS, "x").splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(ARMS) and len({line.count("|") for line in table}) == 1


def test_the_picture_shows_each_gain_with_its_interval_and_seeds() -> None:
    (axes,) = figure_of(RESULTS).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [arm for arm in ARMS if arm != RESULTS.reference]
    gain = RESULTS.gain(GROWN, RESULTS.reference)
    assert gain is not None
    ends = [line.get_xdata() for line in axes.get_lines()[1:]]
    assert list(ends[0]) == [gain.lower, gain.upper] and len(ends) == len(names)
    assert len(axes.collections[0].get_offsets()) == 5
