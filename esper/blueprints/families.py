"""Menus by family of host: what may grow where no menu is given."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from esper.blueprints.library import STANDARD
from esper.blueprints.site import SiteShape

MENUS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "transformer": STANDARD,
        "recurrent": (
            "BP-CONV-CAUSAL",
            "BP-GLU",
            "BP-MLP-GELU",
            "BP-MLP-SWIGLU",
            "BP-NORM-RMS",
            "BP-PROJ-IA3",
            "BP-PROJ-LORA",
            "BP-RNN-MINGRU",
            "BP-TOKEN-SHIFT",
            "BP-WIDEN",
        ),
        "vision": (
            "BP-CONV-DEPTHWISE",
            "BP-CONV-DILATED",
            "BP-CONV-INVERTED",
            "BP-CONV-NEXT",
            "BP-CONV-RES",
            "BP-PROJ-LORA",
            "BP-SQUEEZE-EXCITE",
            "BP-WIDEN",
            "BP-WIDEN-CONV",
        ),
        "dense": (
            "BP-GATE-LOWRANK",
            "BP-GLU",
            "BP-MLP-GELU",
            "BP-MLP-RELU2",
            "BP-MLP-SWIGLU",
            "BP-NORM-RMS",
            "BP-PROJ-IA3",
            "BP-PROJ-LORA",
            "BP-WIDEN",
        ),
    }
)
"""The menu of each family."""


def family_of(sites: Iterable[SiteShape]) -> str:
    """Return the family of a host by the shapes of its sites.

    Images make `vision`; tokens make `transformer`, or `recurrent` where nothing attends and nothing has a residual
    stream; all else is `dense`, graphs included: their nodes come as rows.

    Args:
        sites: the places where the host may grow.

    Example:
        >>> family_of([SiteShape("btd", 8, 8, 4, "attention")]), family_of([SiteShape("bd", 8, 8)])
        ('transformer', 'dense')
    """
    shapes = list(sites)
    layouts = {shape.layout for shape in shapes}
    if "btd" in layouts:
        attends = any(shape.kind in ("attention", "stream") for shape in shapes)
        return "transformer" if attends or "bchw" in layouts else "recurrent"
    return "vision" if "bchw" in layouts else "dense"
