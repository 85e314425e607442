"""Counting the work of one forward pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def macs(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> int:
    """Return the multiply-accumulates of one forward of the model on the example.

    Matrix products, convolutions and attention are counted, element-wise work is not. Attention is
    counted in full, without a discount for the causal mask. What is computed is what counts: a mixture
    of experts that computes all its experts is charged for all of them.

    Args:
        model: any module; its training mode is left as it was, and no gradient is kept.
        example: the input, or the inputs in order; the count is for this batch size.

    Example:
        >>> macs(nn.Linear(8, 4), torch.zeros(3, 8))
        96
    """
    inputs = example if isinstance(example, tuple) else (example,)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return macs_of(lambda: model(*inputs))
    finally:
        for module in training:
            module.training = True


def macs_of(run: Callable[[], object]) -> int:
    """Return the multiply-accumulates of a call, counted as in `macs`; what is compiled runs eagerly meanwhile.

    Example:
        >>> macs_of(lambda: torch.zeros(3, 8) @ torch.zeros(8, 4))
        96
    """
    # The fused CPU attention has no formula in the counter; the plain one is two counted products.
    plain, eager = sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager")
    with torch.no_grad(), plain, eager, FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, each shared one counted once.

    Example:
        >>> parameter_count(nn.Linear(8, 4))
        36
    """
    return sum(parameter.numel() for parameter in model.parameters())
