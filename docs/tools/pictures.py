"""The drawings of the documentation, as SVG: `python docs/tools/pictures.py` writes them into docs/.

The life cycle is drawn from the one transition table, so every arrow of it is there and no other.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from esper.leyline.states import TARGET, TRANSITIONS, SeedCommand, SeedState
from esper.nissa.palette import FAINT, STAGES

DOCS: Final = Path(__file__).parents[1]

_STYLE: Final = """
text { font-family: ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; fill: #222; text-anchor: middle }
.name { font-size: 12.5px; font-weight: 600 }
.label { font-size: 10.5px; paint-order: stroke; stroke: #fff; stroke-width: 3px }
.box { fill: #fff; stroke: #56606b; stroke-width: 2.5 }
.arrow { fill: none; stroke: #56606b; stroke-width: 1.3 }
.head { fill: #56606b }
.ground { fill: #fff }
@media (prefers-color-scheme: dark) {
  text { fill: #e8eaed }
  .label { stroke: #1e2129 }
  .box, .ground { fill: #1e2129 }
  .box[style*="#000000"] { stroke: #e8eaed !important }
  .arrow { stroke: #a9b1bc }
  .head { fill: #a9b1bc }
}
"""


class Box(NamedTuple):
    """A rectangle with a name; a tall one is written from bottom to top.

    Args:
        name: what is written in it.
        x: left edge, in pixels.
        y: upper edge.
        width: in pixels.
        height: in pixels.
        colour: of its edge; empty takes that of the style sheet.
        note: a second, smaller line; empty for none.
    """

    name: str
    x: float
    y: float
    width: float
    height: float
    colour: str = ""
    note: str = ""

    @property
    def right(self) -> float:
        """Right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Lower edge."""
        return self.y + self.height

    @property
    def middle(self) -> tuple[float, float]:
        """Centre."""
        return self.x + self.width / 2, self.y + self.height / 2

    def svg(self) -> str:
        """Return it drawn."""
        (x, y), style = self.middle, f' style="stroke:{self.colour}"' if self.colour else ""
        shape = (
            f'<rect class="box"{style} x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6"/>'
        )
        turned = f' transform="rotate(-90 {x} {y})"' if self.height > 2 * self.width else ""
        lines = [f'<text class="name" x="{x}" y="{y + (-3 if self.note else 4.5)}"{turned}>{escape(self.name)}</text>']
        if self.note:
            lines.append(f'<text class="label" x="{x}" y="{y + 12}">{escape(self.note)}</text>')
        return f"<g data-box={quoteattr(self.name)}>{shape}{''.join(lines)}</g>"


class Arrow(NamedTuple):
    """A line of straight parts with a head at its end.

    Args:
        source: name of the box where it begins.
        target: name of the box where it ends.
        label: what is written beside it.
        points: its corners.
        at: centre of the label.
    """

    source: str
    target: str
    label: str
    points: tuple[tuple[float, float], ...]
    at: tuple[float, float]

    def svg(self) -> str:
        """Return it drawn."""
        path = "M" + " L".join(f"{x} {y}" for x, y in self.points)
        told = " ".join(
            f"data-{key}={quoteattr(value)}"
            for key, value in (("from", self.source), ("to", self.target), ("label", self.label))
        )
        label = (
            f'<text class="label" x="{self.at[0]}" y="{self.at[1]}">{escape(self.label)}</text>' if self.label else ""
        )
        return f'<g {told}><path class="arrow" d="{path}" marker-end="url(#head)"/>{label}</g>'


def drawing(title: str, words: str, width: float, height: float, boxes: list[Box], arrows: list[Arrow]) -> str:
    """Return a whole SVG file.

    Args:
        title: accessible name.
        words: accessible description.
        width: in pixels; it shrinks with the page.
        height: in pixels.
        boxes: what is in it.
        arrows: what connects them; they are drawn first, so that boxes cover their ends.
    """
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title words">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="words">{escape(words)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<defs>{head}<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect class="ground" width="{width}" height="{height}" rx="6"/>',
        *(arrow.svg() for arrow in arrows),
        *(box.svg() for box in boxes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


# --- the life cycle -------------------------------------------------------------------------------------------------

_ROW, _TOP, _LEFT, _WIDE, _HIGH = 60, 16, 150, 136, 32
_S: Final = SeedState
_COLUMN: Final = (
    *(_S.DORMANT, _S.GERMINATED, _S.LOADING, _S.TRAINING, _S.GRAFTING),
    *(_S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED),
)
"""The way of a graft that is kept, from top to bottom; the three other ends stand beside it."""


def _beside(state: SeedState, x: float, width: float, first: int, last: int) -> Box:
    top = _TOP + first * _ROW
    return Box(state.value, x, top, width, _TOP + last * _ROW + _HIGH - top, STAGES[state])


def _boxes() -> dict[SeedState, Box]:
    main = {
        state: Box(state.value, _LEFT, _TOP + row * _ROW, _WIDE, _HIGH, STAGES.get(state, FAINT))
        for row, state in enumerate(_COLUMN)
    }
    return main | {
        _S.CANCELLED: _beside(_S.CANCELLED, 4, 94, 1, 1),
        _S.ROLLED_BACK: _beside(_S.ROLLED_BACK, 8, 32, 2, 7),
        _S.CULLED: _beside(_S.CULLED, 400, 32, 2, 7),
    }


def _route(source: SeedState, target: SeedState, boxes: dict[SeedState, Box]) -> tuple[list[tuple[float, float]], ...]:
    """Return the corners of an arrow, and where its label stands."""
    a, b = boxes[source], boxes[target]
    (x, y), row = a.middle, _COLUMN.index(source) if source in _COLUMN else -1
    if target in (_S.ROLLED_BACK, _S.CULLED):
        edge, end = (a.x, b.right) if target is _S.ROLLED_BACK else (a.right, b.x)
        return [(edge, y), (end, y)], [(76 if target is _S.ROLLED_BACK else (edge + end) / 2, y - 5)]
    if target is _S.CANCELLED and b.y == a.y:
        return [(a.x, y), (b.right, y)], [((a.x + b.right) / 2, y - 5)]
    if target is _S.CANCELLED:
        return [(a.x, y - 8), (120, y - 8), (120, b.middle[1] + 9), (b.right, b.middle[1] + 9)], [(92, y - 24)]
    if target is _S.DORMANT:
        end = b.x if x < b.x else b.right
        return [(x, a.y), (x, b.middle[1]), (end, b.middle[1])], [((x + end) / 2, b.middle[1] - 5)]
    if _COLUMN.index(target) == row + 1:
        return [(x, a.bottom), (x, b.y)], [(x + 38, a.bottom + 18)]
    return [(a.right, y + 9), (318, y + 9), (318, b.middle[1] - 9), (b.right, b.middle[1] - 9)], [(354, a.bottom + 18)]


def lifecycle() -> str:
    """Return the life cycle of a seed."""
    boxes = _boxes()
    arrows = [
        Arrow(source.value, TARGET[command].value, command.value, tuple(points), at[0])
        for source, command in transitions()
        for points, at in [_route(source, TARGET[command], boxes)]
    ]
    words = "; ".join(f"{arrow.source} to {arrow.target} by {arrow.label}" for arrow in arrows)
    height = _TOP * 2 + (len(_COLUMN) - 1) * _ROW + _HIGH
    return drawing("The life cycle of a seed", words, 440, height, list(boxes.values()), arrows)


def transitions() -> Iterator[tuple[SeedState, SeedCommand]]:
    """Yield every arrow of the transition table, in its order."""
    return ((state, command) for state in TRANSITIONS for command in SeedCommand if command in TRANSITIONS[state])


# --- the forge ------------------------------------------------------------------------------------------------------


def forge() -> str:
    """Return who speaks to whom while kernels are compiled beside a run."""
    run, store = Box("Kasmina", 20, 16, 120, 44, note="in your run"), Box("Urza", 280, 16, 120, 44, note="signed store")
    bus = Box("Oona", 20, 118, 340, 34, note="")
    karn = Box("Karn", 20, 216, 104, 44, note="blueprints")
    tezzeret = Box("Tezzeret", 138, 216, 104, 44, note="compiles")
    urabrask = Box("Urabrask", 256, 216, 104, 44, note="tries out")
    down, up, rim = tezzeret.middle[0], karn.middle[0], 412
    arrows = [
        Arrow("Urza", "Kasmina", "verified kernel", ((store.x, 38), (run.right, 38)), (210, 32)),
        Arrow("Kasmina", "Oona", "asks", ((80, run.bottom), (80, bus.y)), (102, 92)),
        Arrow("Karn", "Oona", "proposes", ((up, karn.y), (up, bus.bottom)), (up + 34, 188)),
        Arrow("Oona", "Tezzeret", "work", ((down, bus.bottom), (down, tezzeret.y)), (down + 24, 188)),
        Arrow("Oona", "Urabrask", "work", ((308, bus.bottom), (308, urabrask.y)), (332, 188)),
        Arrow("Urabrask", "Urza", "", ((360, 238), (rim, 238), (rim, 38), (store.right, 38)), (0, 0)),
        Arrow(
            *("Tezzeret", "Urza", "statements and kernels"),
            ((down, tezzeret.bottom), (down, 284), (rim, 284), (rim, 38), (store.right, 38)),
            (300, 279),
        ),
    ]
    words = "; ".join(f"{a.source} to {a.target}: {a.label or 'statements'}" for a in arrows)
    return drawing("The forge beside a run", words, 424, 300, [run, store, bus, karn, tezzeret, urabrask], arrows)


PICTURES: Final = {"lifecycle.svg": lifecycle, "forge.svg": forge}
"""Every drawing by the file in docs/ that holds it."""


def main() -> None:
    """Write them."""
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
