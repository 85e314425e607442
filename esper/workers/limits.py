"""What a sandboxed command may use, and how it ended.

Only the standard library is used here: the sandbox's keeper starts without site packages.
"""

import os
from dataclasses import asdict, dataclass
from enum import StrEnum, unique
from typing import Any, Final, Self

KEYS: Final = "ESPER_KEYS"
"""Environment variable of a worker: the folder of private keys, which its jobs must see empty."""


@unique
class Ending(StrEnum):
    """Why a sandboxed command ended."""

    EXITED = "EXITED"
    SIGNALLED = "SIGNALLED"
    WALL_LIMIT = "WALL_LIMIT"
    CPU_LIMIT = "CPU_LIMIT"
    MEMORY_LIMIT = "MEMORY_LIMIT"
    PROCESS_LIMIT = "PROCESS_LIMIT"
    FILES_LIMIT = "FILES_LIMIT"
    CANCELLED = "CANCELLED"
    LOST = "LOST"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a sandboxed command and all its descendants together may use.

    Args:
        cpu_s: CPU time, in seconds.
        wall_s: time on the clock, in seconds.
        memory_mb: address space of each process, and private resident memory of all, in MiB; 0 for no bound on the
            address space (CUDA reserves far more than it uses), which leaves the bound `resident_mb`.
        resident_mb: private resident memory of all processes, in MiB; 0 takes `memory_mb`.
        files_mb: size of each file it writes, and of its folder, in MiB.
        processes: processes that may live at once.
        network: whether it may use the network.
        writable: further folders in which it may write, e.g. a compiler's cache.
        hidden: folders that it sees empty, e.g. one of private keys.
        background: whether it runs only when nothing else wants the processor; otherwise it is merely nice.
    """

    cpu_s: float = 60.0
    wall_s: float = 120.0
    memory_mb: int = 2048
    resident_mb: int = 0
    files_mb: int = 256
    processes: int = 64
    network: bool = False
    writable: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    background: bool = True

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """Return the limits that `asdict` turned into JSON."""
        return cls(**{**fields, "writable": tuple(fields["writable"]), "hidden": tuple(fields["hidden"])})


@dataclass(frozen=True, kw_only=True)
class SandboxOutcome:
    """How a sandboxed command ended.

    Args:
        exit_code: its exit status, negative for a signal; None when it is not known.
        ending: why it ended.
        detail: the same in one sentence.
        timed_out: whether a limit of time, on the clock or of the processor, ended it.
        cpu_seconds: CPU time of the command and its descendants, in seconds.
        wall_seconds: time on the clock, in seconds.
        peak_memory_mb: largest memory seen: of all processes at one instant, or of one of them, in MiB.
        stderr_tail: the end of what it printed, on either stream.
        missing: protections that this system refused, each with its reason.
    """

    exit_code: int | None
    ending: Ending
    detail: str = ""
    timed_out: bool = False
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    stderr_tail: str = ""
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the command ended by itself with status 0."""
        return self.ending is Ending.EXITED and self.exit_code == 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in a form that JSON can hold."""
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """Return the outcome that `as_dict` wrote."""
        changed = {"ending": Ending(fields["ending"]), "missing": tuple(fields["missing"])}
        return cls(**{**fields, **changed})


def keys() -> tuple[str, ...]:
    """Return the folder of private keys that the pool's owner has named in its environment, for `Limits.hidden`."""
    folder = os.environ.get(KEYS)
    return (folder,) if folder else ()
