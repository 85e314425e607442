"""The place that a child network is built for."""

from typing import Literal, NamedTuple

Layout = Literal["btd", "bd", "bchw"]
"""Order of the axes: (batch, tokens, features), (batch, features) or (batch, channels, height, width)."""

LAYOUTS: tuple[Layout, ...] = ("btd", "bd", "bchw")
"""Every layout, in the order of `Layout`."""

SITE_KINDS = ("linear", "conv2d", "norm", "attention", "mlp", "stream", "block")
"""Families of host modules; `stream` is a place on the residual stream, `block` anything else."""


class SiteShape(NamedTuple):
    """What a child must know of its host.

    Args:
        layout: order of the axes of the host's output.
        d_in: features of the host's input.
        d_out: features of the host's output, or of the chunk of it that the child serves.
        tokens: T for `btd`, H * W for `bchw`, 1 for `bd`.
        kind: family of the host's module, one of `SITE_KINDS`.
    """

    layout: Layout
    d_in: int
    d_out: int
    tokens: int = 1
    kind: str = "block"
