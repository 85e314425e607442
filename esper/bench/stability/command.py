"""`esper bench stability`: what many grafts do to what a network knew."""

import argparse
import shlex
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from esper.bench.rows import write
from esper.bench.running import alone, ends_in_order, positive
from esper.bench.stability.parts import PARTS, Plan
from esper.bench.stability.picture import draw
from esper.bench.stability.run import Results, run
from esper.bench.stability.table import PICTURE, markdown, sentences, tables
from esper.files import replacing
from esper.leyline.errors import ConfigError

OUT: Final = Path("outputs/bench/stability")
SUMMARY, TEXT = "stability.json", "stability.md"

_FAILED: Final = 1
_INTERRUPTED: Final = 130

_ABOUT: Final = """\
Graft many children into a trained network, one after another, and measure what becomes of its original task; plant
defects, and count those that the live trial mends; and compare what a parameter buys with full fine-tuning and with
low-rank adapters. Rows that are there are not made again.
"""


def command(args: Sequence[str]) -> int:
    """Run `esper bench stability`."""
    given = _parser().parse_args(list(args))
    plan, console = Plan(_chosen(given.parts), given.seeds, given.grafts, given.quick), Console()
    with alone(given.out), ends_in_order():
        try:
            results = run(plan, given.out, console, at_a_time=given.jobs)
        except KeyboardInterrupt:
            told = f"Stopped; the rows that are done are kept in {given.out}, the same command goes on."
            console.print(told, soft_wrap=True, highlight=False)
            raise SystemExit(_INTERRUPTED) from None
        leave(results, given.out, shlex.join(["esper", "bench", "stability", *args]))
    _show(results, given.out, console)
    return _FAILED if results.failed else 0


def _parser() -> argparse.ArgumentParser:
    parts = "\n".join(f"  {name:<12}{about}" for name, about in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="esper bench stability",
        description=_ABOUT,
        epilog=f"parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", default=list(PARTS), help="which parts (default: all)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each row (default: 3)")
    parser.add_argument("--grafts", type=positive, default=25, metavar="N", help="one after another (default: 25)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="K", help="rows at a time (default: 1)")
    parser.add_argument("--quick", action="store_true", help="few steps, a small host: whether it runs")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder (default: {OUT})")
    return parser


def _chosen(given: Sequence[str]) -> tuple[str, ...]:
    """Return the parts in the order of the tables.

    Raises:
        ConfigError: there is no such part.
    """
    for name in given:
        if name not in PARTS:
            near = get_close_matches(name, PARTS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the parts are {', '.join(PARTS)}."
            raise ConfigError(f"no part {name!r}; {hint}")
    return tuple(name for name in PARTS if name in given)


def leave(results: Results, folder: Path, told: str) -> None:
    """Write `stability.json`, `stability.md` and, where there are grafts, `stability.png`.

    Raises:
        OutputError: the folder cannot be written.
    """
    rows = [{"row": arm, "seed": seed} | row for (arm, seed), row in sorted(results.rows.items())]
    plain = {"command": told, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": results.seconds}
    write(folder / SUMMARY, plain | {"plan": results.plan._asdict(), "rows": rows})
    drawn = draw(results, folder / PICTURE)
    with replacing(folder / TEXT) as file:
        file.write(markdown(results, told, drawn=drawn).encode())


def _show(results: Results, folder: Path, console: Console) -> None:
    for table in tables(results):
        console.print(table)
    for sentence in sentences(results):
        console.print(Text(sentence))
    console.print(Text(f"Tables, picture and numbers: {folder / TEXT}"), soft_wrap=True)
