"""Gradient clipping that keeps host and children apart."""

from collections.abc import Iterable
from typing import Any

from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from esper.tolaria.optimizers import SEED_KEY


class SeparateClipping:
    """Clips the host by itself and each child by itself.

    One common norm would let a child's gradients shrink the host's: growth would change the host's training before the
    child has any effect.
    """

    def __call__(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip; takes the arguments of `LightningModule.configure_gradient_clipping`."""
        if not gradient_clip_val:
            return
        host = [p for g in optimizer.param_groups if SEED_KEY not in g for p in g["params"]]
        children = [g["params"] for g in optimizer.param_groups if SEED_KEY in g]
        for parameters in (host, *children):
            _clip(parameters, float(gradient_clip_val), str(gradient_clip_algorithm or "norm"))


def _clip(parameters: Iterable[Any], value: float, algorithm: str) -> None:
    (clip_grad_value_ if algorithm.endswith("value") else clip_grad_norm_)(parameters, value)
