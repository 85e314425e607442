"""Running a command that may do anything, with the little that it is allowed."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from esper.leyline.errors import ConfigError
from esper.workers.limits import Ending, Limits, SandboxOutcome

_INHERITED: Final = ("PATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CC", "CXX")
_GRACE_S: Final = 10.0
_LOOK_S: Final = 0.2
_ROOT: Final = str(Path(__file__).parents[2])


def run_sandboxed(
    argv: Sequence[str],
    folder: str | Path,
    limits: Limits | None = None,
    *,
    env: Mapping[str, str] | None = None,
    cancelled: threading.Event | None = None,
) -> SandboxOutcome:
    r"""Run a command in its own session, namespaces and limits; when this returns, no process of it is left.

    It sees the environment variables that find programs and devices, HOME and TMPDIR in its folder, one thread for
    OpenMP, and those given. What the system refuses (namespaces in some containers, most of it on macOS) is named in
    the outcome's `missing`. The command also dies with the process that called this.

    Args:
        argv: the program and its arguments.
        folder: its working folder; made private to the user. With a recent kernel it can write nowhere else.
        limits: what it may use; by default `Limits()`.
        env: further environment variables.
        cancelled: once set, the command is killed.

    Raises:
        ConfigError: the command is empty or a limit is not positive.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     outcome = run_sandboxed(["sh", "-c", "echo bad >&2; exit 3"], folder)
        >>> outcome.exit_code, outcome.ending.value, outcome.stderr_tail
        (3, 'EXITED', 'bad\n')
    """
    limits = limits or Limits()
    _check(argv, limits)
    home = Path(folder).resolve()
    home.chmod(0o700)
    started = time.monotonic()
    keeper = subprocess.Popen(
        [sys.executable, "-S", "-P", "-m", "esper.workers.child", str(os.getpid()), str(home), _json(limits), *argv],
        cwd=home,
        env=_environment(home, env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return _await(keeper, limits, cancelled or threading.Event(), started)


def _check(argv: Sequence[str], limits: Limits) -> None:
    if not argv:
        raise ConfigError("No command was given to the sandbox; give a program and its arguments.")
    for name in ("cpu_s", "wall_s", "files_mb", "processes"):
        if getattr(limits, name) <= 0:
            raise ConfigError(f"Limit {name} is {getattr(limits, name)}; it must be above 0.")
    if limits.memory_mb < 0 or limits.resident_mb < 0:
        given = f"{limits.memory_mb} and {limits.resident_mb} MiB"
        raise ConfigError(f"The memory limits are {given}; they must be 0 (no bound) or above.")


def _json(limits: Limits) -> str:
    return json.dumps(asdict(limits))


def _environment(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Return all that the command sees of the environment."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {
        "PATH": os.defpath,
        **kept,
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        # A file in the folder must not pass for a module; the package itself need not be installed.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": _ROOT,
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def _await(
    keeper: subprocess.Popen[bytes], limits: Limits, cancelled: threading.Event, started: float
) -> SandboxOutcome:
    """Wait for the keeper's report; a keeper that fails to report is killed, and all below it with it."""
    latest = started + limits.wall_s + _GRACE_S
    try:
        while True:
            try:
                output, errors = keeper.communicate(timeout=_LOOK_S)
                break
            except subprocess.TimeoutExpired:
                if cancelled.is_set():
                    return _given_up(Ending.CANCELLED, "it was cancelled", started)
                if time.monotonic() > latest:
                    return _given_up(Ending.LOST, "its keeper did not answer", started)
    finally:
        _end(keeper)
    try:
        return SandboxOutcome.of(json.loads(output))
    except ValueError:
        tail = errors.decode(errors="replace")[-2000:]
        return _given_up(Ending.LOST, f"its keeper ended with status {keeper.returncode}: {tail}", started)


def _given_up(ending: Ending, detail: str, started: float) -> SandboxOutcome:
    lost = ending is Ending.LOST
    return SandboxOutcome(
        exit_code=None, ending=ending, detail=detail, timed_out=lost, wall_seconds=time.monotonic() - started
    )


def _end(keeper: subprocess.Popen[bytes]) -> None:
    """Have the keeper kill what it keeps, and end; whatever it is doing, it is gone afterwards."""
    if keeper.poll() is None:
        keeper.terminate()
        try:
            keeper.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
    for stream in (keeper.stdout, keeper.stderr):
        if stream:
            stream.close()
