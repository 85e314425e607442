"""What the rounds of `chaos.py` stand on: a prepared forge, processes forked from a server, a census of them."""

import json
import multiprocessing
import random
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, final

import psutil

from benchmarks import chaos_job as job
from esper.leyline.artifacts import CompilationRequest
from esper.leyline.codec import from_json

_GONE_S = 20.0
_LOOK_S = 0.2
_WATCH_S = 0.5
_SETTLED_S = 10.0


class Ours(NamedTuple):
    """A process of a round."""

    pid: int
    created: float


@final
class Census:
    """Keeps a list of the round's processes, which are those that work in its folder or have it on their command line.

    Args:
        folder: the round's.
    """

    def __init__(self, folder: Path) -> None:
        """Start looking."""
        self._folder, self._began = str(folder), time.time() - 1.0
        self._seen: dict[Ours, tuple[str, float]] = {}
        self._foreign: set[Ours] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_WATCH_S):
            self._look()

    def _look(self) -> None:
        for process in psutil.process_iter():
            try:
                one = Ours(process.pid, process.create_time())
                if one.created < self._began or one in self._foreign:
                    continue
                command = " ".join(process.cmdline())
                if one in self._seen or self._folder in command or process.cwd().startswith(self._folder):
                    used = process.cpu_times()
                    self._seen[one] = (command[:200] or process.name(), used.user + used.system)
                elif time.time() - one.created > _SETTLED_S:
                    self._foreign.add(one)  # A process of ours goes to its folder at once.
            except psutil.Error:
                continue

    @property
    def cpu_s(self) -> float:
        """Processor time of all processes when they were last seen, in seconds."""
        return sum(spent for _, spent in self._seen.values())

    def left(self) -> list[str]:
        """Return the processes that still exist after a while, the dead that nobody has buried among them."""
        deadline = time.monotonic() + _GONE_S
        while (found := self._alive()) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return found

    def _alive(self) -> list[str]:
        self._look()
        found = []
        for one, (command, _) in list(self._seen.items()):
            try:
                process = psutil.Process(one.pid)
                if abs(process.create_time() - one.created) < 0.1:
                    found.append(f"{process.pid} ({process.status()}): {command}")
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        """Stop looking, and kill what is left: later rounds need the machine."""
        self._stop.set()
        self._thread.join()
        for one in self._seen:
            try:
                process = psutil.Process(one.pid)
                if abs(process.create_time() - one.created) < 0.1:
                    process.kill()
            except psutil.Error:
                continue


@final
class Stage:
    """What every round starts from: a forge's folder with VALIDATED kernels, and the run without a forge.

    Args:
        folder: where everything goes; made anew.
        kernel: folder of the compiled kernel of BP-MLP-GELU for the run's site.
    """

    def __init__(self, folder: Path, kernel: Path) -> None:
        """Prepare."""
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.template = folder, folder / "template"
        alone = folder / "alone"
        alone.mkdir(parents=True)
        for file in (job.GO, job.STRUCK):
            (alone / file).touch()
        end(start(job.train, alone, "run", "", 0), "run", alone, job.PATIENCE_S)
        end(start(job.prepare, folder, "prepare", str(self.template), str(kernel)), "prepare", folder, job.PATIENCE_S)
        self.alone = json.loads((alone / job.RESULT).read_text())
        self.facts = json.loads((folder / job.FACTS).read_text())

    def requests(self, chance: random.Random, compiling: bool) -> dict[str, CompilationRequest]:
        """Choose what a round asks for: an eager kernel, or one for a GPU; and one to be compiled besides."""
        *eager, gpu, cpu = self.facts["asked"]
        # A gauntlet takes ten seconds of processor time; a compilation that cannot be is refused after three.
        chosen = [chance.choice(eager) if chance.random() < 0.2 else gpu, *([cpu] if compiling else [])]
        return {name: from_json(CompilationRequest, self.facts["asked"][name]) for name in chosen}


def start(task: Callable[..., None], folder: Path, name: str, *arguments: Any) -> BaseProcess:
    """Start a process of a round; it is forked from a server that has torch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(job.PRELOADED)
    process = context.Process(target=job.begin, args=(task, folder, name, *arguments))
    process.start()
    return process


def end(process: BaseProcess, name: str, folder: Path, patience_s: float) -> None:
    """Wait until a process has ended well.

    Raises:
        RuntimeError: it has not.
    """
    process.join(patience_s)
    if process.exitcode != 0:
        how = "does not end" if process.exitcode is None else f"ended with {process.exitcode}"
        process.kill()
        process.join()
        raise RuntimeError(f"the {name} {how}: {last_words(folder / f'{name}.log')}")


def last_words(log: Path) -> str:
    """Return the end of a log; empty where there is none."""
    return log.read_text(errors="replace")[-600:] if log.exists() else ""


def compiled(folder: Path) -> Path:
    """Return the folder of the kernel that the runs graft, compiled if it is not there yet."""
    if not (folder / "record.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        end(start(job.compile, folder, "compile"), "compile", folder, job.PATIENCE_S)
    return folder
