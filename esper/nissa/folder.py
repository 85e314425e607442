"""The folder of a run: checked before training, written after it, read back for a resume or a comparison."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from esper.leyline.base import Message
from esper.leyline.codec import REGISTRY, from_json
from esper.leyline.errors import ContractError, OutputError
from esper.leyline.events import EpochEvent, RunEvent
from esper.leyline.reports import FieldReport
from esper.nissa.chronicle import Chronicle
from esper.nissa.curve import LossCurve
from esper.nissa.ramps import Ramps
from esper.nissa.summary import graft_lines

FORMAT = 1
"""Version of `growth.json`."""


def require_writable(folder: str | Path) -> Path:
    """Make the folder and prove that a file can be written to it.

    Raises:
        OutputError: it cannot.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            return path
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"cannot write to {path}: {why}; choose another output folder.") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON that every reader takes: numbers that are not finite become null.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def growth_summary(chronicle: Chronicle, title: str = "") -> dict[str, Any]:
    """Return the content of `growth.json`: what was tried, what was kept, at what price, and the losses."""
    host, added = chronicle.host_params, chronicle.added_params
    return {
        "format": FORMAT,
        "title": title,
        "run_id": chronicle.run_id,
        "policy": chronicle.policy,
        "steps": chronicle.steps,
        "params": {"before": host, "added": added, "after": host + added},
        "price_per_kparam": chronicle.price_per_kparam,
        "search_share": chronicle.search_share,
        "grafts": [vars(line) for line in graft_lines(chronicle)],
        "explanations": [{"step": step, "text": text} for step, text in chronicle.explanations],
        "losses": {
            "train": chronicle.train_losses,
            "train_stride": chronicle.curve.stride,
            "decision": chronicle.decision_losses,
        },
        "added_params": chronicle.added_params_over_time,
        "alphas": chronicle.ramps.to_plain(),
    }


def read_chronicle(folder: str | Path, run_id: str | None = None, until: int | None = None) -> Chronicle:
    """Read a run back from its folder.

    Args:
        folder: holds `events.jsonl` and `fieldreports.jsonl`, and `growth.json` once the run has ended.
        run_id: the run; None takes the last one in the folder.
        until: forget events after this step; None keeps all.
    """
    path = Path(folder)
    events = [m for m in _messages(path / "events.jsonl") if isinstance(m, RunEvent)]
    reports = [m for m in _messages(path / "fieldreports.jsonl") if isinstance(m, FieldReport)]
    chronicle = chronicle_of(events, reports, run_id, until)
    try:
        summary = json.loads((path / "growth.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return chronicle
    add_summary(chronicle, summary, math.inf if until is None else until)
    return chronicle


def chronicle_of(
    events: Sequence[RunEvent], reports: Sequence[FieldReport], run_id: str | None = None, until: int | None = None
) -> Chronicle:
    """Tell one run from the events and field reports of a folder.

    Args:
        events: of any runs, in order.
        reports: the same.
        run_id: the run; None takes that of the last event.
        until: forget events after this step; None keeps all.
    """
    chosen = run_id if run_id is not None else next((m.run_id for m in reversed(events)), "")
    chronicle = Chronicle(run_id=chosen)
    for event in events:
        if event.run_id == chosen and (until is None or event.step <= until):
            chronicle.hear(event)
    _add_reports(chronicle, [report for report in reports if report.run_id == chosen])
    return chronicle


def _messages(file: Path) -> list[Message]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {file}: {error}.") from error
    found, damaged = [], 0
    for line in lines:
        try:
            found.append(from_json(REGISTRY, line))
        except ContractError:
            damaged += 1
    if damaged:
        # Lightning takes seconds to import, which whoever only looks at a run need not pay.
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(f"Esper: {damaged} lines of {file} cannot be read and are left out.")
    return found


def _add_reports(chronicle: Chronicle, reports: list[FieldReport]) -> None:
    """Add as many reports as lives have ended; a resumed run writes those of its replayed part twice."""
    ended = [life.seed_id for life in chronicle.lives() if life.outcome is not None]
    unique = list({report.model_dump_json(): report for report in reports}.values())
    for seed in dict.fromkeys(ended):
        own = [report for report in unique if report.seed_id == seed]
        for report in own[: ended.count(seed)]:
            chronicle.hear(report)


def add_summary(chronicle: Chronicle, summary: Any, until: float = math.inf) -> None:
    """Take from `growth.json` what the events do not tell; that of another run, or of another format, is left alone.

    Args:
        chronicle: the run.
        summary: content of the file.
        until: forget what came after this step.
    """
    if isinstance(summary, dict) and summary.get("format") == FORMAT and summary["run_id"] == chronicle.run_id:
        chronicle.policy, chronicle.host_params = summary["policy"], summary["params"]["before"]
        chronicle.price_per_kparam = summary["price_per_kparam"]
        points = [(step, math.nan if loss is None else loss) for step, loss in summary["losses"]["train"]]
        chronicle.curve = LossCurve([point for point in points if point[0] <= until], summary["losses"]["train_stride"])
        # Runs of an earlier release noted no alphas.
        chronicle.ramps = Ramps.from_plain(summary.get("alphas", {})).until(until)
        # Under the policy `off` the journal has no decision losses, the report's own measurement has.
        decision = dict(summary["losses"]["decision"])
        chronicle.messages = [_with_loss(m, decision) for m in chronicle.messages]


def _with_loss(message: Message, decision: dict[int, float]) -> Message:
    if isinstance(message, EpochEvent) and message.validation_loss is None and message.step in decision:
        return message.model_copy(update={"validation_loss": decision[message.step]})
    return message
