"""The sandbox's keeper: confines a command, watches it and its descendants, and tells how it ended.

`python -S -P -m esper.workers.child PARENT FOLDER LIMITS COMMAND...` prints one line of JSON. It runs no thread, so it
may fork: it is the small process between the worker and the command, where the limits can be set safely.

    worker -> keeper (watches) -> first process of a namespace (reaps) -> command -> its descendants

Whichever of them is killed, the kernel kills all to the right of it. Where namespaces are refused, the keeper is the
command's parent, adopts its orphans and kills them itself. Only the standard library is used here (see `limits`).
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from esper.workers import confine, tree
from esper.workers.limits import Ending, Limits, SandboxOutcome

_LOOK_S = 0.05
_MEASURE_S = 0.2
_WEIGH_S = 1.0
_TAIL_BYTES = 8192
_MIB = 2**20
_NOT_STARTED = 127


class Keeper:
    """Runs one command within its limits.

    Args:
        command: the program and its arguments.
        folder: its working folder.
        limits: what it may use.
        parent: process id of the worker.
    """

    def __init__(self, command: list[str], folder: str, limits: Limits, parent: int) -> None:
        """Remember what to run; `run` starts it."""
        self._command, self._folder, self._limits, self._parent = command, folder, limits, parent
        self._missing: list[str] = []
        self._broken: tuple[Ending, str] | None = None
        self._tail, self._open = b"", True
        self._peak_mb = self._cpu_s = 0.0
        self._contained = False
        self._child = self._status = 0

    def run(self) -> SandboxOutcome:
        """Run the command to its end, or to the first limit that it breaks."""
        self._contained = self._try("namespaces", lambda: confine.leave_namespaces(self._limits.network))
        signal.signal(signal.SIGTERM, self._stop)
        # A namespace dies with its first process; without one, the keeper must live to kill what it adopted.
        number = signal.SIGKILL if self._contained else signal.SIGTERM
        self._try("death with the worker", lambda: confine.die_with_parent(number, self._parent))
        if not self._contained:
            self._try("adoption of orphans", confine.adopt_orphans)
            if not self._limits.network:
                self._missing.append("network: it needs a namespace")
        return self._watch(*self._start())

    def _try(self, what: str, act: Callable[[], None]) -> bool:
        try:
            act()
        except (confine.Refused, OSError) as error:
            self._missing.append(f"{what}: {error}")
            return False
        return True

    def _stop(self, *_: object) -> None:
        """End at once, with everything below."""
        self._kill()
        os._exit(1)

    # --- starting -----------------------------------------------------------------------------------------------

    def _start(self) -> tuple[int, int]:
        """Start the command; return the ends to read: what it prints, and what is said of it."""
        printed, said = os.pipe(), os.pipe()
        keeper = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.close(printed[0])
                os.close(said[0])
                os.dup2(printed[1], 1)
                os.dup2(printed[1], 2)
                first = _first if self._contained else _enter
                first(self._command, self._folder, self._limits, keeper, said[1])
            finally:
                os._exit(_NOT_STARTED)
        os.close(printed[1])
        os.close(said[1])
        os.set_blocking(printed[0], False)
        return printed[0], said[0]

    # --- watching -----------------------------------------------------------------------------------------------

    def _watch(self, printed: int, said: int) -> SandboxOutcome:
        """Look at the command until it ends or breaks a limit; nothing of it is left when this returns."""
        started = measured = weighed = time.monotonic()
        while not self._ended() and self._broken is None:
            self._drain(printed, _LOOK_S)
            now = time.monotonic()
            if now - started > self._limits.wall_s:
                self._broken = (Ending.WALL_LIMIT, f"it ran longer than {self._limits.wall_s:g} s")
            elif now - measured > _MEASURE_S:
                measured = now
                self._measure()
            elif now - weighed > _WEIGH_S:
                weighed = now
                self._weigh()
            if os.getppid() != self._parent:
                self._stop()
        self._kill()
        self._drain(printed, 0.0)
        return self._outcome(_lines(said), time.monotonic() - started)

    def _ended(self) -> bool:
        """Whether the child has ended; if so, take its status and what it used."""
        process, status, used = os.wait4(self._child, os.WNOHANG)
        if not process:
            return False
        self._status, self._child = status, 0
        self._cpu_s = max(self._cpu_s, used.ru_utime + used.ru_stime)
        self._peak_mb = max(self._peak_mb, used.ru_maxrss / (1024 if sys.platform == "linux" else _MIB))
        return True

    def _measure(self) -> None:
        """Compare what all processes use together with the limits."""
        limits = self._limits
        # The first process of the namespace is ours.
        processes = tree.descendants(os.getpid(), limits.processes + 1)[self._contained :]
        used = tree.usage(processes)
        memory_mb = limits.resident_mb or limits.memory_mb
        # What ended in the meantime was counted with its parent, or was too short to count.
        self._cpu_s = max(self._cpu_s, used.cpu_s)
        self._peak_mb = max(self._peak_mb, used.memory_mb)
        if used.cpu_s > limits.cpu_s:
            self._broken = (Ending.CPU_LIMIT, f"it used more than {limits.cpu_s:g} s of CPU time")
        elif memory_mb and used.memory_mb > memory_mb:
            self._broken = (Ending.MEMORY_LIMIT, f"it held {used.memory_mb:.0f} MiB; {memory_mb} are allowed")
        elif len(processes) > limits.processes:
            self._broken = (Ending.PROCESS_LIMIT, f"it had more than {limits.processes} processes at once")

    def _weigh(self) -> None:
        """Compare the size of its folder with the limit."""
        size = _size(self._folder) / _MIB
        if size > self._limits.files_mb:
            self._broken = (Ending.FILES_LIMIT, f"its files hold {size:.0f} MiB; {self._limits.files_mb} are allowed")

    def _drain(self, printed: int, wait_s: float) -> None:
        """Keep the end of what it prints."""
        if not self._open:
            time.sleep(wait_s)
            return
        if select.select([printed], [], [], wait_s)[0]:
            data = os.read(printed, 65536)
            self._open = bool(data)
            self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def _kill(self) -> None:
        """Kill all that is left, and take every exit status."""
        while self._child and not self._ended():
            if not self._contained:
                # Where /proc is missing, the command's own group is all that can be found.
                with contextlib.suppress(OSError):
                    os.killpg(self._child, signal.SIGKILL)
            os.kill(self._child, signal.SIGKILL)
            time.sleep(0.005)
        if not self._contained:
            tree.kill_below(os.getpid())

    # --- reporting ----------------------------------------------------------------------------------------------

    def _outcome(self, said: list[str], wall_s: float) -> SandboxOutcome:
        missing = (*self._missing, *(line[1:] for line in said if line.startswith("-")))
        status = next((int(line[1:]) for line in said if line.startswith("=")), None)
        if not self._contained:
            status = self._status
        code = None if status is None else os.waitstatus_to_exitcode(status)
        ending, detail = self._broken or self._natural(code)
        return SandboxOutcome(
            exit_code=code,
            ending=ending,
            detail=detail,
            timed_out=ending in (Ending.WALL_LIMIT, Ending.CPU_LIMIT),
            cpu_seconds=round(self._cpu_s, 3),
            wall_seconds=round(wall_s, 3),
            peak_memory_mb=round(self._peak_mb, 1),
            stderr_tail=self._tail.decode(errors="replace"),
            missing=missing,
        )

    def _natural(self, code: int | None) -> tuple[Ending, str]:
        """Name the end of a command that no look of ours ended."""
        if code is None:
            return Ending.LOST, "its namespace was killed from outside"
        if code >= 0:
            return Ending.EXITED, f"it ended with status {code}"
        name = signal.Signals(-code).name
        if -code == signal.SIGXCPU or (-code == signal.SIGKILL and self._cpu_s >= self._limits.cpu_s):
            return Ending.CPU_LIMIT, f"it used more than {self._limits.cpu_s:g} s of CPU time"
        if -code == signal.SIGXFSZ:
            return Ending.FILES_LIMIT, f"it wrote a file of more than {self._limits.files_mb} MiB"
        return Ending.SIGNALLED, f"it was ended by {name}"


# --- the processes below the keeper -----------------------------------------------------------------------------


def _first(command: list[str], folder: str, limits: Limits, keeper: int, said: int) -> NoReturn:
    """Be the first process of the namespace: start the command, reap, tell its status, leave nobody behind."""
    confine.die_with_parent(signal.SIGKILL, keeper)
    # From inside the namespace a keeper that died before that call looks like one that lives: nobody listens any more.
    if _unheard(said):
        os._exit(1)
    _try_and_say("mounts", lambda: confine.arrange_mounts(limits.hidden), said)
    started = os.fork()
    if started == 0:
        try:
            _enter(command, folder, limits, os.getppid(), said)
        finally:
            os._exit(_NOT_STARTED)
    process = status = 0
    while process != started:
        process, status = os.wait()
    os.write(said, f"={status}\n".encode())
    # Outside a namespace, -1 would mean every process of the machine.
    if os.getpid() == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
    os._exit(0)


def _enter(command: list[str], folder: str, limits: Limits, parent: int, said: int) -> NoReturn:
    """Give everything up and become the command."""
    os.setsid()
    _try_and_say("death with the keeper", lambda: confine.die_with_parent(signal.SIGKILL, parent), said)
    _try_and_say("low priority", lambda: confine.step_back(limits.background), said)
    _try_and_say("files", lambda: confine.write_only_in((folder, *limits.writable)), said)
    _try_and_say("limits", lambda: confine.set_resource_limits(limits), said)
    _try_and_say("privileges", confine.drop_privileges, said)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, dict(os.environ))
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error}\n".encode())
    os._exit(_NOT_STARTED)


def _try_and_say(what: str, act: Callable[[], None], said: int) -> None:
    try:
        act()
    except (confine.Refused, OSError, ValueError) as error:
        os.write(said, f"-{what}: {error}\n".encode())


def _unheard(said: int) -> bool:
    """Return whether the other end of a pipe is closed."""
    ends = select.poll()
    ends.register(said, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in ends.poll(0))


def _lines(handle: int) -> list[str]:
    """Read all that was said; every writer has ended."""
    with os.fdopen(handle) as stream:
        return stream.read().splitlines()


def _size(folder: str) -> int:
    """Return the bytes below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(f"{root}/{name}").st_blocks * 512
    return total


def main() -> None:
    """Run the command named on the command line; print its outcome."""
    parent, folder, limits, *command = sys.argv[1:]
    keeper = Keeper(command, folder, Limits.of(json.loads(limits)), int(parent))
    print(json.dumps(keeper.run().as_dict()), flush=True)


if __name__ == "__main__":
    main()
