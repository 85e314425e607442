"""Children written down as plain data, and planted in a network that has never grown."""

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from torch import nn

from esper.blueprints import BlueprintIR, SiteShape, build, load_library, parse_ir
from esper.kasmina.decoding import mixes_tokens
from esper.leyline.errors import ConfigError, EsperError
from esper.tolaria.planted import Grown, Planted, plant

_KEYS = frozenset({"site", "slot", "blueprint", "reads", "dims", "shape", "start", "width", "init_seed"})


def check_children(children: Sequence[Mapping[str, Any]]) -> None:
    """Check that every entry has the keys of a child.

    Raises:
        ConfigError: an entry lacks a key or has one too many.
    """
    for number, child in enumerate(children):
        lacking, unknown = sorted(_KEYS - child.keys()), sorted(child.keys() - _KEYS)
        if lacking or unknown:
            problem = f"lacks {', '.join(lacking)}" if lacking else f"has unknown keys {', '.join(unknown)}"
            raise ConfigError(f"child {number} {problem}; every child has {', '.join(sorted(_KEYS))}.")


def plant_all(host: nn.Module, children: Sequence[Mapping[str, Any]]) -> Grown:
    """Plant children in the smallest part of a network that holds all their sites.

    An optimizer that trains this part trains them too. They remember how they were planted, for `save_model`.

    Args:
        host: the network.
        children: entries as `FromStart` takes them.

    Raises:
        ConfigError: the network has no such site, or a blueprint does not fit it.
    """
    paths = [child["site"].split(".") for child in children]
    above = commonprefix([path[:-1] for path in paths])
    sites: dict[str, dict[str, Planted]] = {}
    for child, path in zip(children, paths, strict=True):
        here = ".".join(path[len(above) :])
        try:
            host.get_submodule(child["site"])
            sites.setdefault(here, {})[child["slot"]] = _planted(child)
        except (AttributeError, EsperError, TypeError) as error:
            raise ConfigError(f"{child['site']} cannot take its child: {error}") from error
    grown = plant(host.get_submodule(".".join(above)), sites)
    grown.recipe = [dict(child) for child in children]
    return grown


def _planted(child: Mapping[str, Any]) -> Planted:
    ir, shape = graph_of(child["blueprint"], child["reads"]), SiteShape(**child["shape"])
    return Planted(
        build(ir, shape, child["dims"], seed=child["init_seed"]),
        reads=ir.reads,
        replaces=ir.initial == "identity",
        axis=1 if shape.layout == "bchw" else -1,
        start=child["start"],
        width=child["width"],
        mixes_tokens=mixes_tokens(ir.model_dump(mode="json")),
    )


def graph_of(blueprint: Any, reads: Any) -> BlueprintIR:
    """Return the graph that a recipe names or carries, placed as it says.

    Raises:
        BlueprintError: there is none of this name, or it cannot be placed so.
    """
    ir = load_library()[blueprint].ir if isinstance(blueprint, str) else parse_ir(blueprint)
    return ir.reading(reads)
