"""The forge beside a run: taken as it is found, started where there is none, and stopped with the run."""

import json
import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, final

import psutil

from esper.forge.link import ForgeLink, Places
from esper.kasmina.cache import KernelCache
from esper.kasmina.fingerprint import fingerprint
from esper.kasmina.forge_store import Adopt, ForgeStore
from esper.leyline.errors import BusError, ConfigError, EsperError
from esper.leyline.ids import new_id
from esper.leyline.kernels import ArtifactStatus
from esper.oona.client import ZmqBus
from esper.oona.contracts import Bus
from esper.tezzeret.toolchain import kernel_id
from esper.urza.signing import KeyRing
from esper.urza.store import Urza

SWITCH: Final = "ESPER_FORGE"
"""Environment variable: `off` keeps every run without a forge unless its configuration asks for one."""

_FAREWELL_S: Final = 10.0
_AGAIN_S: Final = 15.0
_JUDGED: Final = frozenset({ArtifactStatus.VALIDATED, ArtifactStatus.REJECTED})
_log = logging.getLogger(__name__)


@final
class Forge:
    """A run's forge: the bus, the store, and the pools that compile and try out kernels.

    Args:
        enabled: whether the run uses one; None: unless the environment says `ESPER_FORGE=off`.
        root: folder of store, keys, journals and log; kept from run to run.
        adopt: which compiled kernels the run may use: `known`, those validated before it began; `any`, whatever is
            validated when a graft needs it.
        before: when the run began, in seconds since the Unix epoch; None is now. A run writes it into its
            configuration, so that its repetition is offered the same kernels and is the same, bit for bit.
        tezzeret: workers that compile.
        urabrask: workers that try kernels out.
        cpu_budget_s: processor time that compiling may take in a day, in seconds; None for no bound.
        cache_mb: bound on the kernels that a run keeps loaded, in MiB.

    Raises:
        ConfigError: a value is not allowed.

    Example:
        >>> Forge(enabled=False).store("run-1") is None
        True
    """

    def __init__(
        self,
        *,
        enabled: bool | None = None,
        root: str = ".cache/forge",
        adopt: Adopt = "known",
        before: float | None = None,
        tezzeret: int = 1,
        urabrask: int = 1,
        cpu_budget_s: float | None = 7200.0,
        cache_mb: float = 256.0,
    ) -> None:
        """Check the settings; nothing is started yet."""
        if adopt not in ("known", "any"):
            raise ConfigError(f"forge.adopt={adopt!r}; allowed: known, any.")
        if min(tezzeret, urabrask) < 0 or cache_mb <= 0:
            raise ConfigError("forge: the numbers of workers are 0 or more, cache_mb is positive.")
        self.enabled = os.environ.get(SWITCH, "").lower() != "off" if enabled is None else enabled
        self.adopt, self.cache_mb = adopt, cache_mb
        self.before = time.time() if before is None else before
        self.places = Places(root)
        self.options = {"tezzeret": tezzeret, "urabrask": urabrask, "cpu_budget_s": cpu_budget_s}
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0
        self._store: ForgeStore | None = None

    def store(self, run_id: str) -> ForgeStore | None:
        """Return the run's kernel store, or None where the forge is off; nobody waits for the forge to start."""
        if self.enabled and self._store is None:
            cache = KernelCache(int(self.cache_mb * 2**20))
            link = ForgeLink(self.connect, self.shelf, fingerprint, works=lambda: self.running() is not None)
            self._store = ForgeStore(link, adopt=self.adopt, before=self.before, cache=cache, run_id=run_id)
        return self._store

    def connect(self) -> Bus:
        """Return a connection to the forge that works here; where none does, one is started.

        Raises:
            BusError: it is still starting; ask again.
        """
        card = self.running()
        if card is None:
            # One that ends as soon as it is started would otherwise take a core from the run.
            if (self._process is None or self._process.poll() is not None) and time.monotonic() >= self._next_start:
                self._next_start = time.monotonic() + _AGAIN_S
                self._process = self._spawn()
            raise BusError(f"The forge is starting; if it never does, {self.places.log} tells why.")
        return ZmqBus(card["address"], sender=f"run-{os.getpid()}-{new_id()[:8]}")

    def shelf(self) -> Urza | None:
        """Return the forge's store for reading, or None where no forge has ever worked."""
        if not (self.places.store.is_dir() and self.places.keys.is_dir()):
            return None
        return Urza(self.places.store, KeyRing.public_only(self.places.keys))

    def unfinished(self) -> int:
        """Return how many kernels the run has asked for have no verdict yet; the next forge here goes on with them."""
        specs = self._store.missed() if self._store is not None else []
        with suppress(EsperError):
            shelf = self.shelf()
            if shelf is not None:
                with shelf:
                    judged = {kernel.id for kernel in shelf.kernels() if kernel.status in _JUDGED}
                return sum(kernel_id(spec, "standard") not in judged for spec in specs)
        return len(specs)

    def running(self) -> dict[str, Any] | None:
        """Return the card of the forge that works in this folder, or None."""
        try:
            card: dict[str, Any] = json.loads(self.places.card.read_text(encoding="utf-8"))
            process = psutil.Process(card["pid"])
            alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - card["created"]) < 2.0
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None
        return card if alive else None

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        arguments = [f"--{name}={value}" for name, value in self.options.items() if value is not None]
        command = [sys.executable, "-m", "esper.forge.process", f"--root={self.places.root}", f"--parent={os.getpid()}"]
        with self.places.log.open("ab") as log:
            return subprocess.Popen(
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def close(self) -> None:
        """Let go of the forge; one that this run started ends, and what it had begun waits for the next run."""
        store, self._store = self._store, None
        if store is not None:
            store.close()
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a forge to end, and kill it and all its workers if it does not."""
    family = _descendants(process.pid)
    process.terminate()
    try:
        process.wait(_FAREWELL_S)
    except subprocess.TimeoutExpired:
        _log.warning("the forge did not end in %.0f s and is killed.", _FAREWELL_S)
        process.kill()
        process.wait(_FAREWELL_S)
    for child in family:
        try:
            child.kill()
        except psutil.Error:
            continue


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
