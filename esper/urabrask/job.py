"""The jobs of Urabrask's workers: one gauntlet each, in a sandboxed child. A worker imports no torch."""

import os
import signal
import sys
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from esper.leyline.artifacts import CompiledKernel, KernelManifest
from esper.leyline.codec import decode
from esper.leyline.errors import JobError, KernelError, WrongFingerprint
from esper.urabrask.findings import Failure, Findings
from esper.urabrask.hardware import hardware
from esper.urabrask.limits import CPU_S, LONGEST, MEMORY_MB, SMALL, WALL_FACTOR
from esper.urabrask.trail import last_place
from esper.urza.artifacts import check_name
from esper.urza.canonical import parse
from esper.workers.limits import Ending, Limits, SandboxOutcome, keys

ARTIFACT: Final = "artifact"
"""Folder of the artifact within the job's folder."""

FINDINGS: Final = "findings.json"
"""File with what was found, in the job's folder."""

UNFIT: Final = "unfit.txt"
"""File that says why this machine is not the one to try the kernel on, in the job's folder."""

_BROKEN: Final = frozenset(
    {Ending.WALL_LIMIT, Ending.CPU_LIMIT, Ending.MEMORY_LIMIT, Ending.PROCESS_LIMIT, Ending.FILES_LIMIT}
)
"""Endings that the kernel has brought upon itself."""

_NOT_ITS_FAULT: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGILL})
"""Signals that somebody else sends, or that say that the kernel is for another processor: another try may do."""

_STARVED: Final = 0.25
"""A child that got less than this share of its time on the clock was waiting, for the machine or for nothing."""

_LONGEST: Final = 2**20


def prepare(payload: bytes, folder: Path) -> list[str]:
    """Write the artifact's files and return the command that tries them.

    Args:
        payload: an encoded `CompiledKernel`.
        folder: private folder of the job.
    """
    kernel = decode(CompiledKernel, payload)
    artifact = folder / ARTIFACT
    artifact.mkdir(mode=0o700)
    (artifact / "manifest.json").write_text(kernel.manifest, encoding="utf-8")
    for name, data in kernel.files.items():
        (artifact / check_name(name)).write_bytes(data)
    return [sys.executable, "-m", "esper.urabrask.gauntlet", str(folder)]


def limits(payload: bytes) -> Limits:
    """Return what the child may use, by the size of the kernel."""
    spec = parse(KernelManifest, decode(CompiledKernel, payload).manifest).spec
    times = min(LONGEST, max(1.0, spec.tokens * spec.d_in * spec.d_out / SMALL))
    return Limits(
        cpu_s=CPU_S * times, wall_s=WALL_FACTOR * CPU_S * times, memory_mb=MEMORY_MB, files_mb=128, hidden=keys()
    )


def work(folder: Path) -> None:
    """Run the gauntlet in this process: for kernels that can be trusted not to end it."""
    from esper.urabrask.gauntlet import run  # The workers, which import this module too, do without torch.

    run(folder)


def collect(folder: Path, outcome: SandboxOutcome) -> bytes:
    """Return the `Findings` as JSON; a kernel that ended its process, or broke a limit, has failed where it was then.

    Raises:
        JobError: what was written cannot be read.
        WrongFingerprint: the kernel was compiled for another machine, and not loaded here.
        KernelError: the child was ended by somebody else, or could not work; another try may do better.
    """
    if outcome.ok:
        return _written(folder)
    if outcome.ending is Ending.EXITED and (why := _unfit(folder)):
        raise WrongFingerprint(why)
    if not _own_fault(outcome):
        raise KernelError(f"the gauntlet ended without findings: {outcome.detail}: {outcome.stderr_tail[-500:]}")
    manifest = parse(KernelManifest, (folder / ARTIFACT / "manifest.json").read_bytes())
    place = last_place(folder)
    failure = Failure(check=place.check, detail=f"the process ended: {outcome.detail}", recipe=place.recipe)
    found = Findings(kernel_id=manifest.kernel_id, pipeline=manifest.pipeline, failures=(failure,), hardware=hardware())
    return found.model_dump_json().encode()


def _own_fault(outcome: SandboxOutcome) -> bool:
    """Whether the kernel ended the child, and neither the machine nor its owner did."""
    if outcome.ending is Ending.WALL_LIMIT:
        return outcome.cpu_seconds >= _STARVED * outcome.wall_seconds
    if outcome.ending is Ending.SIGNALLED:
        return -(outcome.exit_code or 0) not in _NOT_ITS_FAULT
    return outcome.ending in _BROKEN


def _unfit(folder: Path) -> str:
    """Return why this machine is not the one for the kernel; empty where it is."""
    try:
        return _read(folder / UNFIT).decode(errors="replace")
    except OSError:
        return ""


def _read(path: Path) -> bytes:
    """Return the beginning of a plain file; a link is not followed."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read(_LONGEST)


def _written(folder: Path) -> bytes:
    try:
        data = _read(folder / FINDINGS)
        Findings.model_validate_json(data)
    except (OSError, ValidationError) as error:
        raise JobError(f"{FINDINGS} cannot be read: {error}") from error
    return data
