"""One round of `chaos.py`: a run, a forge, a blow; the run must go on, and another forge finish what was begun."""

import json
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, final

import psutil

from benchmarks import chaos_job as job
from benchmarks.chaos_audit import Audit, Outcome, compare, open_jobs
from benchmarks.chaos_stage import Census, Stage, end, last_words, start
from benchmarks.chaos_strikes import DEAD_S, FILLER, STRIKES, Scene, Struck
from esper.leyline.errors import EsperError
from esper.leyline.events import KernelCharacterized, KernelRejected
from esper.oona.client import ZmqBus

SMALL_MB: Final = 24
"""Size of the file system that is filled, in MiB; a forge's folder takes a few."""

_REQUESTED: Final = "compilation.requested"
_START_S, _SETTLE_S, _COMPILED_S, _END_S = 120.0, 240.0, 900.0, 60.0
_LONGEST_DELAY_S = 5.0
_LOOK_S = 0.05


def play(stage: Stage, kind: str, number: int, *, compiling: bool = False) -> Outcome:
    """Play one round; its folder stays where something failed.

    Args:
        stage: what it starts from.
        kind: one of `STRIKES`.
        number: chooses everything that is left to chance.
        compiling: whether a kernel is to be compiled besides, which takes half a minute.
    """
    folder, began = stage.folder / f"{kind}-{number:03}", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    outcome, census = Outcome(kind, number), Census(folder)
    try:
        with _root(stage, kind, folder) as root:
            _Round(stage, folder, root, outcome, census, compiling).play()
    except (RuntimeError, OSError, ValueError, EsperError, psutil.Error, sqlite3.Error) as error:
        outcome.run.append(f"{type(error).__name__}: {error}")
    finally:
        outcome.cpu_s = round(census.cpu_s, 1)
        census.close()
    outcome.seconds = round(time.monotonic() - began, 1)
    if not outcome.failures:
        shutil.rmtree(folder)
    return outcome


@contextmanager
def _root(stage: Stage, kind: str, folder: Path) -> Iterator[Path]:
    """Yield a copy of the prepared forge's folder, on a small file system of its own where the disk is to be filled."""
    with ExitStack() as stack:
        place = folder
        if kind == "disk":
            place = folder / "small"
            place.mkdir()
            mount(place)
            stack.callback(subprocess.run, ["umount", "-l", str(place)], check=True, timeout=10)
        root = place / "forge"
        shutil.copytree(stage.template, root)
        yield root


def mount(place: Path) -> None:
    """Mount a small file system.

    Raises:
        OSError: it is not allowed.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_MB}m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise OSError(f"a small file system cannot be mounted: {done.stderr.strip()}")


def why_no_disk(place: Path) -> str:
    """Return why no small file system can be had here; empty if one can.

    Args:
        place: an empty folder.
    """
    try:
        mount(place)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=10)
    return ""


@final
class _Round:
    """The course of a round."""

    def __init__(
        self, stage: Stage, folder: Path, root: Path, outcome: Outcome, census: Census, compiling: bool
    ) -> None:
        self.stage, self.folder, self.root, self.outcome, self.census = stage, folder, root, outcome, census
        self.chance = random.Random(f"{outcome.kind}-{outcome.number}")
        self.asked, self.compiling = stage.requests(self.chance, compiling), compiling
        # A run starts a forge where none works; one that works already is used, which spares this round the start.
        self.own = outcome.number % 4 == 3
        self.forge: BaseProcess | None = None
        self.struck = Struck("")

    def play(self) -> None:
        """Run, strike, run to the end; then start a new forge, which has to finish everything."""
        if not self.own:
            self.forge = start(job.forge, self.folder, "forge", str(self.root))
            self._card()
        hold = self.chance.randrange(40)
        run = start(job.train, self.folder, "run", str(self.root), hold)
        try:
            self._strike()
            (self.folder / job.STRUCK).touch()
            end(run, "run", self.folder, job.PATIENCE_S)
        finally:
            run.kill()
            run.join()
        self._stop_forge((0, -9) if self.outcome.kind == "bus" else (0,))
        self.outcome.left += self.census.left()
        (self.root.parent / FILLER).unlink(missing_ok=True)
        compare(self.outcome, json.loads((self.folder / job.RESULT).read_text()), self.stage.alone)
        self._finish()
        self._examine()
        self.outcome.left += self.census.left()

    def _card(self, other: int = 0) -> dict[str, Any]:
        """Return where the forge is, as soon as it works; `other` is one that does no longer."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            try:
                card: dict[str, Any] = json.loads((self.root / "forge.json").read_text())
                if card["pid"] != other and psutil.pid_exists(card["pid"]):
                    return card
            except (OSError, ValueError):
                pass
            time.sleep(_LOOK_S)
        raise TimeoutError(f"no forge works: {self._logs()}")

    def _logs(self) -> str:
        return last_words(self.folder / "forge.log") + last_words(self.root / "forge.log")

    def _strike(self) -> None:
        """Ask for kernels, let the run go on, and strike at a random moment of the next seconds."""
        card = self._card()
        with ZmqBus(card["address"], sender="chaos") as bus:
            for request in self.asked.values():
                bus.publish(request, _REQUESTED)
        early = self.chance.random() < 0.2
        if not early:
            (self.folder / job.GO).touch()
            time.sleep(self.chance.uniform(0.0, _LONGEST_DELAY_S))
        self.struck = STRIKES[self.outcome.kind](Scene(self.root, card["pid"], self.chance))
        self.outcome.what = self.struck.what + (", before the run's first look at the store" if early else "")
        (self.folder / job.GO).touch()
        self._wait_for_consequences(card["pid"])

    def _wait_for_consequences(self, pid: int) -> None:
        """Hold the run, in half of the rounds, until the forge has noticed what happened."""
        if self.chance.random() < 0.5:
            return
        if self.struck.victim is not None:
            self.outcome.what += ", until it was judged dead"
            psutil.wait_procs([self.struck.victim], timeout=DEAD_S)
            if self.struck.victim.is_running():
                self.outcome.run.append(f"a stopped worker is taken for alive after {DEAD_S:.0f} s")
        elif self.outcome.kind == "bus":
            self.outcome.what += ", until the run had started another"
            self._card(other=pid)
        elif self.outcome.kind == "disk":
            time.sleep(self.chance.uniform(0.0, 3.0))
            (self.root.parent / FILLER).unlink()
            self.outcome.what += ", and emptied it again"

    def _stop_forge(self, allowed: tuple[int, ...]) -> None:
        """End the forge, unless the run did; its exit status must be an allowed one."""
        process, self.forge = self.forge, None
        if process is None:
            return
        process.terminate()
        process.join(_END_S)
        if process.exitcode not in allowed:
            self.outcome.run.append(f"the forge ended with {process.exitcode}: {self._logs()}")
        process.kill()
        process.join()

    # --- afterwards -----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Start another forge, and wait until it has answered everything that was ever asked for."""
        card_file = self.root / "forge.json"
        old = json.loads(card_file.read_text())["pid"] if card_file.exists() else 0
        self.forge = start(job.forge, self.folder, "forge", str(self.root))
        card = self._card(other=old)
        deadline = time.monotonic() + (_COMPILED_S if self.compiling else _SETTLE_S)
        # Everything that was ever said is heard again.
        with (
            ZmqBus(card["address"], sender="auditor") as bus,
            bus.subscribe("compilation", "validation", since=1) as letters,
        ):
            while self._waits() and time.monotonic() < deadline:
                delivery = letters.receive(0.2)
                if delivery is not None:
                    self._hear(delivery.message)
                    letters.ack(delivery)
        unanswered = sorted(self._expected() - self.outcome.answers.keys())
        self.outcome.lost += [f"{name} was asked for and has no answer: {self._logs()}" for name in unanswered]
        self.outcome.lost += [f"a job never ends: {found}" for found in open_jobs(self.root)]
        self._stop_forge((0,))

    def _expected(self) -> set[str]:
        """Return what must be answered: not what was asked about a record that is damaged now, as the doctor says."""
        return set(self.asked) - self.struck.subjects

    def _waits(self) -> bool:
        return bool(self._expected() - self.outcome.answers.keys() or open_jobs(self.root))

    def _hear(self, message: object) -> None:
        if isinstance(message, KernelCharacterized):
            self.outcome.answers[message.kernel_artifact_id] = "VALIDATED"
        elif isinstance(message, KernelRejected):
            self.outcome.answers[message.kernel_artifact_id] = f"REJECTED: {message.detail}"[:200]

    def _examine(self) -> None:
        """Compare what journals, store and doctor say with what was done."""
        end(start(job.inspect, self.folder, "doctor", str(self.root)), "doctor", self.folder, _END_S)
        told = json.loads((self.folder / "doctor.json").read_text())
        Audit(self.outcome, self.struck, self.asked, self.stage.facts["files"]).check(told, self.root)
