"""The seven ways in which `chaos.py` hurts a forge at work, and what each of them damages for good."""

import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, NamedTuple

import psutil

TABLES: Final = ("blueprint", "kernel", "manifest", "attestation")
DEAD_S: Final = 90.0
"""Longest time until a worker that is stopped must be judged dead, in seconds; one that has not said a word yet may be
starting, and has longer than the others."""
FILLER: Final = "filler"
START_S, BUSY_S = 60.0, 6.0
_LOOK_S: Final = 0.1


class Struck(NamedTuple):
    """What was done.

    Args:
        what: in one line.
        subjects: what `esper doctor --store` may name from now on, and must name one of; empty for no damage.
        victim: the process that is stopped; None for none.
    """

    what: str
    subjects: frozenset[str] = frozenset()
    victim: psutil.Process | None = None


class Scene(NamedTuple):
    """Where to strike.

    Args:
        root: the forge's folder.
        pid: the forge's process.
        chance: makes every choice.
    """

    root: Path
    pid: int
    chance: random.Random

    def workers(self) -> list[psutil.Process]:
        """Return the workers of both pools; those with a job first, and most often there is one.

        Raises:
            TimeoutError: there is no worker.
        """
        now = time.monotonic()
        # The job may have ended before we looked.
        latest = now + (BUSY_S if self.chance.random() < 0.75 else 0.0)
        while not (found := self._workers()) or (not below(found[0]) and time.monotonic() < latest):
            if time.monotonic() > now + START_S:
                raise TimeoutError("the forge has no workers")
            time.sleep(_LOOK_S)
        return found

    def _workers(self) -> list[psutil.Process]:
        found = [child for child in below(psutil.Process(self.pid)) if _is_worker(child)]
        return sorted(found, key=lambda worker: -len(below(worker)))


def below(process: psutil.Process) -> list[psutil.Process]:
    """Return what a process has started, and what that has; nothing if it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "esper.workers.worker" in process.cmdline()
    except psutil.Error:
        return False


def _worker(scene: Scene) -> Struck:
    """Kill a worker, or one of the processes of the job that it does."""
    worker = scene.workers()[0]
    family = below(worker)
    number = scene.chance.randrange(len(family) + 1)
    _kill([worker, *family][number])
    which = f"process {number} of {len(family)} of a job" if number else f"a worker with {len(family)} processes"
    return Struck(f"killed {which}")


def _pool(scene: Scene) -> Struck:
    """Kill the workers of both pools at once."""
    workers = scene.workers()
    jobs = sum(bool(below(worker)) for worker in workers)
    for worker in workers:
        _kill(worker)
    return Struck(f"killed {len(workers)} workers, {jobs} with a job")


def _bus(scene: Scene) -> Struck:
    """Kill the forge: the broker and the services are gone, the pools lose their parent."""
    jobs = sum(bool(below(worker)) for worker in scene.workers())
    _kill(psutil.Process(scene.pid))
    return Struck(f"killed the forge with {jobs} jobs at work")


def _stopped(scene: Scene) -> Struck:
    """Stop a worker, one with a job if there is one; nobody continues it."""
    victim = scene.workers()[0]
    what = "stopped a worker with a job" if below(victim) else "stopped a worker without a job"
    victim.send_signal(signal.SIGSTOP)
    return Struck(what, victim=victim)


def _kill(process: psutil.Process) -> None:
    """Kill, unless it has just ended by itself."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _disk(scene: Scene) -> Struck:
    """Fill the small file system that the forge's folder is on, to the last byte."""
    written = 0
    with (scene.root.parent / FILLER).open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    written += file.write(bytes(size))
            except OSError:
                continue
    return Struck(f"filled the last {written / 2**20:.1f} MiB")


def _record(scene: Scene) -> Struck:
    """Flip bits of one record's bytes, as a failing disk would."""
    table = scene.chance.choice(TABLES)
    with closing(sqlite3.connect(scene.root / "store/records/cache.db", timeout=30.0)) as base, base:
        base.execute("BEGIN IMMEDIATE")
        rows = base.execute("SELECT key, value FROM Cache WHERE substr(key, 1, ?) = ?", (len(table) + 1, f"{table}/"))
        key, value = scene.chance.choice(sorted(rows.fetchall()))
        data = bytearray(value)
        places = scene.chance.sample(range(len(data)), scene.chance.randint(1, 4))
        for place in places:
            data[place] ^= 1 << scene.chance.randrange(8)
        base.execute("UPDATE Cache SET value = ? WHERE key = ?", (bytes(data), key))
    name = key.removeprefix(f"{table}/")
    subjects = {name, key, name.partition("/")[0]}
    return Struck(f"flipped {len(places)} bits of record {key[:40]}", frozenset(subjects))


def _artifact(scene: Scene) -> Struck:
    """Flip a bit of a file of an artifact, or cut the file short."""
    with closing(sqlite3.connect(scene.root / "store/records/cache.db", timeout=30.0)) as base:
        keys = base.execute("SELECT key FROM Cache WHERE substr(key, 1, 7) = 'kernel/'").fetchall()
    kernels = {_manifest_id(path): path for path in sorted((scene.root / "store/artifacts").glob("??/*/manifest.json"))}
    known = sorted(key.removeprefix("kernel/") for (key,) in keys if key.removeprefix("kernel/") in kernels)
    name = scene.chance.choice(known)
    file = scene.chance.choice(sorted(kernels[name].parent.iterdir()))
    data = bytearray(file.read_bytes())
    if scene.chance.random() < 0.5:
        what, data = "cut", data[: scene.chance.randrange(len(data))]
    else:
        what = "flipped a bit of"
        data[scene.chance.randrange(len(data))] ^= 1 << scene.chance.randrange(8)
    # In place, as a failing disk would: whoever has the file mapped sees it.
    file.chmod(0o600)
    with file.open("r+b") as handle:
        handle.write(data)
        handle.truncate()
        os.fsync(handle.fileno())
    return Struck(f"{what} {file.name} of {name[:24]}", frozenset({name}))


def _manifest_id(manifest: Path) -> str:
    """Return the kernel whose manifest this is."""
    text = manifest.read_text(encoding="utf-8", errors="replace")
    return text.partition('"kernel_id":"')[2].partition('"')[0]


STRIKES: Final[dict[str, Callable[[Scene], Struck]]] = {
    "worker": _worker,
    "pool": _pool,
    "bus": _bus,
    "stopped": _stopped,
    "disk": _disk,
    "record": _record,
    "artifact": _artifact,
}
"""The kinds of rounds."""
