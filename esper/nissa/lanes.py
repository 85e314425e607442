"""The lane chart: one lane per adaptation, coloured by the stage of its life."""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from esper.leyline.reports import FINAL
from esper.leyline.states import SeedState
from esper.nissa.chronicle import Chronicle, Life, Stage
from esper.nissa.palette import FAINT, INK, STAGES
from esper.nissa.summary import GraftLine, gain_scale, graft_lines, number

MOST_LANES = 24
"""Most lanes that a picture shows; fossils come first."""

_HEIGHT = 0.7
_ROOM = 0.72
"""Part of the run after which the words about a lane's end stand before it."""


class Lanes(NamedTuple):
    """The lives that a picture shows, each in one line too, and how many it leaves out."""

    lives: tuple[Life, ...]
    lines: tuple[GraftLine, ...]
    left_out: int


def choose_lanes(chronicle: Chronicle) -> Lanes:
    """Return the lives to show, in order of germination; beyond `MOST_LANES` those that were kept come first."""
    lives, lines = chronicle.lives(), graft_lines(chronicle)
    shown = sorted(sorted(range(len(lives)), key=lambda i: (not lives[i].kept, i))[:MOST_LANES])
    left_out = len(lives) - len(shown)
    return Lanes(tuple(lives[i] for i in shown), tuple(lines[i] for i in shown), left_out)


def draw_lanes(axes: Axes, lanes: Lanes, end: int) -> None:
    """Draw every lane, its name on the left and its end beside or inside its last bar."""
    for row, life in enumerate(lanes.lives):
        for stage in life.stages:
            _draw_stage(axes, row, stage, end)
    _draw_names(axes, lanes)
    _draw_ends(axes, lanes, end)
    _separate_groups(axes, lanes)
    axes.set_ylim(len(lanes.lives) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    if lanes.left_out:
        axes.set_xlabel(f"and {lanes.left_out} more in growth.json", fontsize=8, color=FAINT)


def _draw_stage(axes: Axes, row: int, stage: Stage, end: int) -> None:
    colour = STAGES.get(stage.state, FAINT)
    if stage.state in FINAL - {SeedState.FOSSILIZED}:
        _mark(axes, row, stage, "X")
        return
    until = end if stage.end is None else stage.end
    if until > stage.start:
        axes.barh(row, until - stage.start, left=stage.start, height=_HEIGHT, color=colour, linewidth=0)
    if stage.state is SeedState.FOSSILIZED:
        _mark(axes, row, stage, "D")


def _mark(axes: Axes, row: int, stage: Stage, marker: str) -> None:
    style = {"color": STAGES[stage.state], "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.plot([stage.start], [row], marker=marker, zorder=4, clip_on=False, **style)  # type: ignore[arg-type]


def _draw_names(axes: Axes, lanes: Lanes) -> None:
    labels = [_name(life, _common_prefix([x.seed_id for x in lanes.lives])) for life in lanes.lives]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for tick, life in zip(axes.get_yticklabels(), lanes.lives, strict=True):
        tick.set_color(INK if life.kept else FAINT)
        tick.set_fontweight("bold" if life.kept else "normal")


def _name(life: Life, prefix: str) -> str:
    place = life.seed_id.removeprefix(prefix).partition("#")[0]
    place = place if len(place) <= 18 else f"…{place[-17:]}"
    return f"{life.blueprint} · {place}"


def _common_prefix(seeds: list[str]) -> str:
    """Return the module path that all seeds share, up to a dot, so that names stay short."""
    paths = [seed.partition("#")[0].split(".")[:-1] for seed in seeds]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1 or parts[0].isdigit():
            break
        shared.append(parts[0] + ".")
    return "".join(shared)


def _draw_ends(axes: Axes, lanes: Lanes, end: int) -> None:
    scale = gain_scale(lanes.lines)
    for row, (life, line) in enumerate(zip(lanes.lives, lanes.lines, strict=True)):
        last = life.stages[-1].start
        before = last > _ROOM * end
        on_green = life.kept and not before
        axes.annotate(
            _ending(line, scale),
            (last, row),
            xytext=(-8 if before else 8, -0.5),
            textcoords="offset points",
            ha="right" if before else "left",
            va="center",
            fontsize=7.5,
            color="white" if on_green else INK,
            fontweight="bold" if life.kept else "normal",
            zorder=5,
        )


def _ending(line: GraftLine, scale: float) -> str:
    if line.ended is None:
        return "under way"
    word = "kept" if line.kept else line.reason.lower().replace("_", " ")
    return word if line.gain is None else f"{word}, gain {number(line.gain, scale)}"


def _separate_groups(axes: Axes, lanes: Lanes) -> None:
    pairs = zip(lanes.lives, lanes.lives[1:], strict=False)
    for row, (above, below) in enumerate(pairs):
        if above.group != below.group:
            axes.axhline(row + 0.5, color=FAINT, linewidth=0.6, linestyle=":")


def stage_legend(lanes: Lanes) -> list[Patch | Line2D]:
    """Return one legend entry for each state that can be seen in the lanes."""
    seen = {s.state for life in lanes.lives for s in life.stages if s.end is None or s.end > s.start}
    entries: list[Patch | Line2D] = []
    for state, colour in STAGES.items():
        label = state.value.lower().replace("_", "-")
        if state not in seen:
            continue
        if state in FINAL - {SeedState.FOSSILIZED}:
            entries.append(Line2D([], [], marker="X", linestyle="", color=colour, label=label))
        else:
            entries.append(Patch(color=colour, label=label))
    return entries
