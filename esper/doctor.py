"""`esper doctor`: which places of a model take seeds, what fits there, and why the others do not."""

import argparse
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper.blueprints import load_library
from esper.kasmina.decoding import mixes_tokens
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.sites import fused_sites
from esper.kasmina.wrapper import MorphableModel, wrap
from esper.leyline.errors import ConfigError, EsperError
from esper.tamiyo import observe
from esper.tamiyo.menu import Menu, Room

_USAGE = "give it as FILE.py:FACTORY or package.module:FACTORY, for example model.py:build"
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::int(?P<high>[1-9]\d*))?")
_NO_LIMIT = 1 << 40


class Patient(NamedTuple):
    """What is examined.

    Args:
        model: the model.
        batch: a tensor, a tuple of arguments, a dict of keyword arguments, or None.
    """

    model: nn.Module
    batch: Any = None


# --- what the user names --------------------------------------------------------------------------------------------


def load_patient(spec: str) -> Patient:
    """Call the factory that `FILE.py:FACTORY` names; it returns a module, or a module and an example batch.

    Raises:
        ConfigError: the file or factory is missing, it fails, or it returns something else.

    Example:
        >>> load_patient("torch.nn:Identity").model
        Identity()
    """
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name):
        raise ConfigError(f"{spec!r} names no factory; {_USAGE}.")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory = getattr(module, name, None)
    if factory is None:
        raise ConfigError(f"{place} has no {name!r}; {_offers(module, name)}")
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ConfigError(f"{spec} is a {type(factory).__name__}; a function or class that returns a model is needed.")
    return _as_patient(_guarded(factory, f"{spec} raised"), spec)


def _as_patient(made: Any, spec: str) -> Patient:
    if isinstance(made, nn.Module):
        return Patient(made, getattr(made, "example_input_array", None))
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return Patient(*made)
    raise ConfigError(
        f"{spec} returned {type(made).__name__}; a torch.nn.Module, or a pair of module and example batch, is needed."
    )


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"there is no file {file}; {_USAGE}.")
    found = importlib.util.spec_from_file_location(file.stem, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    # As when Python runs the file itself: its neighbours can be imported, and its classes can be pickled.
    sys.path.insert(0, str(file.resolve().parent))
    sys.modules.setdefault(file.stem, module)
    loader = found.loader
    _guarded(lambda: loader.exec_module(module), f"{file} cannot be imported:")
    return module


def _import_module(name: str) -> ModuleType:
    module = _guarded(lambda: importlib.import_module(name), f"{name} cannot be imported:")
    assert isinstance(module, ModuleType)
    return module


def _guarded(action: Callable[[], Any], what: str, advice: str = "") -> Any:
    """Run the user's code; whatever it raises is told in a line, with what may help."""
    try:
        return action()
    except EsperError:
        raise
    except Exception as error:
        raise ConfigError(f"{what} {type(error).__name__}: {error}; {advice}ESPER_TRACEBACK=1 shows where.") from error


def _offers(module: ModuleType, name: str) -> str:
    names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it offers {', '.join(sorted(names)[:10]) or 'nothing to call'}."


def parse_inputs(specs: Sequence[str]) -> Any:
    """Return a batch of random inputs: `2x3x32x32` is a float tensor, `ids=2x16:int100` integers below 100 by name.

    Raises:
        ConfigError: a shape is malformed, or only some inputs have names.

    Example:
        >>> [t.shape for t in parse_inputs(["2x3", "2x4:int9"])]
        [torch.Size([2, 3]), torch.Size([2, 4])]
    """
    found = [_INPUT.fullmatch(spec) for spec in specs]
    for spec, match in zip(specs, found, strict=True):
        if match is None or "0" in match["shape"].split("x"):
            raise ConfigError(
                f"--input {spec!r} is no shape; write 2x3x32x32 for floats, 2x16:int100 for integers below 100, "
                "input_ids=2x16:int100 for an argument by name."
            )
    matches = [match for match in found if match is not None]
    named = {match["name"]: _random(match) for match in matches if match["name"]}
    if named and len(named) < len(matches):
        raise ConfigError("--input: give every input a name of its own, or none.")
    return named or tuple(_random(match) for match in matches)


def _random(match: re.Match[str]) -> Tensor:
    shape = [int(side) for side in match["shape"].split("x")]
    generator = torch.Generator().manual_seed(0)
    if match["high"]:
        return torch.randint(int(match["high"]), shape, generator=generator)
    return torch.randn(shape, generator=generator)


# --- the examination ------------------------------------------------------------------------------------------------


def examine(patient: Patient, targets: Sequence[str] | None = None, seeds_per_layer: int = 1) -> dict[str, Any]:
    """Wrap the model, run it once in training and once in evaluation, and return what was found as plain data.

    Args:
        patient: model and batch; without a batch only what the structure tells is found.
        targets: globs over module paths; None takes the default families.
        seeds_per_layer: chunks of each layer's features.

    Raises:
        SiteError: a target matches nothing, or there are more seeds than features.
        ConfigError: the model does not run on the batch.

    Example:
        >>> found = examine(Patient(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.ones(2, 4)))
        >>> [(site["path"], site["layout"], site["width"]) for site in found["sites"]]
        [('0', 'bd', 8)]
    """
    model = wrap(patient.model, targets=targets, seeds_per_layer=seeds_per_layer)
    probed = patient.batch is not None
    if probed:
        probe(model, patient.batch)
    fits = _fitting(model) if probed else {}
    layers = [layer for layer in model.bank.all_layers() if layer.refusal is None]
    return {
        "model": type(patient.model).__name__,
        "parameters": model.host_parameters(),
        "probed": probed,
        "seeds": sum(layer.chunks for layer in layers),
        "sites": [_site(layer, fits.get(layer.path)) for layer in layers],
        "refused": dict(sorted(model.bank.refused.items())),
        "notes": _notes(model, layers, fits),
    }


def probe(model: MorphableModel, batch: Any) -> None:
    """Show a wrapped model one batch, in training and in evaluation, and refuse the sites that cannot carry seeds.

    Raises:
        ConfigError: the model does not run on the batch.
    """

    def run() -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)

    def both() -> None:
        model.train()
        losses = [t.float().square().mean() for t in _tensors(run()) if t.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            model.eval()
            run()

    _guarded(both, "the model does not run on this batch:", _advice(model.host, batch))
    for layer in model.bank.all_layers():
        if reason := layer.finish_probe():
            model.bank.refused[layer.path] = reason


def _advice(host: nn.Module, batch: Any) -> str:
    """Return what is to be looked at where a model does not run on a batch."""
    advice = ""
    if hasattr(host, "training_step"):
        advice += "a LightningModule needs a forward here, or let the factory return the network inside it; "
    tokens = any(isinstance(module, nn.Embedding) for module in host.modules())
    if tokens and any(tensor.is_floating_point() for tensor in _tensors(batch)):
        advice += "the batch holds floats, and token ids are given as --input 2x16:int100; "
    return advice


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = list(vars(value).values())
    for part in value if isinstance(value, tuple | list) else ():
        yield from _tensors(part)


def _fitting(model: MorphableModel) -> dict[str, list[str]]:
    menu = Menu(load_library())
    sites = observe.sites(model.bank)
    found: dict[str, list[str]] = {site.path: [] for site in sites}
    for offer in menu.offers(sites, Room(_NO_LIMIT)):
        found[offer.site.path].append(offer.blueprint)
    return found


def _site(layer: KasminaLayer, blueprints: list[str] | None) -> dict[str, Any]:
    facts = layer.facts
    return {
        "path": layer.path,
        "type": type(layer.site).__name__,
        "kind": layer.kind,
        "layout": facts.layout if facts else None,
        "input_width": facts.input_width if facts else None,
        "width": facts.width if facts else None,
        "tokens": facts.tokens if facts else None,
        "blueprints": blueprints,
    }


def _notes(model: MorphableModel, layers: list[KasminaLayer], fits: Mapping[str, Sequence[str]]) -> list[str]:
    notes = []
    if not fits and layers:
        notes.append(
            "No batch was given, so shapes, fitting blueprints, and whether gradients reach each site are not known. "
            "Let the factory return (model, batch), or say for example --input 2x3x32x32, "
            "or 2x16:int100 for token ids below 100."
        )
    mixing = {b.ir.name for b in load_library() if mixes_tokens(b.ir.model_dump())}
    writes = any(getattr(module, "generation_config", None) is not None for module in model.host.modules())
    if writes and (found := sorted(mixing & {name for names in fits.values() for name in names})):
        notes.append(f"{' and '.join(found)} mix tokens: where one grows, generate() runs without key-value cache.")
    if fused := fused_sites(model.host, [layer.path for layer in layers]):
        notes.append(f"Hooks turn the fused evaluation of {', '.join(fused)} off; it is equal to rounding.")
    return notes


# --- what the user sees ---------------------------------------------------------------------------------------------


def doctor(args: Sequence[str]) -> int:
    """Run the command and return its exit status: 0, or 1 when no place takes seeds.

    Example:
        >>> doctor(["torch.nn:Identity", "--targets", "nowhere", "--json"])
        Traceback (most recent call last):
        esper.leyline.errors.SiteError: target 'nowhere' matches no module; ...
    """
    parser = argparse.ArgumentParser(prog="esper doctor", description="Say where a model takes seeds, and what fits.")
    parser.add_argument("model", metavar="FILE.py:FACTORY", help="factory of the model, or of (model, example batch)")
    parser.add_argument("--input", action="append", metavar="SHAPE", help="2x3x32x32, 2x16:int100 or name=SHAPE")
    parser.add_argument("--targets", nargs="+", metavar="GLOB", help="module paths; default: the usual families")
    parser.add_argument("--seeds-per-layer", type=int, default=1, metavar="N", help="chunks of each layer (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(args)
    patient = load_patient(given.model)
    if given.input:
        patient = Patient(patient.model, parse_inputs(given.input))
    found = examine(patient, given.targets, given.seeds_per_layer)
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0 if found["sites"] else 1


def _print(found: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    sites, refused = found["sites"], found["refused"]
    may = "take" if found["probed"] else "may take"
    console.print(
        f"[bold]{found['model']}[/], {found['parameters']:,} parameters: "
        f"{len(sites)} sites {may} {found['seeds']} seeds, {len(refused)} refused",
        highlight=False,
    )
    menus = _menus(sites)
    if sites:
        console.print(_site_table(sites, menus))
    for names, number in menus.items():
        console.print(f"{number}: {', '.join(names) or 'nothing fits'}", style="dim", highlight=False)
    if refused:
        console.print(_refusal_table(refused))
    for note in found["notes"]:
        console.print(f"Note: {note}", highlight=False)


def _menus(sites: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], str]:
    """Give every set of fitting blueprints a number."""
    found = dict.fromkeys(tuple(site["blueprints"]) for site in sites if site["blueprints"] is not None)
    return {names: str(number) for number, names in enumerate(found, start=1)}


def _site_table(sites: Sequence[Mapping[str, Any]], menus: Mapping[tuple[str, ...], str]) -> Any:
    table = _table("takes seeds", "kind", "layout", "features", "fits")
    for site in sites:
        fits = menus[tuple(site["blueprints"])] if site["blueprints"] is not None else "?"
        table.add_row(site["path"], site["kind"], *_shape(site), fits)
    return table


def _shape(site: Mapping[str, Any]) -> tuple[str, str]:
    if site["layout"] is None:
        return "?", "?"
    tokens = {"btd": ", T={}", "bchw": ", HW={}"}.get(site["layout"], "").format(site["tokens"])
    into = f"{site['input_width']} -> " if site["input_width"] else ""
    return site["layout"] + tokens, f"{into}{site['width']}"


def _table(first: str, *others: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, no_wrap=title != "why", justify="right" if title == "features" else "left")
    return table


def _refusal_table(refused: Mapping[str, str]) -> Any:
    table = _table("refused", "why")
    for path, reason in refused.items():
        table.add_row(path, reason)
    return table
