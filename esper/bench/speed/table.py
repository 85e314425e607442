"""The table of speed: for a terminal, as Markdown, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from esper.bench.progress import duration
from esper.bench.speed.line import Line, Verdict

_STYLES: Final[Mapping[Verdict, str]] = {Verdict.MET: "green", Verdict.MISSED: "bold red"}


@dataclass
class Results:
    """What was measured.

    Args:
        command: what makes it again.
        quick: whether with fewer repeats.
        machine: where, before the first row.
        lines: by row.
        failed: why a row could not be measured, by row.
        seconds: what each row took.
        load_after: load average after the last row.
    """

    command: str
    quick: bool
    machine: Mapping[str, Any]
    lines: dict[str, list[Line]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    load_after: Sequence[float] = ()

    def count(self, verdict: Verdict) -> int:
        """Return how many lines have a verdict."""
        return sum(line.verdict is verdict for lines in self.lines.values() for line in lines)

    def plain(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "command": self.command,
            "quick": self.quick,
            "machine": dict(self.machine),
            "load_average_after": list(self.load_after),
            "seconds": sum(self.seconds.values()),
            "rows": {
                name: {
                    "seconds": taken,
                    "error": self.failed.get(name),
                    "lines": [line.plain() for line in self.lines.get(name, ())],
                }
                for name, taken in self.seconds.items()
            },
        }


def summary(results: Results) -> str:
    """Return in one sentence what the table says."""
    met, missed, left = map(results.count, (Verdict.MET, Verdict.MISSED, Verdict.NOT_MEASURED))
    told = f"{met} of {met + missed} targets are met on this machine"
    return (
        told + (f"; {left} not measured" if left else "") + (f"; {len(results.failed)} failed" * bool(results.failed))
    )


def terminal(results: Results) -> Table:
    """Return the table for a terminal; 80 columns are enough."""
    title = "Speed" + (", few repeats (--quick)" if results.quick else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("what", overflow="fold", ratio=3)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("limit beside it", overflow="fold", ratio=2)
    for lines in results.lines.values():
        for line in lines:
            measured = Text(line.told(line.value) or "–", style=_STYLES.get(line.verdict, ""))
            target = Text(_target(line), style=_STYLES.get(line.verdict, ""))
            table.add_row(Text(line.what), measured, target, Text(beside(line), style="dim"))
    return table


def _target(line: Line) -> str:
    words = "" if line.verdict in (Verdict.NONE, Verdict.NOT_MEASURED) else f"{line.verdict}, "
    sign = "≥" if line.at_least else "≤"
    return f"{words}{sign} {line.told(line.target)}" if line.target is not None else ""


def beside(line: Line) -> str:
    """Return what the bare thing costs, or why nothing was measured.

    Example:
        >>> beside(Line(what="cached hit", value=0.5, unit="µs", limit=0.1, of="a dict lookup"))
        '0.1 µs: a dict lookup'
    """
    if line.value is None:
        return f"not measured: {line.why}"
    return f"{line.told(line.limit)}: {line.of}" if line.limit is not None else ""


# --- Markdown -------------------------------------------------------------------------------------------------------

_TEXT: Final = """# Speed

Command: `{command}`{quick}

{summary}.

{table}

{processor}, {cores} cores, {memory_gib} GiB, {platform}; {versions}. Load average before {before}, after {after}, which
counts this bench too: what else the machine did is in the numbers. It took {duration}. What each line means:
`docs/bench-speed.md`; every number: `speed.json`.
"""


def markdown(results: Results) -> str:
    """Return everything that a reader wants to know as Markdown."""
    head = [["row", "what", "measured", "target", "", "limit beside it"], ["---"] * 6]
    cells = [_cells(name, line) for name, lines in results.lines.items() for line in lines]
    cells += [[name, "", "", "", "failed", why] for name, why in results.failed.items()]
    machine = results.machine
    return _TEXT.format(
        command=results.command,
        quick=" (few repeats)" if results.quick else "",
        summary=summary(results),
        table="\n".join(f"| {' | '.join(line)} |" for line in head + cells),
        processor=machine["processor"],
        cores=machine["cores"],
        memory_gib=machine["memory_gib"],
        platform=machine["platform"],
        versions=", ".join(f"{name} {told}" for name, told in machine["versions"].items()),
        before=_loads(machine["load_average"]),
        after=_loads(results.load_after),
        duration=duration(sum(results.seconds.values())),
    )


def _cells(name: str, line: Line) -> list[str]:
    verdict = "" if line.verdict is Verdict.NONE else line.verdict.value
    return [name, line.what, line.told(line.value), line.bound(), verdict, line.why or beside(line)]


def _loads(loads: Sequence[float]) -> str:
    return " ".join(f"{load:.2f}" for load in loads) or "unknown"
