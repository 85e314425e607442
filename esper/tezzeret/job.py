"""The jobs of Tezzeret's workers: one compilation each, in a sandboxed child. A worker imports no torch."""

import os
import sys
from pathlib import Path
from typing import Final

from esper.leyline.artifacts import CompilationRequest, CompiledKernel
from esper.leyline.base import Message
from esper.leyline.codec import decode, encode, to_json
from esper.leyline.errors import JobError, KernelError, WrongFingerprint
from esper.workers.limits import Ending, Limits, SandboxOutcome, keys

ARTIFACT: Final = ("ir.json", "fw.so", "bw.so")
"""Files of a compiled artifact beside its manifest; the fast tier has the first only."""

UNFIT: Final = "unfit.txt"
"""File that says why this machine is not the one to compile the kernel, in the job's folder."""

SHELF: Final = "ESPER_SHELF"
"""Environment variable of a worker: folder with what compilations share; by default one in the user's cache."""

CPU_S: Final = 240.0
"""Processor time that a compilation may take, in seconds; about 20 is usual on a processor of one's own."""

WALL_S: Final = 600.0
"""Time on the clock that it may take, in seconds; at idle priority the clock runs while others work."""

MEMORY_MB: Final = 3072
"""Memory that it may take, in MiB."""

_BROKEN: Final = (
    Ending.WALL_LIMIT,
    Ending.CPU_LIMIT,
    Ending.MEMORY_LIMIT,
    Ending.PROCESS_LIMIT,
    Ending.FILES_LIMIT,
)


class Order(Message):
    """A request on its way to a worker.

    Args:
        request: what to compile, its pipeline chosen.
        fingerprint: binary interface that the kernel is for, see `esper.kasmina.fingerprint`; empty for the worker's.
    """

    request: CompilationRequest
    fingerprint: str = ""


def shelf() -> Path:
    """Return the folder with what the compilations of this machine share."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(SHELF) or cache / "esper" / "compiler")


def prepare(payload: bytes, folder: Path) -> list[str]:
    """Write `request.json` and return the command that compiles it.

    Args:
        payload: an encoded `Order`, or a bare `CompilationRequest`.
        folder: private folder of the job.
    """
    order = _order(payload)
    (folder / "request.json").write_text(to_json(order.request), encoding="utf-8")
    shelf().mkdir(parents=True, exist_ok=True, mode=0o700)
    command = [sys.executable, "-m", "esper.tezzeret.compile", str(folder), "--shelf", str(shelf())]
    return [*command, "--fingerprint", order.fingerprint] if order.fingerprint else command


def limits(payload: bytes) -> Limits:
    """Return what the child may use."""
    return Limits(
        cpu_s=CPU_S, wall_s=WALL_S, memory_mb=MEMORY_MB, files_mb=1024, writable=(str(shelf()),), hidden=keys()
    )


def collect(folder: Path, outcome: SandboxOutcome) -> bytes:
    """Return the encoded `CompiledKernel`.

    Raises:
        JobError: the kernel cannot be compiled, or not within the limits; the message says why.
        WrongFingerprint: it is for another machine, and was not compiled here.
        KernelError: the child died; another try may do better.
    """
    unfit = _read(folder, UNFIT)
    if unfit is not None:
        raise WrongFingerprint(unfit.decode(errors="replace"))
    error = _read(folder, "error.txt")
    if error is not None:
        raise JobError(error.decode(errors="replace"))
    if outcome.ending in _BROKEN:
        raise JobError(f"The compilation was stopped: {outcome.detail or outcome.ending.value}.")
    manifest, record = _read(folder, "manifest.json"), _read(folder, "record.json")
    if not outcome.ok or manifest is None or record is None:
        raise KernelError(f"the compilation ended without a result ({outcome.ending}): {outcome.stderr_tail[-500:]}")
    found = {name: _read(folder, name) for name in ARTIFACT}
    files = {name: data for name, data in found.items() if data is not None}
    return encode(CompiledKernel(manifest=manifest.decode(), files=files, record=record.decode()))


def _order(payload: bytes) -> Order:
    found = decode({kind.__name__: kind for kind in (Order, CompilationRequest)}, payload)
    if isinstance(found, CompilationRequest):
        return Order(request=found)
    assert isinstance(found, Order)
    return found


def _read(folder: Path, name: str) -> bytes | None:
    """Return the content of a plain file; a link may lead anywhere, and is an error."""
    try:
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JobError(f"{name} is no plain file: {error}") from error
    with os.fdopen(handle, "rb") as file:
        return file.read()
