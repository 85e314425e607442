"""The whitelist: every operation that a blueprint may name."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from esper.blueprints import (
    ops_attention,
    ops_experts,
    ops_heads,
    ops_image,
    ops_linear,
    ops_monitor,
    ops_pointwise,
    ops_sequence,
    ops_tokens,
)
from esper.blueprints.op import Op
from esper.leyline.errors import BlueprintError

OPS: Final[Mapping[str, type[Op]]] = MappingProxyType(
    {
        "act": ops_pointwise.Activation,
        "add": ops_pointwise.Add,
        "attend": ops_attention.Attend,
        "attention": ops_tokens.Attention,
        "causal_conv": ops_tokens.CausalConv,
        "centred_conv": ops_sequence.CentredConv,
        "choose": ops_experts.Choose,
        "clamp_gradient": ops_monitor.ClampGradient,
        "conv2d": ops_tokens.Conv2d,
        "decay_scan": ops_sequence.DecayScan,
        "experts": ops_experts.Experts,
        "fake_quant": ops_heads.FakeQuant,
        "flash_attention": ops_attention.FlashAttention,
        "gain": ops_linear.Gain,
        "gated_scan": ops_sequence.GatedScan,
        "group_norm": ops_pointwise.GroupNorm,
        "head_norm": ops_heads.HeadNorm,
        "layer_norm": ops_pointwise.LayerNorm,
        "linear": ops_linear.Linear,
        "linear_attention": ops_attention.LinearAttention,
        "local_attention": ops_attention.LocalAttention,
        "mul": ops_pointwise.Mul,
        "pool": ops_image.Pool,
        "response_norm": ops_image.ResponseNorm,
        "rms_norm": ops_pointwise.RMSNorm,
        "rope": ops_heads.Rope,
        "shared_norm": ops_monitor.SharedNorm,
        "spread": ops_experts.Spread,
        "tap": ops_monitor.Tap,
        "token_shift": ops_sequence.TokenShift,
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
