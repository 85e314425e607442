"""What happened over the steps of a run: losses, the lattice of seeds, alpha ramps."""

import math
from collections.abc import Sequence
from itertools import groupby

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from esper.leyline.reports import FINAL
from esper.leyline.states import SeedState
from esper.nissa.chronicle import Chronicle, Life, Stage
from esper.nissa.page.runs import Run
from esper.nissa.page.svg import Shown, Table, show
from esper.nissa.palette import DECISION, FAINT, INK, STAGES, TRAIN
from esper.nissa.picture import bands, smoothed
from esper.nissa.summary import number

Points = Sequence[tuple[int, float]]

MOST_ROWS = 60
"""Most rows of the table under a figure, and most seeds of a lattice."""

_ROW, _BAR = 0.42, 0.4


def word(state: SeedState) -> str:
    """Return a state for people.

    Example:
        >>> word(SeedState.FINE_TUNING)
        'fine-tuning'
    """
    return state.value.lower().replace("_", "-")


# --- losses ---------------------------------------------------------------------------------------------------------


def losses(run: Run, key: str) -> Shown:
    """Return the losses, with the stages of growth behind them."""
    chronicle, twin = run.chronicle, run.twin.decision_losses if run.twin else []
    raw, decision = chronicle.train_losses, chronicle.decision_losses
    smooth, spans = smoothed(raw), bands(chronicle)

    def draw(axes: Axes, _width: float) -> None:
        for start, stop, state in spans:
            axes.axvspan(start, stop, color=STAGES[state], alpha=0.22, linewidth=0)
        _line(axes, smooth, color=TRAIN, linewidth=1.3, label="training")
        _line(axes, twin, color=INK, linewidth=1.3, linestyle="--", label="decision part, without growth")
        _line(axes, decision, color=DECISION, linewidth=1.6, marker="o", markersize=3, label="decision part")
        fit(axes, [*(p for p in smooth if p[0] >= 0.06 * chronicle.steps), *decision, *twin])
        steps_axis(axes, chronicle.steps, "loss")
        seen = {state for _, _, state in spans}
        handles = axes.get_legend_handles_labels()[0] + [
            Patch(color=colour, alpha=0.4, label=word(state)) for state, colour in STAGES.items() if state in seen
        ]
        if handles:
            legend(axes, handles)

    caption = (
        "Training loss (moving average) and the loss on the held-out decision part. Behind them, the "
        "commonest stage of the adaptations."
    )
    return show(
        f"{key}-losses", "Losses and stages", caption, _loss_table(decision, dict(twin), dict(smooth)), 3.6, draw
    )


def _loss_table(decision: Points, twin: dict[int, float], training: dict[int, float]) -> Table:
    told = decision or list(training.items())
    rows, note = thinned(told)
    cells = [(f"{s:,}", _loss(training.get(s)), _loss(dict(decision).get(s)), _loss(twin.get(s))) for s, _ in rows]
    return Table(("step", "training", "decision part", "without growth"), cells, note)


def _loss(value: float | None) -> str:
    return "–" if value is None else number(value)


def thinned(points: Points) -> tuple[list[tuple[int, float]], str]:
    """Return evenly picked points for a table, the last one among them, and a note if some were left out."""
    stride = math.ceil(len(points) / MOST_ROWS) or 1
    note = f"Every {stride}th of {len(points):,} points; growth.json has all." if stride > 1 else ""
    return list(reversed(points[::-1][::stride])), note


def _line(axes: Axes, points: Points, **style: object) -> None:
    finite = [(x, y if math.isfinite(y) else math.nan) for x, y in points]
    if any(not math.isnan(y) for _, y in finite):
        axes.plot([x for x, _ in finite], [y for _, y in finite], **style)  # type: ignore[arg-type]


def fit(axes: Axes, points: Points) -> None:
    """Fit the vertical axis to some points."""
    shown = [y for _, y in points if math.isfinite(y)]
    if shown and max(shown) > min(shown):
        room = 0.06 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - room, max(shown) + room)


def steps_axis(axes: Axes, steps: int, label: str) -> None:
    """Let the horizontal axis be the steps of a run, and name the other one."""
    axes.set_xlim(0, max(1, steps))
    axes.set_xlabel("training steps", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.locator_params(axis="x", nbins=6)


def legend(axes: Axes, handles: Sequence[Artist]) -> None:
    """Put a legend under the axes, with as many columns as its longest entry leaves room for."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    width = figure.get_figwidth()
    labels = [shortened(str(handle.get_label()), width) for handle in handles]
    columns = max(1, min(5, int(72 * width / (5 * max(map(len, labels)) + 40))))
    made = figure.legend(
        *(list(handles), labels),
        loc="outside lower center",
        ncols=columns,
        fontsize=8.5,
        frameon=False,
        handlelength=1.6,
    )
    for text in made.get_texts():
        text.set_parse_math(False)


def shortened(text: str, width: float) -> str:
    """Return a text that fits into a figure of some width in inches, cut at its end."""
    room = int(14 * width)
    return text if len(text) <= room else f"{text[: room - 1]}…"


def place(seed: str, kind: str, width: float) -> str:
    """Return a seed and what grew in it, cut to fit into a figure of some width in inches.

    Example:
        >>> place("model.layers.3.self_attn.out_proj#0.0", "BP-CONV-DEPTHWISE", 3.0)
        '…elf_attn.out_proj#0.0 · BP-CONV-DEPTHWISE'
    """
    # The end of a path tells seeds apart, its beginning is common to all.
    room = max(16, int(14 * width) - len(kind) - 3)
    path = seed if len(seed) <= room else f"…{seed[1 - room :]}"
    return shortened(f"{path} · {kind}", width)


# --- lattice --------------------------------------------------------------------------------------------------------


def lattice(run: Run, key: str) -> Shown | None:
    """Return one row per seed that was ever active, coloured by the stage of its life; None without any."""
    lives = run.chronicle.lives()
    if not lives:
        return None
    seeds, left_out = _seeds(lives)
    end = max(1, run.chronicle.steps)
    shown = [life for life in lives if life.seed_id in seeds]

    def draw(axes: Axes, width: float) -> None:
        for row, seed in enumerate(seeds):
            axes.plot([0, end], [row, row], color=FAINT, linewidth=0.8, alpha=0.5, zorder=0)
            _name(axes, row, seed, _kinds([life for life in shown if life.seed_id == seed]), width)
        for life in shown:
            _bar(axes, seeds.index(life.seed_id), life, end)
        axes.set_ylim(len(seeds) - 0.5, -0.9)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        steps_axis(axes, end, "")
        legend(axes, _stage_handles(shown))

    caption = (
        "One row per seed that was ever active; a thin line where it is dormant. A diamond: kept. A cross: removed."
    )
    if left_out:
        caption += f" {left_out} more seeds are left out; those with something kept come first."
    table = Table(("seed", "blueprint", "stage", "from step", "to step"), _stage_rows(shown))
    return show(f"{key}-lattice", "The lattice of seeds", caption, table, _ROW * len(seeds) + 1.2, draw)


def _seeds(lives: list[Life]) -> tuple[list[str], int]:
    every = list(dict.fromkeys(life.seed_id for life in lives))
    kept = {life.seed_id for life in lives if life.kept}
    chosen = set(sorted(every, key=lambda seed: (seed not in kept, every.index(seed)))[:MOST_ROWS])
    return [seed for seed in every if seed in chosen], len(every) - len(chosen)


def _kinds(lives: list[Life]) -> str:
    return ", then ".join(blueprint for blueprint, _ in groupby(life.blueprint for life in lives))


def _name(axes: Axes, row: int, seed: str, kinds: str, width: float) -> None:
    axes.text(0, row - 0.27, place(seed, kinds, width), fontsize=8.5, va="bottom", parse_math=False)


def _bar(axes: Axes, row: int, life: Life, end: int) -> None:
    for stage in life.stages:
        until = end if stage.end is None else stage.end
        gone = stage.state in FINAL - {SeedState.FOSSILIZED}
        if until > stage.start and not gone:
            axes.barh(row, until - stage.start, left=stage.start, height=_BAR, color=STAGES[stage.state], linewidth=0)
        if stage.state in FINAL:
            marker = "X" if gone else "D"
            axes.plot([stage.start], [row], marker, color=STAGES[stage.state], markersize=7, markeredgecolor="white")


def _stage_handles(lives: list[Life]) -> list[Line2D | Patch]:
    seen = {stage.state for life in lives for stage in life.stages if stage.end is None or stage.end > stage.start}
    handles: list[Line2D | Patch] = []
    for state, colour in STAGES.items():
        if state in seen and state in FINAL - {SeedState.FOSSILIZED}:
            handles.append(Line2D([], [], marker="X", linestyle="", color=colour, label=word(state)))
        elif state in seen:
            handles.append(Patch(color=colour, label=word(state)))
    return handles


def _stage_rows(lives: list[Life]) -> list[tuple[str, ...]]:
    def row(life: Life, stage: Stage) -> tuple[str, ...]:
        return life.seed_id, life.blueprint, word(stage.state), f"{stage.start:,}", _step(stage.end)

    return [
        row(life, stage)
        for life in lives
        for stage in life.stages
        if stage.end is None or stage.end > stage.start or stage.state in FINAL
    ]


def _step(step: int | None) -> str:
    return "–" if step is None else f"{step:,}"


# --- ramps ----------------------------------------------------------------------------------------------------------


def ramps(run: Run, key: str) -> Shown | None:
    """Return the alpha of every child, as it was noted during the run; None if the run noted none."""
    chronicle = run.chronicle
    every = [(life, points) for life in chronicle.lives() if (points := ramp_of(chronicle, life))]
    told = every[:MOST_ROWS]
    if not told:
        return None
    end = max(1, chronicle.steps)

    def draw(axes: Axes, width: float) -> None:
        for row, (life, points) in enumerate(told):
            _strip(axes, row, [*points, (end, points[-1][1])], _colour(life))
            _name(axes, row, life.seed_id, life.blueprint, width)
        axes.set_ylim(len(told) - 0.5, -0.9)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        steps_axis(axes, end, "")
        legend(axes, _ramp_handles(told))

    caption = (
        "Share of each child in its layer's output, from 0 at the foot of its strip to 1 at the top, as it was noted."
    )
    if len(every) > len(told):
        caption += f" {len(every) - len(told)} more children are left out."
    columns = ("child", "blueprint", "from step", "alpha")
    rows = [(x.seed_id, x.blueprint, f"{s:,}", f"{alpha:.3f}") for x, points in told for s, alpha in _corners(points)]
    table = Table(columns, rows, "Where a ramp begins, turns and ends; growth.json has every change.")
    return show(f"{key}-ramps", "Alpha ramps", caption, table, _ROW * len(told) + 1.2, draw)


def _strip(axes: Axes, row: int, points: Points, colour: str) -> None:
    foot = row + 0.36
    tops = [foot - 0.52 * alpha for _, alpha in points]
    axes.plot([0, points[-1][0]], [foot, foot], color=FAINT, linewidth=0.8, alpha=0.5)
    axes.fill_between([step for step, _ in points], foot, tops, step="post", color=colour, linewidth=0)


def _colour(life: Life) -> str:
    return STAGES[SeedState.TRAINING if life.outcome is None else life.outcome]


def _ramp_handles(told: Sequence[tuple[Life, Points]]) -> list[Patch]:
    names = {_colour(life): "under way" if life.outcome is None else word(life.outcome) for life, _ in told}
    return [Patch(color=colour, label=name) for colour, name in names.items()]


def ramp_of(chronicle: Chronicle, life: Life) -> list[tuple[int, float]]:
    """Return the alpha of one life: from its birth to its end, the removal included."""
    ramp = chronicle.ramps.of.get(life.seed_id)
    if ramp is None:
        return []
    gone = life.outcome is not None and not life.kept
    last = life.stages[-1].start if gone else math.inf
    born = life.stages[0].start
    inside = [(step, alpha) for step, alpha in ramp.points if born <= step < last]
    return [*inside, (life.stages[-1].start, 0.0)] if gone and inside else inside


def _corners(points: Points) -> list[tuple[int, float]]:
    """Return where a ramp begins, turns and ends."""
    inner = [
        b
        for a, b, c in zip(points, points[1:], points[2:], strict=False)
        if (b[1] - a[1]) * (c[1] - b[1]) <= 0 or (c[0] - b[0]) > 2 * (b[0] - a[0]) or (b[0] - a[0]) > 2 * (c[0] - b[0])
    ]
    return [*points[:1], *inner, *points[1:][-1:]]
