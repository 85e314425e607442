"""`esper bench growth`: does growth pay on an experiment?"""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from esper.bench.arms import ARMS, GROWN
from esper.bench.experiment import Experiment, from_conf, from_file, tasks
from esper.bench.growth import TEXT, Bench, Run, chosen, leave
from esper.bench.results import Results
from esper.bench.running import alone, ends_in_order, positive
from esper.bench.table import terminal
from esper.bench.verdict import sentences
from esper.leyline.errors import ConfigError

OUT: Final = Path("outputs/bench")
STANDARD: Final = ("A", "B", "C", "D")
"""Letters of the tasks that run when nothing is named."""

_FAILED: Final = 1
_INTERRUPTED: Final = 130

_ABOUT: Final = """\
Train an experiment with growth, and the same training compute spent otherwise: on the host alone, on a wider net, on
what growth found but from the first step, on other ways to grow. Rows that are there are not made again.
"""

_EXAMPLES: Final = """\
  esper bench growth +experiment=quickstart --seeds 5 --jobs 2
  esper bench growth A B C D                      the tasks of the benchmark, by letter (conf/bench/)
  esper bench growth --config run/config.yaml     any configuration of `esper fit`

arms:
"""


def command(args: Sequence[str]) -> int:
    """Run `esper bench growth`."""
    given = _parser().parse_intermixed_args(list(args))
    arms, overrides = _sorted_out(given.arms, given.overrides)
    seeds, console, fine = tuple(range(given.seeds)), Console(), True
    for experiment in experiments(given.config, overrides):
        folder = given.out or OUT / experiment.name
        told = shlex.join(["esper", "bench", "growth", *args])
        fine &= _bench(Bench(experiment, arms, seeds, folder, given.jobs), told, console)
    return 0 if fine else _FAILED


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, ARMS))
    arms = "\n".join(f"  {name:<{width}}  {arm.about}" for name, arm in ARMS.items())
    parser = argparse.ArgumentParser(
        prog="esper bench growth",
        description=_ABOUT,
        epilog=f"examples:\n{_EXAMPLES}{arms}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="+experiment=NAME and other overrides of Hydra, or letters")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a configuration of `esper fit` instead of ./conf")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"which arms; {GROWN} always runs (default: all)")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each arm (default: 5)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="K", help="rows at a time (default: 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: outputs/bench/NAME)")
    return parser


def _sorted_out(arms: Sequence[str] | None, overrides: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return arms and overrides; an override that stands behind the arms is still one."""
    given = [name for item in arms or () for name in ([item] if "=" in item else item.split(",")) if name]
    names = [name for name in given if "=" not in name]
    for name in names:
        if name not in ARMS:
            near = get_close_matches(name, ARMS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the arms are {', '.join(ARMS)}."
            raise ConfigError(f"no arm {name!r}; {hint}")
    return chosen(names if arms else list(ARMS)), [*overrides, *(item for item in given if "=" in item)]


def experiments(config: Path | None, overrides: Sequence[str]) -> Iterator[Experiment]:
    """Yield what is to be benched: a file, an experiment, or tasks by letter.

    Args:
        config: a configuration of `esper fit`; None takes `./conf`.
        overrides: of Hydra, or letters of tasks; none takes the standard tasks.

    Raises:
        ConfigError: a letter is unknown, or letters stand beside a file or an experiment.
    """
    letters = [item for item in overrides if "=" not in item and not item.startswith("~")]
    others = [item for item in overrides if item not in letters]
    if config is not None:
        if letters:
            raise ConfigError(f"{' '.join(letters)}: tasks are those of ./conf; leave them out, or --config.")
        yield from_file(config, others)
        return
    if any(item.startswith("+experiment=") for item in others) or (others and not letters):
        if letters:
            raise ConfigError(f"{' '.join(letters)}: give an experiment or letters of tasks, not both.")
        yield from_conf(others)
        return
    known = tasks()
    for letter in letters:
        if letter not in known:
            told = ", ".join(f"{key} ({name})" for key, name in known.items()) or "none: there is no ./conf/bench"
            raise ConfigError(f"no task {letter!r}; the tasks here are {told}. An experiment is +experiment=NAME.")
    wanted = letters or [letter for letter in STANDARD if letter in known]
    if not wanted:
        raise ConfigError("name what to bench: +experiment=NAME where ./conf is, or --config FILE.")
    for letter in wanted:
        yield from_conf([f"+experiment={known[letter]}", *others])


def _bench(bench: Bench, command: str, console: Console) -> bool:
    """Run one bench and show it; return whether every row is there."""
    # A configuration that does not compose is refused before anything is written.
    bench.experiment.config(0)
    with alone(bench.folder), ends_in_order():
        run = Run(bench, console)
        try:
            results = run()
        except KeyboardInterrupt:
            told = f"Stopped; the rows that are done are kept in {bench.folder}, the same command goes on."
            console.print(told, soft_wrap=True, highlight=False)
            raise SystemExit(_INTERRUPTED) from None
        leave(results, bench.folder, command)
    _show(results, bench.folder, console)
    return not results.failed


def _show(results: Results, folder: Path, console: Console) -> None:
    if results.rows:
        console.print(terminal(results, console.width))
    for number, sentence in enumerate(sentences(results)):
        console.print(Text(sentence, style="" if number else "bold"))
    console.print(Text(f"Table, picture and numbers: {folder / TEXT}"), soft_wrap=True)
