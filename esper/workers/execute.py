"""Doing one job: prepare it, run it in the sandbox, collect its result."""

import contextlib
import importlib
import os
import shutil
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from esper.leyline.errors import ConfigError, EsperError, JobError, WrongFingerprint
from esper.workers.contracts import Job, JobModule
from esper.workers.limits import Ending, Limits, SandboxOutcome
from esper.workers.sandbox import run_sandboxed

_TAIL = 2000


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one try.

    Args:
        result: the job's result; None when the try failed.
        reason: why it failed.
        final: whether trying again is useless.
        unfit: whether trying again is useless on this machine, and the job is for another one.
        cpu_seconds: CPU time that the try took, in seconds.
    """

    result: bytes | None = None
    reason: str = ""
    final: bool = False
    unfit: bool = False
    cpu_seconds: float = 0.0


def load_module(name: str) -> JobModule:
    """Import a module of jobs.

    Raises:
        ConfigError: it cannot be imported, or lacks `prepare` or `collect`.
    """
    try:
        module: Any = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"The job module {name!r} cannot be imported: {error}.") from error
    for function in ("prepare", "collect"):
        if not callable(getattr(module, function, None)):
            raise ConfigError(f"The job module {name!r} has no function {function!r}; it needs prepare and collect.")
    return cast(JobModule, module)


def execute(
    module: JobModule, job: Job, folder: Path, cancelled: threading.Event | None = None, *, here: bool = False
) -> Answer:
    """Do a job in a folder that exists only meanwhile; whatever happens, there is an answer.

    Args:
        module: the module of jobs.
        job: the job.
        folder: its private folder.
        cancelled: once set, the job is given up.
        here: call the module's `work` in this process, if it has one, instead of running its command.
    """
    outcome: SandboxOutcome | None = None
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        command = module.prepare(job.payload, folder)
        outcome = _work(module, folder) if here and hasattr(module, "work") else None
        outcome = outcome or _run(module, job, command, folder, cancelled)
        if outcome.ending is Ending.CANCELLED:
            return Answer(reason=outcome.detail, cpu_seconds=outcome.cpu_seconds)
        return Answer(result=module.collect(folder, outcome), cpu_seconds=outcome.cpu_seconds)
    except Exception as error:  # a job's own code may raise anything; every try has an answer
        cpu, unfit = outcome.cpu_seconds if outcome else 0.0, isinstance(error, WrongFingerprint)
        # What the command printed would only say it once more.
        reason = _reason(error, None if unfit else outcome)
        return Answer(reason=reason, final=isinstance(error, JobError), unfit=unfit, cpu_seconds=cpu)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    module: JobModule, job: Job, command: list[str], folder: Path, cancelled: threading.Event | None
) -> SandboxOutcome:
    limits = getattr(module, "limits", None)
    environment = getattr(module, "environment", None)
    return run_sandboxed(
        command,
        folder,
        limits(job.payload) if limits else Limits(),
        env=environment(job.payload) if environment else None,
        cancelled=cancelled,
    )


def _work(module: JobModule, folder: Path) -> SandboxOutcome:
    """Do in this process what the command would do."""
    started = os.times()
    tail, code = "", 0
    try:
        cast(Any, module).work(folder)
    except Exception:  # as a command that ends with a traceback
        tail, code = traceback.format_exc()[-_TAIL:], 1
    ended = os.times()
    return SandboxOutcome(
        exit_code=code,
        ending=Ending.EXITED,
        detail=f"it ended with status {code}",
        cpu_seconds=ended.user - started.user + ended.system - started.system,
        wall_seconds=ended.elapsed - started.elapsed,
        stderr_tail=tail,
    )


def _reason(error: Exception, outcome: SandboxOutcome | None) -> str:
    """Say what went wrong, with what the command printed last unless the error says it already."""
    text = str(error) if isinstance(error, EsperError) else f"{type(error).__name__}: {error}"
    if outcome is None or outcome.ok:
        return text[:_TAIL]
    with contextlib.suppress(IndexError):
        last = outcome.stderr_tail.strip().splitlines()[-1]
        return f"{text[:_TAIL]} [{outcome.detail}; {last[:_TAIL]}]"
    return f"{text[:_TAIL]} [{outcome.detail}]"
