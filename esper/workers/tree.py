"""What a process and its descendants use, read from /proc; elsewhere than on Linux there is nothing to read.

Only the standard library is used here (see `limits`).
"""

import os
import signal
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
_UTIME = 11
"""Place of the first of the four times in `/proc/PID/stat`, counted after the name."""


class Usage(NamedTuple):
    """What a set of processes uses at one instant.

    Args:
        cpu_s: CPU time so far, that of their reaped children included, in seconds.
        memory_mb: private resident memory, in MiB.
        processes: how many there are.
    """

    cpu_s: float
    memory_mb: float
    processes: int


def descendants(root: int, most: int = 100_000) -> list[int]:
    """Return the process ids below `root`, and stop looking once there are more than `most`."""
    found: list[int] = []
    waiting = [root]
    while waiting and len(found) <= most:
        children = _children(waiting.pop())
        found += children
        waiting += children
    return found


def _children(process: int) -> list[int]:
    try:
        return [
            int(number)
            for task in Path(f"/proc/{process}/task").iterdir()
            for number in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def usage(processes: list[int]) -> Usage:
    """Return what the processes use; one that has gone meanwhile counts nothing."""
    readings = [reading for process in processes if (reading := _read(process))]
    return Usage(sum(cpu for cpu, _ in readings), sum(memory for _, memory in readings), len(readings))


def _read(process: int) -> tuple[float, float] | None:
    try:
        times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        _, resident, shared = Path(f"/proc/{process}/statm").read_text().split()[:3]
    except OSError:
        return None
    return sum(map(int, times[_UTIME : _UTIME + 4])) / _TICKS, (int(resident) - int(shared)) * _PAGE_MB


def kill_below(root: int) -> None:
    """Kill every descendant, again and again until none starts another; `root` must adopt orphans."""
    while alive := descendants(root):
        for process in alive:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap()


def reap() -> None:
    """Take the exit status of every child that has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return
