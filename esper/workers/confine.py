"""What the kernel is asked to deny a process: each function tries, and says why it could not.

Linux calls that Python has no name for go through the C library. Elsewhere they are refused in words, and the caller
reports what is missing. Only the standard library is used here (see `limits`).
"""

import ctypes
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from esper.workers.limits import Limits

_PR_SET_PDEATHSIG, _PR_SET_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 1, 36, 38, 24
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
_MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x4000, 0x40000, 2, 4, 8
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_IDLE = 3 << 13
_CAP_DAC_OVERRIDE = 1
_LAST_CAPABILITY = 63
_MIB = 2**20
_TRIES = 5


class Refused(Exception):
    """The system does not offer a protection; the message says why."""


def _call(name: str, *arguments: object) -> int:
    """Call the C library and raise `Refused` when it fails."""
    if sys.platform != "linux":
        raise Refused(f"{name} is not available on {sys.platform}")
    library = ctypes.CDLL(None, use_errno=True)
    result: int = getattr(library, name)(*arguments)
    if result < 0:
        raise Refused(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def die_with_parent(number: int, parent: int) -> None:
    """Have this process receive a signal when its parent dies, and end now if that has happened already."""
    _call("prctl", _PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() not in (parent, 0):
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own."""
    _call("prctl", _PR_SET_SUBREAPER, 1, 0, 0, 0)


def leave_namespaces(network: bool) -> None:
    """Enter a new process namespace (from the next child on), and unless allowed, a new network.

    Without the privilege it is done inside a new user namespace, where one's own user is the only one.
    """
    flags = _CLONE_NEWPID | (0 if network else _CLONE_NEWNET)
    try:
        _call("unshare", flags)
    except Refused:
        user, group = os.geteuid(), os.getegid()
        _call("unshare", flags | _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def arrange_mounts(hidden: Iterable[str]) -> None:
    """In a new mount namespace, put an empty folder in the place of each given, and show its processes in /proc."""
    # Without these two steps, what follows would change the folders of the whole machine.
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
    for folder in filter(os.path.isdir, hidden):
        _call("mount", b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV), b"size=4k")
    _call("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC), None)


def set_resource_limits(limits: Limits) -> None:
    """Bound what each single process may use; the keeper bounds their sum."""
    cpu = max(1, int(limits.cpu_s + 0.999))
    _bound(resource.RLIMIT_CORE, 0)
    # The soft bound is a signal that names its cause; the hard one cannot be ignored.
    _bound(resource.RLIMIT_CPU, cpu, cpu + 2)
    _bound(resource.RLIMIT_FSIZE, limits.files_mb * _MIB)
    if limits.memory_mb:
        _bound(resource.RLIMIT_AS, limits.memory_mb * _MIB)


def _bound(kind: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit; one that is lower already stays."""
    most = resource.getrlimit(kind)[1]
    bounds = (soft, soft if hard is None else hard)
    resource.setrlimit(kind, bounds if most == resource.RLIM_INFINITY else (min(soft, most), min(bounds[1], most)))


def be_nice(value: int) -> None:
    """Take at least this niceness, and let the session that the process leads have it too.

    Linux shares the processor among sessions before it looks at their processes (`sched(7)`, autogroups): a session of
    its own, as every worker has, would get as much as the training however nice its processes are.
    """
    os.nice(max(0, value - os.nice(0)))
    if os.getsid(0) != os.getpid():
        return  # Somebody's terminal: whatever else runs there keeps its share.
    for _ in range(_TRIES):
        try:
            Path("/proc/self/autogroup").write_text(str(value), encoding="ascii")
        except BlockingIOError:  # The kernel allows one such change in a tenth of a second.
            time.sleep(0.1)
        except OSError:
            return  # Not this kernel, or somebody else's group.
        else:
            return


def step_back(background: bool) -> None:
    """Let everything else on the machine go first."""
    be_nice(19)
    if not background:
        return
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if number := _IOPRIO_SET.get(platform.machine()):
        _call("syscall", number, 1, 0, _IOPRIO_IDLE)


def drop_privileges() -> None:
    """Give up, for good, every privilege but that of root to read files that are not its own."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() != 0:
        return
    for number in range(_LAST_CAPABILITY + 1):
        if number != _CAP_DAC_OVERRIDE:
            try:
                _call("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)
            except Refused:
                return  # numbers above the kernel's last capability


# --- Landlock: the files that may be written ------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITES_BY_VERSION = {1: 0x1FF2, 2: 0x3FF2, 3: 0x7FF2}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/dev/shm")


class _Ruleset(ctypes.Structure):
    _fields_ = [("handled_access_fs", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def write_only_in(folders: Iterable[str]) -> None:
    """Deny every change to a file outside the given folders and a few devices."""
    version = _call("syscall", _CREATE_RULESET, None, 0, 1)
    writes = _WRITES_BY_VERSION[min(version, 3)]
    rules = _Ruleset(writes)
    ruleset = _call("syscall", _CREATE_RULESET, ctypes.byref(rules), ctypes.sizeof(rules), 0)
    for folder in (*folders, *_DEVICES, *map(str, Path("/dev").glob("nvidia*"))):
        _allow(ruleset, folder, writes)
    _call("syscall", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, folder: str, access: int) -> None:
    try:
        handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        # A rule on a file may name only what can be done to a file.
        rule = _Beneath(access if os.path.isdir(folder) else access & 0x4002, handle)  # noqa: PTH112
        _call("syscall", _ADD_RULE, ruleset, 1, ctypes.byref(rule), 0)
    finally:
        os.close(handle)
