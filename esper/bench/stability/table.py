"""The tables of the bench: for a terminal of 80 columns, and as Markdown; and a sentence for each part."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from esper.bench.progress import duration
from esper.bench.stability.efficiency import Size
from esper.bench.stability.parts import ARM_NAMES, CONDITIONS, DEFECT_NAMES, DEFECTS, EFFICIENCY, GRAFTS
from esper.bench.stability.run import Results
from esper.bench.stability.summary import Kept, compared, kept_by, mended

PICTURE: Final = "stability.png"
LOSS_LIMIT, DRIFT_LIMIT = 0.05, 0.05
"""How much the original loss may rise, as a fraction, and how far the representation behind the grafts may drift."""


class Lines(NamedTuple):
    """One table.

    Args:
        title: what it shows.
        head: names of the columns.
        lines: cells.
    """

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]


def _grafts(results: Results) -> Lines:
    head = ("domain", "host", "child", "loss, %", "worst", "drift", "worst", "upstream", "learned", "holds")
    found = [(names, kept_by(rows)) for names in CONDITIONS if (rows := results.of(GRAFTS, *names))]
    title = f"After {results.plan.grafts} grafts: rise of the original loss, drift behind and before them"
    return Lines(title, head, [(*names, *_told(kept)) for names, kept in found])


def _told(kept: Kept) -> tuple[str, ...]:
    held = "yes" if holds(kept) else "no"
    losses = (f"{100 * kept.loss:+.1f}", f"{100 * kept.worst_loss:+.1f}")
    upstream = "0" if kept.upstream == 0 else f"{kept.upstream:.3f}"
    return (*losses, f"{kept.drift:.3f}", f"{kept.worst_drift:.3f}", upstream, f"{kept.learned:.3f}", held)


def holds(kept: Kept) -> bool:
    """Return whether the original loss and the drift stay within their limits, in every run and after every graft."""
    return kept.worst_loss <= LOSS_LIMIT and kept.worst_drift <= DRIFT_LIMIT


def _defects(results: Results) -> Lines:
    head = ("defect", "what is wrong", "gap", "recovered", "placed", "right kind", "resolved")
    lines = []
    for name in DEFECT_NAMES:
        if rows := results.of(DEFECTS, name):
            found = mended(name, rows)
            counts = (f"{count} of {found.n}" for count in (found.placed, found.right, found.resolved))
            share = f"{100 * found.recovered:.0f} %" if math.isfinite(found.recovered) else "–"
            lines.append((name, found.about, f"{found.gap:.3f}", share, *counts))
    return Lines("Planted defects, and what the live trial made of them", head, lines)


def _efficiency(results: Results) -> Lines:
    head = ("gain", "nats", *ARM_NAMES, "full / child", "lora / child")
    rows = {name: results.of(EFFICIENCY, name) for name in ARM_NAMES}
    title = "Trained parameters that reach a share of what full fine-tuning gains on the new domain"
    return Lines(title, head, [_sizes(*found) for found in compared(rows)])


def _sizes(share: float, gain: float, sizes: Mapping[str, Size]) -> tuple[str, ...]:
    cells = (_count(sizes[name]) if name in sizes else "–" for name in ARM_NAMES)
    return (f"{100 * share:.0f} %", f"{gain:.3f}", *cells, *(ratio(sizes, name) or "–" for name in ("full", "lora")))


def _count(size: Size) -> str:
    return f"{'≤ ' * size.at_most}{size.params:,.0f}" if math.isfinite(size.params) else "not reached"


def ratio(sizes: Mapping[str, Size], name: str) -> str:
    """Return how many times as many parameters an arm needs as the smaller of the two children; empty if not known.

    Example:
        >>> ratio({"full": Size(5000), "gelu": Size(300, at_most=True), "conv": Size(400)}, "full")
        '≥ 16.7'
    """
    reached = [sizes[child] for child in ("gelu", "conv") if child in sizes and math.isfinite(sizes[child].params)]
    if not reached or name not in sizes or not math.isfinite(sizes[name].params):
        return ""
    least, other = min(reached), sizes[name]
    signs = {(True, False): "≤ ", (False, True): "≥ ", (True, True): "about "}
    return f"{signs.get((other.at_most, least.at_most), '')}{other.params / least.params:.1f}"


_TABLES: Final = {GRAFTS: _grafts, DEFECTS: _defects, EFFICIENCY: _efficiency}


def shown(results: Results) -> dict[str, Lines]:
    """Return the table of each part that has a row."""
    found = {part: _TABLES[part](results) for part in results.plan.parts}
    return {part: lines for part, lines in found.items() if lines.lines}


def tables(results: Results) -> list[Table]:
    """Return the tables for a terminal."""
    made = []
    for lines in shown(results).values():
        table = Table(title=lines.title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        for name in lines.head:
            left = name in _WORDS
            table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name not in _WRAPPED)
        for line in lines.lines:
            table.add_row(*line)
        made.append(table)
    return made


_WORDS: Final = ("domain", "host", "child", "defect", "what is wrong", "holds")
_WRAPPED: Final = ("what is wrong", "full / child", "lora / child", "gelu", "conv")


# --- sentences ------------------------------------------------------------------------------------------------------


def sentences(results: Results) -> list[str]:
    """Return one sentence for each part that has a row, and what failed."""
    makers = {GRAFTS: _of_grafts, DEFECTS: _of_defects, EFFICIENCY: _of_efficiency}
    told = [makers[part](results) for part in shown(results)]
    failed = (f"{arm} seed {seed} failed: {why}." for (arm, seed), why in sorted(results.failed.items()))
    return [*told, *failed]


def _of_grafts(results: Results) -> str:
    found = {names: kept_by(rows) for names in CONDITIONS if (rows := results.of(GRAFTS, *names))}
    held = [" ".join(names) for names, kept in found.items() if holds(kept)]
    missed = [" ".join(names) for names, kept in found.items() if not holds(kept)]
    limits = f"{100 * LOSS_LIMIT:.0f} % and {DRIFT_LIMIT} after every graft"
    return f"Held {limits}: {', '.join(held) or 'none'}. Not held: {', '.join(missed) or 'none'}."


def _of_defects(results: Results) -> str:
    found = [mended(name, rows) for name in DEFECT_NAMES if (rows := results.of(DEFECTS, name))]
    total, solved = sum(each.n for each in found), sum(each.resolved for each in found)
    right = sum(each.right for each in found)
    return (
        f"Resolved {solved} of {total} planted defects ({_percent(solved, total)}): a child kept at the defect that "
        f"makes good half of the gap or more; the kind was right in {right}."
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _of_efficiency(results: Results) -> str:
    told = []
    for share, _, sizes in compared({name: results.of(EFFICIENCY, name) for name in ARM_NAMES}):
        full, lora = (ratio(sizes, name) for name in ("full", "lora"))
        beside = f"{full} and {lora or 'no size of lora'}" if full else "no child that was tried reaches it"
        told.append(f"at {100 * share:.0f} %, {beside}")
    return (
        "Trained parameters of full fine-tuning and of lora as a multiple of one grafted child's, at a share of the "
        f"gain of full fine-tuning: {'; '.join(told)}."
    )


# --- Markdown -------------------------------------------------------------------------------------------------------

_TEXT: Final = """# What many grafts do to what a network knew

Command: `{command}`

{sentences}

{picture}{tables}

{notes}

{versions}; {seeds} seed{s}; made in {took}.
"""

NOTES: Final = {
    GRAFTS: """\
`loss` is the rise of the loss on the report part of the original domain after the last graft, beside it the worst
after any graft in any run; `drift` the mean of 1 - cos at the input of the last norm, over a fixed batch of the
original domain, against the host before the first graft; `upstream` the same before the first place that may grow;
`learned` what the loss on the trained domain fell by, in nats per byte. `holds` asks for 5 % and .05 after every graft
of every run. The gate of the life cycle is not asked: every child stays. `rehearsed`: two windows of eight are of the
original domain, where the child learns, by the divergence of the outputs, to change nothing. `gated`: the same with
`BP-EXPERT-CONTEXT`, whose gate reads the context and is taught to tell the domains apart, before the graft and after;
on the original domain itself nothing is rehearsed and no gate is taught.""",
    DEFECTS: """\
`gap` is by how much the sound network is better on the report part, `recovered` the share of it that growth makes good,
`placed` in how many runs a child was kept at the defect or just around it, `right kind` whether it was of the family
that the defect lacks. Resolved: placed, and half of the gap or more. The policy is the live trial as shipped, with the
menu and the budget of the experiment `spirals` for the first three, and all defaults for the last.""",
    EFFICIENCY: """\
Sizes are interpolated on the logarithm of the parameters; `≤` marks a smallest size that already reaches the gain.
`full / child` and `lora / child` are ratios to the smaller of the two children. Full fine-tuning trains every weight,
and reaches the smaller gains before its last step, with as many. The number of steps is the same for all; `gelu` and
`conv` are one child behind the first attention of a frozen host, `lora` is at every linear layer of it.""",
}


def markdown(results: Results, command: str, *, drawn: bool) -> str:
    """Return everything that is known as Markdown.

    Args:
        results: the rows.
        command: what makes them again.
        drawn: whether there is a picture beside it.
    """
    found = shown(results)
    return _TEXT.format(
        command=command,
        sentences="\n".join(f"- {sentence}" for sentence in sentences(results)),
        picture=f"![Drift and original loss, graft by graft]({PICTURE})\n\n" if drawn else "",
        tables="\n\n".join(_table(lines) for lines in found.values()),
        notes="\n\n".join(NOTES[part] for part in found),
        versions=results.versions,
        seeds=results.plan.seeds,
        s="" if results.plan.seeds == 1 else "s",
        took=duration(sum(row["process_seconds"] for row in results.rows.values())),
    )


def _table(lines: Lines) -> str:
    rows: Sequence[Sequence[str]] = [lines.head, ["---"] * len(lines.head), *lines.lines]
    return f"**{lines.title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
