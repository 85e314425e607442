"""Counting the work of one forward pass."""

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
        # The fused CPU attention has no formula in the counter; the plain one is two counted products.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        for module in training:
            module.training = True
    return int(counter.get_total_flops()) // 2


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, each shared one counted once.

    Example:
        >>> parameter_count(nn.Linear(8, 4))
        36
    """
    return sum(parameter.numel() for parameter in model.parameters())
