"""Writes the page: reads the runs, draws, fills the template, puts one file in place."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from esper import __version__
from esper.files import replacing
from esper.leyline.errors import ConfigError, OutputError
from esper.nissa.page import account_charts, growth_charts, tables
from esper.nissa.page.runs import Run, read_run, told_apart
from esper.nissa.page.story import paragraph
from esper.nissa.page.svg import Shown, Table
from esper.nissa.summary import verdict


class Chapter(NamedTuple):
    """One run in the page; `key` is its id there."""

    key: str
    title: str
    folder: str
    run_id: str
    story: str
    losses: Shown
    lattice: Shown | None
    ramps: Shown | None
    parameters: Shown
    gains: Shown | None
    account: Table
    decisions: list[tables.Decision]
    host_params: int
    tree: list[tables.Branch]
    kernels: Table
    events: Table
    forge: Table | None
    verdict: str


def write_page(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a page about one run or several, and return its path.

    Args:
        folders: folders of runs.
        out: HTML file to write; None is `report.html` in the first folder.

    Raises:
        ConfigError: no folder was given, or one is no run's.
        DataError: a run has no events.
        OutputError: a file cannot be read, or the page cannot be written.
    """
    if not folders:
        raise ConfigError("no run was given; give the folder of at least one.")
    target = Path(out) if out is not None else Path(folders[0]) / "report.html"
    text = render(told_apart([read_run(folder) for folder in folders]))
    try:
        with replacing(target) as file:
            file.write(text.encode())
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"cannot write {target}: {why}; choose another file with --out.") from error
    return target


def render(runs: Sequence[Run]) -> str:
    """Return the page of some runs as HTML."""
    environment = Environment(
        loader=PackageLoader("esper.nissa.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared = len(runs) > 1 or runs[0].twin is not None
    return environment.get_template("page.html").render(
        title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs",
        style=Markup(files("esper.nissa.page").joinpath("page.css").read_text(encoding="utf-8")),
        several=len(runs) > 1,
        table=tables.side_by_side(runs) if compared else None,
        comparison=account_charts.comparison(runs) if len(runs) > 1 else None,
        chapters=[chapter(run, f"run{place}") for place, run in enumerate(runs, start=1)],
        version=__version__,
    )


def chapter(run: Run, key: str) -> Chapter:
    """Return everything that the page tells about one run."""
    return Chapter(
        key=key,
        title=run.title,
        folder=str(run.folder),
        run_id=run.chronicle.run_id,
        story=paragraph(run),
        losses=growth_charts.losses(run, key),
        lattice=growth_charts.lattice(run, key),
        ramps=growth_charts.ramps(run, key),
        parameters=account_charts.parameters(run, key),
        gains=account_charts.gains(run, key),
        account=tables.account(run),
        decisions=tables.decisions(run.chronicle),
        host_params=run.chronicle.host_params,
        tree=tables.tree(run),
        kernels=tables.kernels(run),
        events=tables.happened(run),
        forge=tables.forge_events(run),
        verdict=verdict(*run.results()) if run.twin is not None else "",
    )
