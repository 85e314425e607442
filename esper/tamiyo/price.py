"""What a child costs, weighed: the gain that it must show, and what its gain is divided by when kinds are compared."""

from typing import Protocol

from esper.tamiyo.config import TamiyoConfig


class Costs(Protocol):
    """Whatever says what a child costs."""

    @property
    def params(self) -> int:
        """Parameters."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""

    @property
    def latency_ms(self) -> float:
        """Forward time of 8 samples, in milliseconds."""


def price(child: Costs, config: TamiyoConfig) -> float:
    """Return the gain that a child must show, in the unit of the loss.

    `min_effect + price_per_kparam * params / 10^3 + price_per_mmac * macs / 10^6 + price_per_ms * latency_ms`.

    Args:
        child: what it costs.
        config: the prices.
    """
    return (
        config.min_effect
        + config.price_per_kparam * child.params / 1e3
        + config.price_per_mmac * child.macs / 1e6
        + config.price_per_ms * child.latency_ms
    )


def size(child: Costs, config: TamiyoConfig) -> float:
    """Return what the gains of a trial are divided by, in thousands, millions or milliseconds of `config.rank_by`."""
    sizes = {"params": child.params / 1e3, "macs": child.macs / 1e6, "latency": child.latency_ms}
    return max(sizes[config.rank_by], 1e-9)


UNITS = {"params": "1,000 parameters", "macs": "million multiply-accumulates", "latency": "millisecond"}
"""What `size` counts in, for people."""
