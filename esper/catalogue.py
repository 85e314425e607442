"""`esper blueprints`: list what may grow, show one blueprint, compare two, try one on a model without training it."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

import yaml

from esper.blueprints import Blueprint, BlueprintIR, Library, SiteShape, fit_dims, load_library
from esper.blueprints.capabilities import CAPABILITIES, lacking, require_capabilities
from esper.blueprints.dims import resolve_dims
from esper.blueprints.estimate import reference
from esper.blueprints.library import read_blueprint
from esper.leyline.errors import BlueprintDoesNotFit, ConfigError, EsperError


def blueprints(args: Sequence[str]) -> int:
    """Run a command over the library and return its exit status.

    Example:
        >>> blueprints(["list", "--layout", "bchw", "--json"])
        [...BP-CONV-RES...]
        0
    """
    commands: Mapping[str, Callable[[Sequence[str]], int]] = {
        "list": _list,
        "show": _show,
        "diff": _diff,
        "dryrun": _dryrun,
    }
    name = args[0] if args and not args[0].startswith("-") else "list"
    if name not in commands:
        raise ConfigError(f"unknown command 'blueprints {name}'; known: {', '.join(commands)}, submit, ask.")
    return commands[name](args[1:] if args and args[0] == name else args)


def known(name: str) -> Blueprint:
    """Return a blueprint of the library by its name, or one of one's own by its file.

    Raises:
        BlueprintError: there is none, or the file is malformed.

    Example:
        >>> known("BP-CANON").manifest.family
        'token-conv'
    """
    return read_blueprint(Path(name)) if name.endswith((".yaml", ".yml")) else load_library()[name]


# --- list -----------------------------------------------------------------------------------------------------------


def _list(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esper blueprints list", description="List what may grow.")
    parser.add_argument("--layout", choices=("btd", "bd", "bchw"), help="only those that serve this layout")
    parser.add_argument("--family", help="only those of this family")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(args)
    chosen = [
        blueprint
        for blueprint in load_library()
        if given.layout in (None, *blueprint.ir.layouts) and given.family in (None, blueprint.manifest.family)
    ]
    if given.json:
        print(json.dumps([_record(blueprint) for blueprint in chosen], indent=2))
    else:
        _print_table(chosen)
    return 0


def _record(blueprint: Blueprint) -> dict[str, Any]:
    ir, manifest = blueprint.ir, blueprint.manifest
    return {
        "name": ir.name,
        "version": ir.version,
        "id": ir.id,
        "reads": [ir.reads, *ir.also_reads],
        "layouts": list(ir.layouts),
        "site_kinds": list(ir.site_kinds),
        "safety_tier": manifest.safety_tier,
        "lacking": lacking(ir),
        **manifest.model_dump(mode="json"),
    }


def _print_table(chosen: Sequence[Blueprint]) -> None:
    console, table = _table("blueprint", "layouts", "gain", "risk", "what it is")
    for blueprint in chosen:
        ir, manifest = blueprint.ir, blueprint.manifest
        notes = " Merges into its host." if manifest.mergeable else ""
        notes += "".join(f" Needs {CAPABILITIES[need].needs}." for need in lacking(ir))
        gain, risk = f"{manifest.benefit_prior[0]:.2f}", f"{manifest.risk_score:.2f}"
        table.add_row(ir.name, " ".join(ir.layouts), gain, risk, manifest.summary + notes)
    console.print(table)
    console.print("gain, risk: priors from 0 to 1, which field reports overrule.", style="dim")


def _table(*titles: str) -> tuple[Any, Any]:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for title in titles[:-1]:
        table.add_column(title, no_wrap=True)
    table.add_column(titles[-1])
    return Console(), table


# --- show and diff --------------------------------------------------------------------------------------------------


def _show(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="esper blueprints show", description="Show a blueprint.")
    parser.add_argument("name", help="name in the library, or a YAML file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(args)
    blueprint = known(given.name)
    whole = _record(blueprint) | {"cost": _cost(blueprint)}
    if given.json:
        print(json.dumps(whole | {"ir": blueprint.ir.model_dump(mode="json")}, indent=2))
        return 0
    print(f"# {blueprint.ir.full_name}, {blueprint.ir.id}")
    print(f"# {_story(blueprint)}")
    print(_text(blueprint), end="")
    return 0


def _cost(blueprint: Blueprint) -> dict[str, Any] | None:
    """Return what it costs at the reference place; None if it does not fit there."""
    site = reference(blueprint.ir)
    if site is None:
        return None
    price = blueprint.estimate(site)
    return {
        "site": site._asdict(),
        "params": price.params,
        "flops": 2 * price.macs,
        "latency_ms": price.latency_ms,
        "memory_mb": price.memory_mb,
    }


def _story(blueprint: Blueprint) -> str:
    price, needs = _cost(blueprint), [CAPABILITIES[need].needs for need in blueprint.ir.requires]
    parts = [f"safety tier {blueprint.manifest.safety_tier}"]
    if price is not None:
        parts.append(
            f"at {price['site']['layout']} of {price['site']['d_out']} features and {price['site']['tokens']} "
            f"positions: {price['params']:,} parameters, {price['flops']:,} FLOPs a sample"
        )
    if needs:
        offered = "not offered here" if lacking(blueprint.ir) else "offered here"
        parts.append(f"needs {' and '.join(needs)} ({offered})")
    return "; ".join(parts)


def _text(blueprint: Blueprint) -> str:
    """Return a blueprint as a file would hold it, every default written out."""
    whole = {"ir": blueprint.ir.model_dump(mode="json"), "manifest": blueprint.manifest.model_dump(mode="json")}
    return yaml.safe_dump(whole, sort_keys=False, default_flow_style=None, width=120)


def _diff(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="esper blueprints diff", description="Compare two blueprints; the exit status is 1 where they differ."
    )
    parser.add_argument("one", help="name in the library, or a YAML file")
    parser.add_argument("other", help="the same")
    given = parser.parse_args(args)
    one, other = (_text(known(name)).splitlines() for name in (given.one, given.other))
    lines = list(unified_diff(one, other, given.one, given.other, n=1, lineterm=""))
    print("\n".join(lines) if lines else "They are the same.")
    return int(bool(lines))


# --- dry run --------------------------------------------------------------------------------------------------------


def _dryrun(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="esper blueprints dryrun",
        description="Say where in a model a blueprint fits and what it costs there; it is built and run once at each "
        "place. The exit status is 1 if it fits nowhere.",
    )
    parser.add_argument("name", help="name in the library, or a YAML file")
    parser.add_argument("model", metavar="FILE.py:FACTORY", help="factory of the model, or of (model, example batch)")
    parser.add_argument("--site", nargs="+", metavar="GLOB", help="module paths; default: the usual families")
    parser.add_argument("--input", action="append", metavar="SHAPE", help="2x3x32x32, 2x16:int100 or name=SHAPE")
    parser.add_argument("--max-params", type=int, metavar="N", help="most parameters; default: the usual sizes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(args)
    blueprint, records = known(given.name), list[dict[str, Any]]()
    records += _tried(blueprint, given.model, given.site, given.input, given.max_params)
    if given.json:
        print(json.dumps(records, indent=2))
    else:
        _print_trial(blueprint, records)
    return 0 if any(record["why_not"] is None for record in records) else 1


def _tried(
    blueprint: Blueprint, model: str, sites: Sequence[str] | None, inputs: Sequence[str] | None, budget: int | None
) -> Iterator[dict[str, Any]]:
    """Yield what a blueprint does at each place of a model, those that take no seeds at all last."""
    # Torch's half of Esper takes seconds to import, which the other commands need not pay.
    from esper.doctor import load_patient, parse_inputs, probe
    from esper.kasmina.wrapper import wrap
    from esper.tamiyo import observe

    patient = load_patient(model)
    batch = parse_inputs(inputs) if inputs else patient.batch
    if batch is None:
        raise ConfigError("a dry run needs a batch: let the factory return (model, batch), or say --input 2x3x32x32.")
    wrapped = wrap(patient.model, targets=sites)
    probe(wrapped, batch)
    for site in observe.sites(wrapped.bank):
        yield _at(blueprint, site, budget)
    for path, reason in sorted(wrapped.bank.refused.items()):
        yield {"path": path, "why_not": f"no seeds: {reason}"}


def _at(blueprint: Blueprint, site: Any, budget: int | None) -> dict[str, Any]:
    """Size a blueprint for a place, build it and run it once, forward and backward."""
    from esper.kasmina.kernels import KernelRequest
    from esper.kasmina.library_store import LibraryKernelStore

    shape: SiteShape = site.shape
    record = {"path": site.path, **shape._asdict()}
    try:
        ir, dims = _sized(blueprint.ir, site, budget)
        request = KernelRequest(ir.name, shape, ir.reads, tuple(sorted(dims.items())))
        kernel = LibraryKernelStore(Library([blueprint])).wait(request)
    except EsperError as error:
        return record | {"why_not": str(error)}
    return record | {"reads": ir.reads, "dims": dims, "params": kernel.params, "macs": kernel.macs, "why_not": None}


def _sized(ir: BlueprintIR, site: Any, budget: int | None) -> tuple[BlueprintIR, dict[str, int]]:
    from esper.tamiyo.menu import placed

    there = placed(ir, site)
    if there is None:
        raise BlueprintDoesNotFit(f"{ir.name} reads the site's input, which has other positions than its output.")
    require_capabilities(there)
    sizes = fit_dims(there, site.shape, budget) if budget is not None else resolve_dims(there, site.shape, None)
    return there, {name: size for name, size in sizes.items() if there.dims[name].free}


def _print_trial(blueprint: Blueprint, records: Sequence[Mapping[str, Any]]) -> None:
    console, table = _table("site", "reads", "parameters", "MACs a sample")
    misfits: dict[str, list[str]] = {}
    for record in records:
        if record["why_not"] is None:
            table.add_row(record["path"], record["reads"], f"{record['params']:,}", f"{record['macs']:,}")
        else:
            misfits.setdefault(record["why_not"], []).append(record["path"])
    console.print(f"{blueprint.ir.full_name} fits {table.row_count} of {len(records)} places.", highlight=False)
    if table.row_count:
        console.print(table)
    for reason, paths in misfits.items():
        console.print(f"Not at {', '.join(paths)}: {reason}", highlight=False)
