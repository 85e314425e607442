"""What the modules of a child need that keep a state beside their weights, or add to the loss.

A state is a buffer in single precision, whatever the precision of the weights. It changes in training only, with the
forward passes and not with the steps. A pass that runs again for its gradients, as under gradient checkpointing, sees
what the first one saw: so what a pass has found takes effect in the next one.
"""

from typing import Any

import torch
from torch import Tensor, nn


class StatefulModule(nn.Module):
    """A module whose floating-point buffers stay in single precision when its weights are cast."""

    def _apply(self, fn: Any, recurse: bool = True) -> "StatefulModule":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
        return self

    def observes(self) -> bool:
        """Whether this forward pass may change the state: in training, and not when it runs again for its gradients."""
        return self.training and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1)


class _WithLoss(torch.autograd.Function):
    """The identity of its first argument; backwards the second one's gradient is one."""

    @staticmethod
    def forward(x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.shape, ctx.dtype, ctx.device = inputs[1].shape, inputs[1].dtype, inputs[1].device

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(ctx.shape, dtype=ctx.dtype, device=ctx.device)


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return x; a backward pass that comes through it adds the gradient of `loss`, as if the task's loss held it.

    No trainer needs to know of it. It counts once for every backward pass, whatever the task's loss is multiplied with:
    under gradient accumulation it weighs as much in each part.

    Args:
        x: any tensor on the way to the task's loss.
        loss: a number.

    Example:
        >>> x, weight = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
        >>> with_loss(x, weight**2).sum().backward()
        >>> x.grad, weight.grad
        (tensor([1., 1.]), tensor(6.))
    """
    result: Tensor = _WithLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return result
