"""A run's way to the forge: letters over the bus, kernels out of the store."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from esper.leyline.artifacts import CompilationRequest, KernelFaulted, KernelSpec
from esper.leyline.base import Message
from esper.leyline.envelope import COMPILATION, INNOVATION_FIELD_REPORTS, VALIDATION, Priority
from esper.leyline.errors import BusError, StoreError
from esper.leyline.ids import new_id
from esper.leyline.reports import FieldReport
from esper.oona.contracts import Bus, Subscription
from esper.urza.door import VerifiedKernel
from esper.urza.store import Urza

REQUESTED = f"{COMPILATION}.requested"
"""Topic of requests for kernels."""

FAULTED = f"{VALIDATION}.faulted"
"""Topic of kernels that failed in a run."""

_LOOK_S: Final = 2.0
_WHERE: Final = {
    CompilationRequest: (REQUESTED, Priority.NORMAL),
    KernelFaulted: (FAULTED, Priority.NORMAL),
    FieldReport: (INNOVATION_FIELD_REPORTS, Priority.LOW),
}


@final
class ForgeLink:
    """What a kernel store needs of the forge, see `esper.kasmina.forge_store.Forge`.

    Kernels are read from the store's folder, whether or not the forge works at the moment.

    Args:
        connect: returns a connection to the forge's bus, or raises a BusError while there is none.
        open_store: returns the forge's store, with public keys; None where there is none yet.
        fingerprint: returns that of the binary interface of this process.
        works: tells whether the forge still works; asked every few seconds, because a bus does not tell.
    """

    def __init__(
        self,
        connect: Callable[[], Bus],
        open_store: Callable[[], Urza | None],
        fingerprint: Callable[[], str],
        *,
        works: Callable[[], bool] = lambda: True,
    ) -> None:
        """Connect to nothing yet."""
        self._works, self._checked = works, time.monotonic()
        self._connect, self._open_store, self._fingerprint = connect, open_store, fingerprint
        self._bus: Bus | None = None
        self._verdicts: Subscription | None = None
        self._urza: Urza | None = None

    def send(self, message: CompilationRequest | KernelFaulted | FieldReport) -> None:
        """Ask, or tell of a kernel or a graft; everything that follows from it bears one trace id."""
        self._listen()
        assert self._bus is not None
        topic, priority = _WHERE[type(message)]
        try:
            self._bus.publish(message, topic, priority=priority, trace_id=new_id())
        except BusError:
            self._hang_up()
            raise

    def works(self) -> bool:
        """Return whether the forge works at this moment."""
        return self._works()

    def hear(self, timeout_s: float) -> Message | None:
        """Return the next verdict, or None."""
        verdicts = self._listen()
        delivery = verdicts.receive(timeout_s)
        if delivery is None:
            self._check_that_it_works()
            return None
        verdicts.ack(delivery)
        return delivery.message

    def validated(self, spec: KernelSpec, before: float | None) -> list[str]:
        """Return the ids of the compiled kernels of this spec that were validated before a time, fastest first."""
        urza = self._store()
        kernels = [urza.kernel(name) for name in urza.of_spec(spec, self._fingerprint())] if urza is not None else []
        return [
            kernel.id
            for kernel in kernels
            if kernel.compilation_pipeline != "fast"
            and kernel.validation_report is not None
            and (before is None or kernel.validation_report.report_timestamp < before)
        ]

    def verified(self, kernel_id: str) -> VerifiedKernel:
        """Return a kernel after every check of the store's door."""
        urza = self._store()
        if urza is None:
            raise StoreError(f"There is no store to take {kernel_id} from.")
        found = urza.verified(kernel_id, self._fingerprint())
        with suppress(StoreError):  # a full disk does not make a kernel worse
            urza.used(kernel_id)
        return found

    def latency_ms(self, kernel_id: str) -> float | None:
        """Return the forward time of 8 samples that Urabrask measured, in milliseconds; None if it did not."""
        urza = self._store()
        report = urza.kernel(kernel_id).validation_report if urza is not None else None
        measured = report.benchmark_results if report is not None else None
        return measured.latency_ms_mean if measured is not None else None

    def close(self) -> None:
        """Hang up."""
        self._hang_up()
        if self._urza is not None:
            self._urza.close()

    def _store(self) -> Urza | None:
        if self._urza is None:
            self._urza = self._open_store()
        return self._urza

    def _listen(self) -> Subscription:
        if self._bus is not None and self._verdicts is not None:
            return self._verdicts
        self._hang_up()
        self._bus = self._connect()
        self._verdicts = self._bus.subscribe(f"{VALIDATION}.characterized", f"{VALIDATION}.rejected")
        return self._verdicts

    def _check_that_it_works(self) -> None:
        if time.monotonic() - self._checked < _LOOK_S:
            return
        self._checked = time.monotonic()
        if not self._works():
            self._hang_up()
            raise BusError("The forge has ended.")

    def _hang_up(self) -> None:
        bus, self._bus, self._verdicts = self._bus, None, None
        if bus is not None:
            bus.close()


class Places:
    """Where a forge keeps its things.

    Args:
        root: its folder.
    """

    def __init__(self, root: str | Path) -> None:
        """Derive every place."""
        self.root = Path(root).resolve()
        self.bus, self.store, self.keys = self.root / "bus", self.root / "store", self.root / "keys"
        self.jobs, self.shelf = self.root / "jobs", self.root / "shelf"
        self.lock, self.card, self.log = self.root / "forge.lock", self.root / "forge.json", self.root / "forge.log"
