"""What W&B is told at the end of a run: the content of the report page as tables, charts, numbers and an artifact.

Everything is made when it is asked for, so that one thing that cannot be made does not cost the others.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from esper.leyline.errors import OutputError
from esper.nissa.page.page import render
from esper.nissa.page.runs import Run
from esper.nissa.page.tables import decisions, kernel_ids
from esper.nissa.paired import paired_interval
from esper.nissa.summary import GraftLine, graft_lines, verdict
from esper.nissa.wandb.place import PREFIX, Place
from esper.tolaria.saved import read_topology

if TYPE_CHECKING:
    import wandb


class Sheet(NamedTuple):
    """A table with its values as they are, not as words."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def parts(run: Run) -> dict[str, Callable[[], Any]]:
    """Return by key what makes each table, chart and picture; a maker returns None where there is nothing to show."""
    made: dict[str, Callable[[], Any]] = {
        "tried": lambda: _table(tried(run)),
        "decisions": lambda: _table(decided(run)),
        "gain_by_kind": lambda: _bars(gain_by_kind(run)),
        "alphas": lambda: _lines({seed: ramp.points for seed, ramp in run.chronicle.ramps.of.items()}, "Alpha"),
        "parameters": lambda: _lines(parameters(run), "Parameters that growth added, and those of them kept"),
        "picture": lambda: _picture(run.folder / "growth.png"),
        "page": lambda: _page(run),
    }
    return {f"{PREFIX}/{name}": maker for name, maker in made.items()}


# --- tables ---------------------------------------------------------------------------------------------------------


def tried(run: Run) -> Sheet:
    """Return every adaptation with its outcome, gain, interval, price, parameters and kernel."""
    names = ("seed_id", "blueprint", "outcome", "reason", "gain", "lower", "upper", "samples", "price", "params")
    columns = (*names, "born", "ended", "group", "kernel")
    lines = zip(graft_lines(run.chronicle), kernel_ids(run.chronicle), strict=True)
    rows = [(*(getattr(line, name) for name in columns), kernel) for line, kernel in lines]
    return Sheet((*columns, "kernel_id"), rows)


def decided(run: Run) -> Sheet:
    """Return every decision with its explanation, what it chose, and what became of it at once."""
    rows = [
        (int(d.step.replace(",", "")), d.explanation, _chosen(d.candidates), "\n".join(d.followed))
        for d in decisions(run.chronicle)
    ]
    return Sheet(("step", "explanation", "chosen", "followed"), rows)


def _chosen(candidates: Any) -> str:
    weighed = candidates.rows if candidates is not None else ()
    return ", ".join(f"{blueprint} at {seed}" for seed, blueprint, chosen, *_ in weighed if chosen == "yes")


def gain_by_kind(run: Run) -> Sheet:
    """Return the mean measured gain of each kind, and beside it the mean price that it had to pay for."""
    kinds: dict[str, list[GraftLine]] = defaultdict(list)
    for line in graft_lines(run.chronicle):
        if line.gain is not None:
            kinds[line.blueprint].append(line)
    rows: list[tuple[Any, ...]] = []
    for kind, lines in kinds.items():
        rows.append((f"{kind}: gain", fmean(line.gain for line in lines if line.gain is not None)))
        rows.append((f"{kind}: price", fmean(line.price for line in lines)))
    return Sheet(("kind", "loss"), rows)


def parameters(run: Run) -> dict[str, Sequence[tuple[int, int]]]:
    """Return the parameters that growth added, and those of what was kept, over the steps."""
    chronicle = run.chronicle
    return {"added": chronicle.added_params_over_time, "kept": chronicle.kept_params_over_time}


def _table(sheet: Sheet) -> Any:
    import wandb

    return wandb.Table(columns=list(sheet.columns), data=[list(row) for row in sheet.rows]) if sheet.rows else None


# --- charts, picture, page ------------------------------------------------------------------------------------------


def _bars(sheet: Sheet) -> Any:
    import wandb

    label, value = sheet.columns
    table = _table(sheet)
    return table and wandb.plot.bar(table, label, value, title="Mean gain of each kind, and its price")


def _lines(series: Mapping[str, Sequence[tuple[int, float]]], title: str) -> Any:
    import wandb

    told = {name: points for name, points in series.items() if points}
    if not told:
        return None
    xs = [[step for step, _ in points] for points in told.values()]
    ys = [[value for _, value in points] for points in told.values()]
    return wandb.plot.line_series(xs, ys, keys=list(told), title=title, xname="step")


def _picture(file: Path) -> Any:
    import wandb

    if not file.is_file():
        raise OutputError(f"{file} is not there.")
    return wandb.Image(str(file))


def _page(run: Run) -> Any:
    import wandb

    return wandb.Html(render([run]), inject=False, data_is_not_path=True)


# --- numbers and the saved model ------------------------------------------------------------------------------------


def numbers(run: Run) -> dict[str, Any]:
    """Return what the run came to; what was not measured is left out."""
    grown, twin = run.results()
    interval = paired_interval(run.twin_report.samples, run.report.samples)
    found = {
        "verdict": verdict(grown, twin),
        "policy": run.chronicle.policy,
        "report_loss": run.report_loss,
        "report_loss_without_growth": run.twin_report_loss,
        "params_before": grown.host_params,
        "params_added": grown.added_params,
        "adaptations_tried": len(grown.grafts),
        "adaptations_kept": sum(line.kept for line in grown.grafts),
        "search_share": grown.search_share,
        "paired_gain": interval and interval.mean,
        "paired_gain_lower": interval and interval.lower,
        "paired_gain_upper": interval and interval.upper,
    }
    return {f"{PREFIX}/{name}": value for name, value in found.items() if value is not None}


def model(run: Run, run_id: str) -> "wandb.Artifact":
    """Return the saved model as an artifact, with `growth.json`, and its lineage as metadata.

    Raises:
        OutputError: the run has saved none.
        CheckpointError: what it has saved is damaged.
    """
    import wandb

    saved = run.folder / "model"
    if not saved.is_dir():
        raise OutputError(f"{saved} is not there.")
    artifact = wandb.Artifact(f"model-{run_id}", "model", description=run.title, metadata=ancestry(run, run_id))
    artifact.add_dir(str(saved))
    artifact.add_file(str(run.folder / "growth.json"))
    return artifact


def ancestry(run: Run, run_id: str) -> dict[str, Any]:
    """Return where a saved model comes from: its host, the runs, and each child with its kernel, hash and evidence."""
    topology = read_topology(run.folder / "model")
    twin = Place.read(run.folder / "twin")
    return {
        "kept": run.lineage.get("fossils", []),
        "host_params": run.lineage.get("host_params"),
        "added_params": run.lineage.get("added_params"),
        "weights_sha256": topology.get("weights_sha256"),
        "topology_sha256": topology.get("sha256"),
        "parents": {
            "host": topology.get("host"),
            "run": run_id,
            "esper_run": run.chronicle.run_id,
            "run_without_growth": twin.id if twin is not None else None,
        },
    }
