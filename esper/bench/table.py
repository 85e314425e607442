"""The tables of a bench: for a terminal of any width, and everything as Markdown."""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from esper.bench.arms import ARMS, GROWN, OFF, WIDE
from esper.bench.estimate import Estimate
from esper.bench.results import Results
from esper.bench.verdict import sentences

PICTURE: Final = "growth.png"


class Column(NamedTuple):
    """One column.

    Args:
        head: its name.
        cell: its content for an arm.
        from_width: narrowest terminal that shows it.
    """

    head: str
    cell: Callable[[Results, str], str]
    from_width: int = 0


def _gain_on(name: str) -> Callable[[Results, str], str]:
    return lambda results, arm: _told(results.gain(arm, name))


def _told(found: Estimate | None) -> str:
    return found.told(sign=True) if found else ""


def _wins(results: Results, arm: str) -> str:
    gain = results.gain(arm, results.reference)
    return f"{gain.wins} of {gain.n}" if gain else ""


def _accuracy(results: Results, arm: str) -> str:
    found = results.accuracy(arm)
    return f"{100 * found.mean:.1f} %" if found else ""


def _mean(what: str, form: str, scale: float = 1.0) -> Callable[[Results, str], str]:
    def cell(results: Results, arm: str) -> str:
        value = results.mean(arm, what)
        return f"{scale * value:{form}}" if math.isfinite(value) else "–"

    return cell


def _compute(results: Results, arm: str) -> str:
    ratio = results.compute(arm)
    return f"{ratio:.3f}" if math.isfinite(ratio) else "–"


def _name(results: Results, arm: str) -> str:
    return arm


COLUMNS: Final = (
    Column("arm", _name),
    Column("report loss", lambda results, arm: results.loss(arm).told(), 72),
    Column("gain", lambda results, arm: _told(results.gain(arm, results.reference))),
    Column("wins", _wins),
    Column("accuracy", _accuracy, 140),
    Column("parameters", _mean("params", ",.0f"), 90),
    Column("compute", _compute, 78),
    Column("steps", _mean("steps", ",.0f"), 110),
    Column("latency, ms", _mean("latency_ms", ".2f"), 140),
    Column("seconds", _mean("seconds", ".0f"), 120),
    Column("peak, MiB", _mean("peak_mib", ",.0f"), 160),
    Column("kept", Results.kept, 170),
)
"""Columns of the terminal."""

EVERYTHING: Final = (
    Column("arm", _name),
    Column("report loss", lambda results, arm: results.loss(arm).told()),
    Column("accuracy", _accuracy),
    Column("gain on the wide net", _gain_on(WIDE)),
    Column("gain on the host alone", _gain_on(OFF)),
    Column("wins", _wins),
    Column("parameters", _mean("params", ",.0f")),
    Column("training FLOPs", _mean("train_flops", ".3g")),
    Column("compute", _compute),
    Column("steps", _mean("steps", ",.0f")),
    Column("FLOPs a sample", _mean("inference_flops", ",.0f")),
    Column("latency, ms", _mean("latency_ms", ".2f")),
    Column("seconds", _mean("seconds", ".1f")),
    Column("peak, MiB", _mean("peak_mib", ",.0f")),
    Column("kept", Results.kept),
)
"""Columns of the Markdown table."""


def terminal(results: Results, width: int) -> Table:
    """Return one row per arm, with the columns that a terminal of a width has room for."""
    on = {WIDE: "the wide net at equal compute", OFF: "the host alone at equal compute"}
    title = f"{results.experiment}: gain in report loss on {on.get(results.reference or '', 'nothing')}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    shown = [column for column in COLUMNS if column.from_width <= width]
    for column in shown:
        left = column.head in ("arm", "kept")
        table.add_column(column.head, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for arm in results.arms:
        cells = [_stacked(column.cell(results, arm), width) for column in shown]
        table.add_row(*(Text(cell, style="bold" if arm == GROWN else "") for cell in cells))
    return table


def _stacked(cell: str, width: int) -> str:
    """Put an interval under its mean where room is short."""
    return cell.replace(" [", "\n[") if width < 200 else cell


# --- Markdown -------------------------------------------------------------------------------------------------------

_TEXT: Final = """# Does growth pay on {experiment}?

Command: `{command}`

{sentences}

![{alt}]({picture})

{table}

Losses are those of the report part, which nothing that decides has read ({part}): the mean over seeds and its 95 %
interval. Gains are paired seed by seed, positive is better: what an arm's loss is lower by. `compute` is the training
work of an arm as a ratio to that of `{grown}`, by the runs' own account: training, and for what grows the search and
its evaluations too; neither the validations that every run makes nor a teacher's forward passes are in it.
`latency` is a forward of {batch} in evaluation, `peak` the most memory of the process, `seconds` the training
and the measurement of the report part. `kept` says in how many runs a kind was kept.

{arms}

{versions}; one thread, eager kernels.
"""


def markdown(results: Results, command: str) -> str:
    """Return everything that is known as Markdown.

    Args:
        results: the rows.
        command: what makes them again.
    """
    lines = [[column.head for column in EVERYTHING], ["---"] * len(EVERYTHING)]
    lines += [[column.cell(results, arm) for column in EVERYTHING] for arm in results.arms]
    rows = list(results.rows.values())
    return _TEXT.format(
        experiment=results.experiment,
        command=command,
        sentences="\n".join(f"- {sentence}" for sentence in sentences(results)),
        alt=alt(results),
        picture=PICTURE,
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        part="; ".join(sorted({row["report_part"] for row in rows})) or "no row was made",
        grown=GROWN,
        batch=" or ".join(sorted({_samples(row["latency_batch"]) for row in rows})) or "no sample",
        arms="\n".join(f"- `{arm}`: {_about(results, arm)}." for arm in results.arms),
        versions="; ".join(sorted({_versions(row["versions"]) for row in rows})) or "nothing ran",
    )


def _samples(count: int) -> str:
    return f"{count} sample{'' if count == 1 else 's'}"


def _about(results: Results, arm: str) -> str:
    about = ARMS[arm].about
    return f"{about} ({results.wide})" if arm.startswith("static_wide") and results.wide else about


def _versions(told: dict[str, str]) -> str:
    names = ("esper", "torch", "python")
    return ", ".join([*(f"{name} {told[name]}" for name in names), told["machine"], told["device"]])


def alt(results: Results) -> str:
    """Return the picture in words: the gain of every arm."""
    gains = ((arm, results.gain(arm, results.reference)) for arm in results.arms)
    told = [f"{arm} {gain.told(sign=True)}" for arm, gain in gains if gain]
    return f"Gain in report loss on {results.reference}: {', '.join(told)}" if told else "No gain is known"
