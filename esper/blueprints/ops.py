"""The whitelist: every operation that a blueprint may name."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from esper.blueprints import ops_linear, ops_pointwise, ops_tokens
from esper.blueprints.op import Op
from esper.leyline.errors import BlueprintError

OPS: Final[Mapping[str, type[Op]]] = MappingProxyType(
    {
        "act": ops_pointwise.Activation,
        "add": ops_pointwise.Add,
        "attention": ops_tokens.Attention,
        "causal_conv": ops_tokens.CausalConv,
        "conv2d": ops_tokens.Conv2d,
        "gain": ops_linear.Gain,
        "group_norm": ops_pointwise.GroupNorm,
        "layer_norm": ops_pointwise.LayerNorm,
        "linear": ops_linear.Linear,
        "mul": ops_pointwise.Mul,
        "rms_norm": ops_pointwise.RMSNorm,
    }
)
"""Operation by the name that blueprints use."""


def op_named(name: str) -> type[Op]:
    """Return the operation of that name.

    Raises:
        BlueprintError: there is none.

    Example:
        >>> op_named("linear").__name__
        'Linear'
    """
    if name not in OPS:
        near = get_close_matches(name, OPS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise BlueprintError(f"unknown op {name!r}; {hint}known ops: {', '.join(OPS)}.")
    return OPS[name]
