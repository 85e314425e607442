"""What some blueprints need of the machine or the run; without it they are neither offered nor built."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

import torch
from torch import distributed as dist

from esper.leyline.errors import BlueprintDoesNotFit


class Capability(NamedTuple):
    """Something that not every machine or run offers.

    Args:
        needs: what it takes, in words.
        is_offered: tells whether it is there now.
    """

    needs: str
    is_offered: Callable[[], bool]


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def requires(self) -> tuple[str, ...]: ...


def _has_flash_attention() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


CAPABILITIES: Final[Mapping[str, Capability]] = MappingProxyType(
    {
        "flash_attention": Capability("a CUDA device of compute capability 8.0 or newer", _has_flash_attention),
        "process_group": Capability("a run of several ranks, such as `devices: 2` gives", _has_process_group),
    }
)
"""Every capability by the name that operations and manifests use."""


def lacking(ir: _Named) -> list[str]:
    """Return the capabilities that a blueprint needs and that are not offered here and now."""
    return [need for need in ir.requires if not CAPABILITIES[need].is_offered()]


def require_capabilities(ir: _Named) -> None:
    """Check that all that a blueprint needs is offered.

    Raises:
        BlueprintDoesNotFit: something is not; the message says what it takes.
    """
    missing = lacking(ir)
    if missing:
        needs = " and ".join(f"{need}: {CAPABILITIES[need].needs}" for need in missing)
        raise BlueprintDoesNotFit(f"{ir.name} needs {needs}; that is not offered here, so choose another blueprint.")
