"""The contract through which Kasmina gets kernels, whoever makes them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from esper.blueprints import BlueprintIR, SiteShape
from esper.leyline.reports import FieldReport


@dataclass(frozen=True)
class KernelRequest:
    """What kernel is wanted, for which site.

    Args:
        blueprint: name of the blueprint.
        site: layout and sizes of the place.
        reads: `declared`, `output` or `input`.
        dims: sizes of the free dimensions, sorted by name.
    """

    blueprint: str
    site: SiteShape
    reads: Literal["declared", "output", "input"] = "declared"
    dims: tuple[tuple[str, int], ...] = ()


KernelFactory = Callable[[int, torch.device], nn.Module]
"""Makes a child with fresh weights from a seed, on a device."""


@dataclass(frozen=True)
class Kernel:
    """A verified kernel, ready to be instantiated.

    Args:
        kernel_id: `<ir hash>-<target>-<pipeline>-<toolchain hash>`.
        ir: blueprint that it computes.
        params: parameters of one child.
        macs: multiply-accumulates per sample.
        nbytes: memory that the kernel holds while cached, in bytes.
        make: factory of children.
        latency_ms: forward time of 8 samples, in milliseconds: measured where that was done, else an estimate.
        memory_mb: memory of a child in training, in MiB, estimated.
    """

    kernel_id: str
    ir: BlueprintIR
    params: int
    macs: int
    nbytes: int
    make: KernelFactory
    latency_ms: float = 0.0
    memory_mb: float = 0.0


class KernelStore(ABC):
    """Gives kernels without ever making the caller wait."""

    @abstractmethod
    def prefetch(self, request: KernelRequest) -> None:
        """Start to make the kernel ready; returns at once, never raises, and may be called again."""

    @abstractmethod
    def poll(self, request: KernelRequest) -> Kernel | None:
        """Return the kernel when it is ready, None while it is not.

        Raises:
            KernelError: the kernel cannot be had; the message says why. Every later call raises it again.
        """

    @abstractmethod
    def evict(self, kernel_id: str) -> None:
        """Never offer this kernel again: it failed at run time."""

    def report(self, report: FieldReport) -> None:  # noqa: B027 - a store that learns nothing from it
        """Hear what became of a child; returns at once and never raises."""

    def portable(self) -> "KernelStore":
        """Return the store whose kernels are the same on every machine: several ranks take theirs from it."""
        return self

    def reclaim(self, kernel_id: str, child: nn.Module) -> nn.Module:
        """Return a child that was rebuilt from a checkpoint as the kernel of that id makes it; its weights stay."""
        return child

    def state(self) -> dict[str, Any]:
        """Return as plain data what a resumed run must know to be offered the same kernels."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 - a store without a state takes none back
        """Take back what `state` returned."""

    @abstractmethod
    def close(self) -> None:
        """Release threads and files; may be called twice."""
