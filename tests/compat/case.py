"""What a model of the compatibility table brings: how to build it, what it eats, and where seeds are tried."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """One batch.

    Args:
        inputs: the model's argument: a tensor, a tuple of arguments, or a dict of keyword arguments.
        target: what the loss compares with; None where the model computes its own.
    """

    inputs: Any
    target: Any = None


class Case(NamedTuple):
    """One model.

    Args:
        name: as the table shows it.
        build: returns the model, its weights drawn from PyTorch's global random stream.
        batch: returns the batch of a random seed.
        loss: scalar loss of the model's output and a batch.
        targets: where seeds are tried, as globs over module paths; None takes the default families.
        blueprint: what the schedule plants, at the first site that takes it.
        generates: whether the model writes text with `generate`.
        fused: whether PyTorch evaluates it by a fused path of its own, which any hook turns off.
        note: what a reader of the table should know.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Batch], Tensor]
    targets: tuple[str, ...] | None = None
    blueprint: str = "BP-MLP-GELU"
    generates: bool = False
    fused: bool = False
    note: str = ""


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a batch's inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def fresh(case: Case) -> nn.Module:
    """Return the case's model, the same weights every time."""
    torch.manual_seed(0)
    return case.build()


def draws(seed: int) -> torch.Generator:
    """Return a random stream of its own."""
    return torch.Generator().manual_seed(seed)
