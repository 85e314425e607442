"""Makes one row in a process of its own.

`python -m esper.bench.stability.worker FOLDER` reads `job.json` there and writes `row.json` beside it.
"""

import argparse
import json
import logging
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from esper import __version__
from esper.bench.rows import FORMAT, JOB_FILE, ROW_FILE, write
from esper.bench.stability import defects, efficiency, grafts
from esper.console import plain_errors

HOSTS: Final = "hosts"
"""Folder beside those of the runs, of the trained hosts that rows share."""

_ROWS: Final = {"grafts": grafts.row, "defects": defects.row, "efficiency": efficiency.row}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the row of a folder's job."""
    parser = argparse.ArgumentParser(prog="esper.bench.stability.worker", description="Make one row of the bench.")
    parser.add_argument("folder", type=Path, help="holds job.json")
    folder: Path = parser.parse_args(argv).folder
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with plain_errors():
        config = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))["config"]
        found = _ROWS[config["part"]](config, folder.parent.parent / HOSTS)
        write(folder / ROW_FILE, found | {"format": FORMAT, "versions": versions()})
    return 0


def versions() -> str:
    """Return what a row was made with."""
    python, machine = platform.python_version(), platform.machine()
    return f"esper {__version__}, torch {torch.__version__}, Python {python}, {machine}, one thread"


if __name__ == "__main__":
    raise SystemExit(main())
