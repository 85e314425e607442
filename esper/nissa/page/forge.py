"""What the forge of a run knows: the measured risk of its kernels, and what happened in the forge meanwhile."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from esper.forge.commands import store_of
from esper.forge.link import Places
from esper.leyline.errors import EsperError, StoreError
from esper.leyline.kernels import ArtifactStatus
from esper.nissa.page.events import words
from esper.nissa.watch.live import FILE, Live, read_live
from esper.urza.ledger import Entry
from esper.urza.store import Urza

CONFIG = "config.yaml"

_TOLD = {ArtifactStatus.VALIDATED, ArtifactStatus.REJECTED, ArtifactStatus.INVALID}


class Risk(NamedTuple):
    """Urabrask's verdict on a kernel: risk from 0 (safe) to 1, and the confidence in it, 0 to 1."""

    score: float
    confidence: float


class ForgeFacts(NamedTuple):
    """What a forge knows of one run.

    Args:
        risks: verdict by kernel id, of the kernels that were tried out.
        events: seconds since the run began, what happened, to what, and why; None where the run does not tell when it
            ran.
    """

    risks: dict[str, Risk]
    events: list[tuple[str, str, str, str]] | None


def forge_facts(folder: Path) -> ForgeFacts | None:
    """Return what the forge that a run's folder names knows; None if it names none, or none can be read there."""
    places = _places(folder)
    if places is None:
        return None
    try:
        with store_of(str(places.root)) as urza:
            return ForgeFacts(dict(_risks(urza)), _events(urza, folder))
    except EsperError:
        return None


def _places(folder: Path) -> Places | None:
    """Return the forge's folder; None for a run without one. A relative one is that of where the run was started."""
    try:
        told = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))["forge"]
        root = Path(told["root"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    if told.get("enabled") is False:
        return None
    inside = folder.resolve()
    starts = [Path.cwd(), inside, *inside.parents]
    found = (Places(start / root) for start in starts)
    return next((places for places in found if places.store.is_dir()), None)


def _risks(urza: Urza) -> Iterator[tuple[str, Risk]]:
    for kernel in urza.kernels():
        report = kernel.validation_report
        if report is not None:
            yield kernel.id, Risk(report.risk_score, report.conf_level)


def _events(urza: Urza, folder: Path) -> list[tuple[str, str, str, str]] | None:
    run = _live(folder)
    if run is None:
        return None
    names = {kernel.id: kernel.name for kernel in urza.kernels()} | {b.id: b.name for b in urza.blueprints()}
    during = (entry for entry in urza.ledger.entries() if run.began <= entry.time <= run.time)
    try:
        return [_row(entry, names, run.began) for entry in during if entry.action == "alert" or entry.after in _TOLD]
    except StoreError:  # `esper doctor --store` tells what is damaged.
        return None


def _row(entry: Entry, names: dict[str, str], began: float) -> tuple[str, str, str, str]:
    name = names.get(entry.subject)
    what = "alert" if entry.action == "alert" else words(entry.after)
    return f"{entry.time - began:.0f}", what, f"{name} · {entry.subject}" if name else entry.subject, entry.detail


def _live(folder: Path) -> Live | None:
    try:
        found = read_live((folder / FILE).read_bytes())
    except OSError:
        return None
    return found if found is not None and found.began else None
