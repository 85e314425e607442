"""`esper bench speed`: what seeds, kernels and decisions cost on this machine."""

import argparse
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from rich.console import Console
from rich.text import Text

from esper.bench.running import alone, ends_in_order, positive
from esper.bench.speed.rows import QUICK_STEPS, ROWS, STEPS, Effort
from esper.bench.speed.run import TEXT, leave, measure
from esper.bench.speed.table import summary, terminal
from esper.leyline.errors import ConfigError

OUT: Final = Path("outputs/bench/speed")

_FAILED: Final = 1
_INTERRUPTED: Final = 130
_ABOUT: Final = """\
Measure what Esper costs on this machine: each row beside its target, and beside what the bare thing costs (the model
without seeds, a memcpy, a dict lookup, PEFT). One thread, on the CPU.
"""


def command(args: Sequence[str]) -> int:
    """Run `esper bench speed`.

    Raises:
        ConfigError: there is no such row.
    """
    given = _parser().parse_args(list(args))
    names = _known([name for item in given.rows or ROWS for name in item.split(",") if name])
    told, console = shlex.join(["esper", "bench", "speed", *args]), Console()
    with alone(given.out), ends_in_order(), TemporaryDirectory(prefix="esper-speed-") as scratch:
        effort = Effort(Path(scratch), given.quick, given.compile, given.steps)
        try:
            results = measure(names, effort, told, console, lambda results: leave(results, given.out))
        except KeyboardInterrupt:
            told = f"Stopped; the rows that were done, if any, are in {given.out / TEXT}."
            console.print(told, soft_wrap=True, highlight=False)
            raise SystemExit(_INTERRUPTED) from None
    console.print(terminal(results))
    console.print(Text(f"{summary(results)}.", style="bold"))
    console.print(Text(f"Table and numbers: {given.out / TEXT}"), soft_wrap=True)
    return _FAILED if results.failed else 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, ROWS))
    rows = "\n".join(f"  {name:<{width}}  {row.about}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        prog="esper bench speed",
        description=_ABOUT,
        epilog=f"rows:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="some rows only (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, more noise")
    parser.add_argument("--compile", action="store_true", help="compile kernels too, which takes about two minutes")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"training steps in which stalls are looked for (default: {STEPS}; with --quick {QUICK_STEPS})",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder (default: {OUT})")
    return parser


def _known(names: list[str]) -> list[str]:
    for name in names:
        if name not in ROWS:
            near = get_close_matches(name, ROWS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the rows are {', '.join(ROWS)}."
            raise ConfigError(f"no row {name!r}; {hint}")
    return names
