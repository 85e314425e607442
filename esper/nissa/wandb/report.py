"""A W&B Report about runs that were logged there: the story of the page, with W&B's own panels over the runs."""

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from esper.leyline.errors import ConfigError, EsperError, OutputError
from esper.nissa.page.runs import Run, read_run, told_apart
from esper.nissa.page.story import paragraph
from esper.nissa.page.tables import tree
from esper.nissa.summary import GraftLine, graft_lines, number, verdict
from esper.nissa.wandb.key import has_wandb_key
from esper.nissa.wandb.place import PREFIX, WANDB_FILE, Place

TIMEOUT_S = "20"
"""How long one question to W&B may take, unless WANDB_HTTP_TIMEOUT says otherwise."""

MAX_TITLE = 128
"""Most characters that W&B takes as a title."""

STEP = "trainer/global_step"
PANELS = (
    ("Loss on the decision part", "esper/decision_loss"),
    ("Parameters that growth added", "esper/added_params"),
    ("Training loss", "train_loss"),
)
"""Title and metric of each panel over the steps."""


class Logged(NamedTuple):
    """A run of ours, and those of W&B that it and its twin were logged to."""

    run: Run
    places: tuple[Place, ...]


def send_report(folders: Sequence[str | Path], *, entity: str | None = None, project: str | None = None) -> str:
    """Build a report about runs in W&B, and return its address.

    Args:
        folders: of the runs.
        entity: user or team that the runs were sent to; None takes what the run recorded, then that of the key.
        project: where they were sent to; None takes what the run recorded.

    Raises:
        ConfigError: a folder is no run's, the run was not logged to W&B or never sent, or there is no key.
        DataError: a run has no events.
        OutputError: W&B does not answer, or does not take the report.
    """
    logged = [_logged(run) for run in told_apart([read_run(folder) for folder in folders])]
    if not has_wandb_key():
        raise ConfigError("a W&B report needs a key: set WANDB_API_KEY or run `wandb login`; or leave --wandb out.")
    # wandb reads this once, at its import.
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", TIMEOUT_S)
    try:
        return _send(logged, entity, project)
    except EsperError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a W&B report needs the package {error.name}: pip install wandb wandb-workspaces."
        ) from error
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise OutputError(f"W&B did not take the report: {type(error).__name__}: {text}") from error


def _logged(run: Run) -> Logged:
    there = (run.folder, run.folder / "twin")
    own, twin = ((place := Place.read(folder)) and place._replace(files=str(folder / place.files)) for folder in there)
    if own is None:
        raise ConfigError(
            f"{run.folder} holds no {WANDB_FILE}, so W&B does not know the run; train with logger=wandb or "
            "logger=wandb_online, or leave --wandb out."
        )
    return Logged(run, (own,) if twin is None else (own, twin))


def _send(logged: Sequence[Logged], entity: str | None, project: str | None) -> str:
    import wandb

    reports = _reports()
    api = wandb.Api()
    found = [Logged(run, tuple(_found(api, place, entity, project) for place in places)) for run, places in logged]
    home = found[0].places[0]
    title = logged[0].run.title if len(logged) == 1 else f"{len(logged)} runs"
    report = reports.Report(
        entity=home.entity, project=home.project, title=title[:MAX_TITLE], blocks=list(_blocks(found)), width="readable"
    )
    report.save()
    return str(report.url)


def _found(api: Any, place: Place, entity: str | None, project: str | None) -> Place:
    """Return where W&B really has a run.

    Raises:
        ConfigError: it has none there.
    """
    from wandb.apis.public.runs import RunNotFoundError
    from wandb.errors import CommError

    there = place._replace(entity=entity or place.entity or str(api.default_entity), project=project or place.project)
    path = f"{there.entity}/{there.project}/{there.id}"
    try:
        api.run(path)
    except (CommError, RunNotFoundError) as error:
        if not isinstance(getattr(error, "exc", error), RunNotFoundError):
            raise
        send = f"send it with `wandb sync {place.files}`, or " if place.offline else ""
        raise ConfigError(
            f"W&B has no run {path}; {send}say with --entity and --project where it was sent to."
        ) from error
    return there


def _reports() -> Any:
    """Return what reports are made of; the module does not declare its names to type checkers."""
    return import_module("wandb_workspaces.reports.v2")


# --- blocks ---------------------------------------------------------------------------------------------------------


def _blocks(found: Sequence[Logged]) -> Iterator[Any]:
    reports = _reports()
    for run, _ in found:
        yield reports.H1(run.title)
        yield reports.P(paragraph(run))
        yield reports.CalloutBlock(verdict(*run.results()))
    yield _grid(found)
    for run, _ in found:
        yield reports.H2(f"What was tried: {run.title}")
        yield reports.MarkdownBlock(adaptations(run))
        yield reports.H2(f"Lineage: {run.title}")
        yield reports.MarkdownBlock(lineage(run))


def _grid(found: Sequence[Logged]) -> Any:
    import wandb_workspaces.expr as expr

    reports = _reports()
    runsets = [
        reports.Runset(
            entity=places[0].entity,
            project=places[0].project,
            name=run.title,
            filters=[expr.Metric("ID").isin([place.id for place in places])],
        )
        for run, places in found
    ]
    lines = [reports.LinePlot(title=title, x=STEP, y=[metric]) for title, metric in PANELS]
    bars = reports.BarPlot(title="Loss on the report part", metrics=[f"{PREFIX}/report_loss"])
    return reports.PanelGrid(runsets=runsets, panels=[*lines, bars])


def adaptations(run: Run) -> str:
    """Return everything that was tried as a table in markdown."""
    head = ("seed", "blueprint", "outcome", "gain", "interval", "price", "parameters", "kernel")
    rows = [_row(line) for line in graft_lines(run.chronicle)]
    if not rows:
        return "Nothing was tried."
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in (head, ("---",) * len(head), *rows))


def _row(line: GraftLine) -> tuple[str, ...]:
    outcome = " ".join(f"{line.outcome} {line.reason and f'({line.reason})'}".lower().replace("_", " ").split())
    measured = line.gain is not None and line.lower is not None and line.upper is not None
    return (
        line.seed_id,
        line.blueprint,
        outcome,
        number(line.gain) if line.gain is not None else "–",
        f"{number(line.lower)} to {number(line.upper)}" if measured else "–",  # type: ignore[arg-type]
        number(line.price),
        f"{line.params:,}",
        line.kernel or "–",
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def lineage(run: Run) -> str:
    """Return what was kept, layer by layer, as a list in markdown."""
    lines = [f"- {run.chronicle.host_params:,} parameters before growth"]
    for branch in tree(run):
        lines.append(f"- `{branch.layer}`")
        lines += [f"  - {f.blueprint} at `{f.seed_id}`: {'; '.join(f.facts)}" for f in branch.fossils]
    return "\n".join(lines if len(lines) > 1 else [*lines, "- nothing was kept"])
