"""What the folder of a run tells a page."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esper.leyline.errors import ConfigError, DataError
from esper.leyline.events import EpochEvent
from esper.nissa.chronicle import Chronicle
from esper.nissa.folder import read_chronicle
from esper.nissa.page.forge import ForgeFacts, forge_facts
from esper.nissa.summary import REPORT_FILE, RunResult, summarize

EVENTS = "events.jsonl"


class ReportLosses(NamedTuple):
    """Loss on the report part.

    Args:
        loss: mean; None if it was not measured, or not recorded.
        samples: that of each sample, in order; None where only the mean is known.
    """

    loss: float | None = None
    samples: tuple[float, ...] | None = None


class Run(NamedTuple):
    """One run as its folder tells it.

    Args:
        folder: where it is.
        title: name of the run, or of its folder.
        chronicle: what was heard.
        twin: the same run without growth; None if there was none.
        lineage: content of `lineage.json`; empty if the run has not ended.
        report: loss on the report part, and that of each sample.
        twin_report: the same of the twin.
        forge: what the run's forge knows; None if the run names none, or it cannot be read.
    """

    folder: Path
    title: str
    chronicle: Chronicle
    twin: Chronicle | None = None
    lineage: dict[str, Any] = {}
    report: ReportLosses = ReportLosses()
    twin_report: ReportLosses = ReportLosses()
    forge: ForgeFacts | None = None

    @property
    def report_loss(self) -> float | None:
        """Loss on the report part."""
        return self.report.loss

    @property
    def twin_report_loss(self) -> float | None:
        """The same of the twin."""
        return self.twin_report.loss

    def results(self) -> tuple[RunResult, RunResult | None]:
        """Return the run and its twin as results, which can be compared."""
        twin = None if self.twin is None else _result(self.twin, self.twin_report)
        return _result(self.chronicle, self.report), twin


def _result(chronicle: Chronicle, report: ReportLosses) -> RunResult:
    macs = next((e.metrics["macs"] for e in reversed(chronicle.of(EpochEvent)) if "macs" in e.metrics), None)
    return summarize(
        chronicle,
        title="",
        output_dir="",
        report_loss=report.loss,
        report_samples=report.samples,
        train_macs=None if macs is None else round(macs),
    )


def read_run(folder: str | Path) -> Run:
    """Read a run, and its twin where there is one.

    Raises:
        ConfigError: the folder is no run's.
        DataError: nothing has happened in it.
        OutputError: its files cannot be read.
    """
    path = Path(folder)
    chronicle = _chronicle(path)
    twin = path / "twin"
    without = _chronicle(twin) if (twin / EVENTS).is_file() else None
    return Run(
        folder=path,
        title=str(_json(path / "growth.json").get("title") or path.resolve().name),
        chronicle=chronicle,
        twin=without,
        lineage=_json(path / "lineage.json"),
        report=_report(path),
        twin_report=_report(twin) if without is not None else ReportLosses(),
        forge=forge_facts(path),
    )


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Return runs whose titles differ: where several share one, each gets its folder's name, else its number.

    Example:
        >>> runs = [Run(Path("a"), "demo", Chronicle()), Run(Path("b"), "demo", Chronicle())]
        >>> [run.title for run in told_apart(runs)]
        ['demo (a)', 'demo (b)']
    """
    named = [f"{run.title} ({run.folder.resolve().name})" if _shared(run, runs) else run.title for run in runs]
    numbered = [f"{name} #{i}" if named.count(name) > 1 else name for i, name in enumerate(named, start=1)]
    return [run._replace(title=title) for run, title in zip(runs, numbered, strict=True)]


def _shared(run: Run, runs: Sequence[Run]) -> bool:
    return sum(other.title == run.title for other in runs) > 1


def _chronicle(path: Path) -> Chronicle:
    if not (path / EVENTS).is_file():
        kind = "is no folder" if not path.is_dir() else f"holds no {EVENTS}"
        raise ConfigError(f"{path} {kind}, so it is no run; give the folder that a run wrote, e.g. outputs/demo/RUN.")
    chronicle = read_chronicle(path)
    if not chronicle.messages:
        raise DataError(f"{path / EVENTS} holds no event of a run yet; wait for its first boundary, or give another.")
    return chronicle


def _json(file: Path) -> dict[str, Any]:
    """Return what a file holds, or nothing for a run that has not written it yet."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _report(folder: Path) -> ReportLosses:
    """Return what the run kept of its report part, else the last report loss in its CSV logs."""
    told = _json(folder / REPORT_FILE)
    try:
        return ReportLosses(float(told["loss"]), tuple(map(float, told["samples"])) if told["samples"] else None)
    except (KeyError, TypeError, ValueError):
        return ReportLosses(_logged_loss(folder))


def _logged_loss(folder: Path) -> float | None:
    """Return the last report loss in the CSV logs of a run; the newest log that has one counts."""
    files = sorted((folder / "csv").rglob("metrics.csv"), key=lambda file: file.stat().st_mtime, reverse=True)
    return next((loss for file in files if (loss := _last(file, "report_loss")) is not None), None)


def _last(file: Path, column: str) -> float | None:
    """Return the last number in a column of a CSV file; None if it has none, or the file is damaged."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            told = [float(row[column]) for row in csv.DictReader(lines) if row.get(column)]
    except ValueError:
        return None
    return told[-1] if told and math.isfinite(told[-1]) else None
