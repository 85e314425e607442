"""The worker processes that a pool starts itself, and starts again when they die."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, final

from esper.workers.worker import TOKEN

_ROOT: Final = str(Path(__file__).parents[2])
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 30.0
_STEADY_S: Final = 30.0
_STOP_S: Final = 3.0
_TAIL: Final = 1000


class Death(NamedTuple):
    """A worker process that has ended.

    Args:
        name: the worker.
        exit_code: its exit status, negative for a signal.
        tail: the end of what it wrote on its error stream.
    """

    name: str
    exit_code: int
    tail: str


@dataclass
class _Place:
    """Where one worker works, and its successors after it."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    started: float = 0.0
    fails: int = 0
    not_before: float = 0.0


@final
class Crew:
    """Keeps a number of worker processes alive; used by one thread, which must outlive them.

    Args:
        name: start of the workers' names.
        size: number of workers.
        folder: folder for their files; what a killed predecessor left in it is removed.
        command: returns the arguments of a worker with this name and folder.
        token: what they show the pool.
        cpus: processors that they may run on; empty for all.
    """

    def __init__(
        self,
        name: str,
        size: int,
        folder: Path,
        command: Callable[[str, Path], list[str]],
        token: str,
        cpus: Sequence[int] = (),
    ) -> None:
        """Prepare the places; `tend` fills them."""
        self._name, self._folder, self._command, self._token, self._cpus = name, folder, command, token, tuple(cpus)
        self._places = [_Place(number) for number in range(size)]
        self._born = 0
        shutil.rmtree(folder, ignore_errors=True)

    def tend(self) -> list[Death]:
        """Start who is missing, unless it died a moment ago; return who has died."""
        deaths = [death for place in self._places if (death := self._look(place))]
        now = time.monotonic()
        for place in self._places:
            if place.process is None and now >= place.not_before:
                self._start(place)
        return deaths

    def older(self, age_s: float) -> list[str]:
        """Return the names of the workers that run for longer than a time, in seconds."""
        now = time.monotonic()
        return [place.name for place in self._places if place.process is not None and now - place.started > age_s]

    def kill(self, name: str) -> bool:
        """Kill a worker; False when it is none of ours."""
        for place in self._places:
            if place.process is not None and place.name == name:
                place.process.kill()
                return True
        return False

    def end(self) -> None:
        """Wait a moment for all to end as they were told, and kill who has not."""
        until = time.monotonic() + _STOP_S
        processes = [place.process for place in self._places if place.process is not None]
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, place: _Place) -> None:
        self._born += 1
        place.name = f"{self._name}-{place.number}.{self._born}"
        place.started = time.monotonic()
        home = self._folder / place.name
        try:
            home.mkdir(parents=True, mode=0o700)
            with (home / "worker.log").open("wb") as log:
                place.process = subprocess.Popen(
                    [sys.executable, *self._command(place.name, home)],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            if self._cpus and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(place.process.pid, self._cpus)
        except OSError:
            # The disk or the process table is full: that passes.
            self._pause(place)

    def _environment(self) -> dict[str, str]:
        """Return our own environment, so arranged that a worker can import what we can."""
        path = os.pathsep.join([_ROOT, *filter(None, sys.path)])
        return {**os.environ, TOKEN: self._token, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def _look(self, place: _Place) -> Death | None:
        if place.process is None or (code := place.process.poll()) is None:
            return None
        home = self._folder / place.name
        death = Death(place.name, code, _tail(home / "worker.log"))
        shutil.rmtree(home, ignore_errors=True)
        if time.monotonic() - place.started > _STEADY_S:
            place.fails = 0
        self._pause(place)
        return death

    def _pause(self, place: _Place) -> None:
        place.process = None
        pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**place.fails)
        place.fails = min(place.fails + 1, 20)
        place.not_before = time.monotonic() + pause


def _tail(log: Path) -> str:
    try:
        return log.read_text(errors="replace")[-_TAIL:].strip()
    except OSError:
        return ""
