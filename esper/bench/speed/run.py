"""Measures one row after the other; one that fails is told, and the others go on."""

import gc
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from esper.bench.progress import duration
from esper.bench.rows import write
from esper.bench.speed.machine import machine
from esper.bench.speed.rows import ROWS, Effort
from esper.bench.speed.table import Results, markdown
from esper.files import replacing
from esper.leyline.errors import OutputError

TEXT, NUMBERS = "speed.md", "speed.json"

_log = logging.getLogger(__name__)


def measure(
    names: Sequence[str],
    effort: Effort,
    command: str,
    console: Console,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure some rows.

    Args:
        names: of the rows, in any order.
        effort: how much is done.
        command: what makes the results again.
        console: hears of each row while it is measured.
        keep: is given what is there after each row.
    """
    results = Results(command, effort.quick, machine())
    with _one_thread():
        for name in (name for name in ROWS if name in names):
            _row(name, effort, results, console)
            results.load_after = [round(load, 2) for load in os.getloadavg()]
            keep(results)
    return results


def _row(name: str, effort: Effort, results: Results, console: Console) -> None:
    row = ROWS[name]
    console.print(Text(f"{name}: {row.about} ..."), soft_wrap=True)
    gc.collect()
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.lines[name] = row.measure(effort)
    except Exception as error:  # whatever goes wrong in one row, the others are wanted
        _log.debug("%s failed", name, exc_info=True)
        results.failed[name] = f"{type(error).__name__}: {error}"
        console.print(Text(f"  failed: {results.failed[name]}", style="red"), soft_wrap=True)
    results.seconds[name] = time.perf_counter() - began
    if name in results.lines:
        console.print(Text(f"  {duration(results.seconds[name])}", style="dim"))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def leave(results: Results, folder: Path) -> None:
    """Write the table and the numbers.

    Raises:
        OutputError: the folder cannot be written.
    """
    write(folder / NUMBERS, results.plain())
    try:
        with replacing(folder / TEXT) as file:
            file.write(markdown(results).encode())
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}; give another --out.") from error
