"""The growth table that ends a run in the terminal."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.nissa.summary import GraftLine, RunResult, gain_scale, number, verdict

__all__ = ["present", "verdict"]

_STYLES = {"FOSSILIZED": "green", "CULLED": "yellow", "CANCELLED": "dim", "ROLLED_BACK": "red"}


def present(
    grown: RunResult, twin: RunResult | None = None, console: Console | None = None, page: Path | None = None
) -> None:
    """Print every adaptation, the comparison with the twin, and the verdict.

    Args:
        grown: the run with growth.
        twin: the same run without growth; None if there was none.
        console: where to print; None takes standard output.
        page: the page about the run; None if there is none.
    """
    out = console if console is not None else Console()
    if grown.grafts:
        out.print(growth_table(grown))
    out.print(run_table(grown, twin))
    if grown.search_share:
        share = f"{100 * grown.search_share:.1f} %"
        out.print(f"The search (children on trial, and judging them): {share} of the training's work.", highlight=False)
    if grown.missed_kernels:
        out.print(Text(missed(grown.missed_kernels), style="dim"))
    out.print(Text(verdict(grown, twin), style="bold"))
    if grown.output_dir:
        out.print(Text(f"Picture, lineage and grown model: {grown.output_dir}"))
    if page is not None:
        out.print(Text(f"All of it on one page: {page}"))


def missed(kernels: int) -> str:
    """Return what to do about kernels that were not ready when the run ended."""
    return (
        f"Compiled kernels that were not ready in time: {kernels}. The next run in this folder goes on with them; "
        "`esper forge` makes them all now, and `esper kernels --watch` shows how far they are."
    )


def growth_table(run: RunResult) -> Table:
    """Return one row per adaptation."""
    table = Table(title="What was tried", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("blueprint and site", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("outcome and reason")
    table.add_column("gain (interval)", justify="right")
    scale = gain_scale(run.grafts)
    for before, line in zip((None, *run.grafts), run.grafts, strict=False):
        if before is not None and before.group != line.group:
            table.add_section()
        table.add_row(*_cells(line, scale))
    return table


def _cells(line: GraftLine, scale: float) -> tuple[str | Text, ...]:
    place = Text(line.blueprint, style="bold" if line.kept else "")
    place.append(f"\n{line.seed_id}" + (", compiled" if line.kernel == "compiled" else ""), style="dim")
    outcome = Text(line.outcome, style=_STYLES.get(line.outcome, "")).append(f"\n{line.reason}", style="dim")
    return place, f"{line.params:,}", outcome, gain_text(line, scale)


def gain_text(line: GraftLine, scale: float | None = None) -> str:
    """Return the measured gain over its interval, or `not measured`.

    Args:
        line: the adaptation.
        scale: decides the decimals, see `esper.nissa.summary.number`; None takes the gain itself.
    """
    if line.gain is None or line.lower is None or line.upper is None:
        return "not measured"
    size = line.gain if scale is None else scale
    return f"{number(line.gain, size)}\n({number(line.lower, size)} to {number(line.upper, size)})"


def run_table(grown: RunResult, twin: RunResult | None) -> Table:
    """Return one row per run."""
    table = Table(title="What it came to", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    runs = [("with growth", grown)] + ([("without", twin)] if twin is not None else [])
    counted = all(run.train_macs for _, run in runs)
    for name in ("parameters", "report loss", "decision", "steps", *(["MACs"] if counted else []), "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, run in runs:
        table.add_row(
            name,
            f"{run.host_params + run.added_params:,}",
            _optional(run.report_loss),
            _optional(run.decision_loss),
            f"{run.steps:,}",
            *([f"{run.train_macs:.1e}"] if counted else []),
            f"{run.seconds:.0f}",
        )
    return table


def _optional(value: float | None) -> str:
    return "-" if value is None else number(value)
