"""The growth table that ends a run in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.nissa.summary import GraftLine, RunResult, number, verdict

__all__ = ["present", "verdict"]

_STYLES = {"FOSSILIZED": "green", "CULLED": "yellow", "CANCELLED": "dim", "ROLLED_BACK": "red"}


def present(grown: RunResult, twin: RunResult | None = None, console: Console | None = None) -> None:
    """Print every adaptation, the comparison with the twin, and the verdict.

    Args:
        grown: the run with growth.
        twin: the same run without growth; None if there was none.
        console: where to print; None takes standard output.
    """
    out = console if console is not None else Console()
    if grown.grafts:
        out.print(growth_table(grown))
    out.print(run_table(grown, twin))
    out.print(Text(verdict(grown, twin), style="bold"))
    if grown.output_dir:
        out.print(Text(f"Picture, lineage and grown model: {grown.output_dir}"))


def growth_table(run: RunResult) -> Table:
    """Return one row per adaptation."""
    table = Table(title="What was tried", title_justify="left")
    for name in ("blueprint", "site", "steps"):
        table.add_column(name, overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("outcome")
    table.add_column("gain (interval)", justify="right")
    for before, line in zip((None, *run.grafts), run.grafts, strict=False):
        if before is not None and before.group != line.group:
            table.add_section()
        table.add_row(*_cells(line))
    return table


def _cells(line: GraftLine) -> tuple[str | Text, ...]:
    outcome = Text(line.outcome, style=_STYLES.get(line.outcome, ""))
    if line.reason:
        outcome.append(f"\n{line.reason}", style="dim")
    life = f"{line.born}-{line.ended}" if line.ended is not None else f"{line.born}-"
    return Text(line.blueprint), Text(line.seed_id), life, f"{line.params:,}", outcome, gain_text(line)


def gain_text(line: GraftLine) -> str:
    """Return the measured gain with its interval, or `not measured`."""
    if line.gain is None or line.lower is None or line.upper is None:
        return "not measured"
    bounds = (number(bound, line.gain) for bound in (line.lower, line.upper))
    return f"{number(line.gain)}\n({' to '.join(bounds)})"


def run_table(grown: RunResult, twin: RunResult | None) -> Table:
    """Return one row per run."""
    table = Table(title="What it came to", title_justify="left")
    table.add_column("run")
    for name in ("parameters", "report loss", "decision loss", "steps", "training MACs", "seconds"):
        table.add_column(name, justify="right")
    runs = [("with growth", grown)] + ([("without", twin)] if twin is not None else [])
    for name, run in runs:
        table.add_row(
            name,
            f"{run.host_params + run.added_params:,}",
            _optional(run.report_loss),
            _optional(run.decision_loss),
            f"{run.steps:,}",
            f"{run.train_macs:.2e}" if run.train_macs else "-",
            f"{run.seconds:.0f}",
        )
    return table


def _optional(value: float | None) -> str:
    return "-" if value is None else number(value)
