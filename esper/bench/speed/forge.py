"""A forge in a scratch folder, which asks nothing of the one that the user's runs share."""

import time
from collections.abc import Callable
from typing import Final, TypeVar

from esper.bench.speed.kernels import spec
from esper.forge.client import Forge
from esper.forge.link import REQUESTED
from esper.leyline.artifacts import CompilationRequest
from esper.leyline.errors import BusError, KernelError
from esper.leyline.events import KernelRejected
from esper.leyline.kernels import ArtifactStatus, CompiledKernelArtifact
from esper.oona.contracts import Bus, Subscription
from esper.tezzeret.toolchain import kernel_id
from esper.urza.store import Urza

PATIENCE_S: Final = 900.0
_EVERY_S: Final = 0.1
_ENDED: Final = frozenset({ArtifactStatus.VALIDATED, ArtifactStatus.REJECTED})
_Found = TypeVar("_Found")


def waited(ready: Callable[[], _Found | None], what: str, patience_s: float = PATIENCE_S) -> _Found:
    """Look for something again and again until it is there.

    Raises:
        KernelError: it does not come.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if (found := ready()) is not None:
            return found
        time.sleep(_EVERY_S)
    raise KernelError(f"{what} did not come in {patience_s:.0f} s.")


def connected(forge: Forge) -> Bus:
    """Start a forge, and return a connection to it."""

    def bus() -> Bus | None:
        try:
            return forge.connect()
        except BusError:
            return None

    return waited(bus, "the forge")


def compiled(forge: Forge, bus: Bus, kind: str) -> tuple[Urza, CompiledKernelArtifact]:
    """Ask for the compiled reference kernel of a blueprint, and return the store and the kernel with its verdict.

    Raises:
        KernelError: it cannot be compiled, or did not come.
    """
    urza = waited(forge.shelf, "the store")
    wanted = spec(kind)
    with bus.subscribe("compilation.failed") as news:
        bus.publish(CompilationRequest(spec=wanted, pipeline="standard", requester="speed"), REQUESTED)
        name = kernel_id(wanted, "standard")
        return urza, waited(lambda: _verdict(urza, news, name), f"a verdict on {kind}")


def _verdict(urza: Urza, news: Subscription, kernel_id: str) -> CompiledKernelArtifact | None:
    heard = news.receive(0.0)
    if heard is not None:
        news.ack(heard)
        if isinstance(heard.message, KernelRejected):
            raise KernelError(heard.message.detail)
    if not urza.has(kernel_id):
        return None
    kernel = urza.kernel(kernel_id)
    return kernel if kernel.status in _ENDED else None
