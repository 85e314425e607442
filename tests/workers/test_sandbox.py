import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from esper.leyline.errors import ConfigError
from esper.workers.limits import Ending, Limits, SandboxOutcome
from esper.workers.sandbox import run_sandboxed

ACTS = str(Path(__file__).with_name("acts.py"))
ROOT = str(Path(__file__).parents[2])
GENEROUS = {"wall_s": 60.0, "cpu_s": 20.0, "memory_mb": 512, "files_mb": 16, "background": False}
FALLBACK = """
import json, sys
from esper.workers import child, confine
def refuse(network):
    raise confine.Refused("namespaces are refused here")
confine.leave_namespaces = refuse
child.main()
"""


def act(folder: Path, mark: str, do: str, limits: dict[str, object] | None = None, **fields: object) -> SandboxOutcome:
    (folder / "order.json").write_text(json.dumps({"do": do, **fields}))
    allowed = Limits(**{**GENEROUS, **(limits or {})})
    return run_sandboxed([sys.executable, "-S", ACTS, str(folder)], folder, allowed, env={"ESPER_TEST_MARK": mark})


def act_without_namespaces(
    folder: Path, mark: str, do: str, limits: dict[str, object], **fields: object
) -> SandboxOutcome:
    """As a system does that refuses namespaces: the keeper itself must find and kill every descendant."""
    (folder / "order.json").write_text(json.dumps({"do": do, **fields}))
    allowed = json.dumps(asdict(Limits(**{**GENEROUS, **limits})))
    keeper = [sys.executable, "-S", "-P", "-c", FALLBACK, str(os.getpid()), str(folder), allowed]
    command = [*keeper, sys.executable, "-S", ACTS, str(folder)]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=90, check=True)
    return SandboxOutcome.of(json.loads(done.stdout))


def test_a_command_runs_to_its_end(tmp_path: Path, mark: str) -> None:
    outcome = act(tmp_path, mark, "spin", seconds=0.3)
    assert outcome.ok, outcome
    assert (tmp_path / "result").read_bytes() == b"spun"
    assert 0.3 <= outcome.cpu_seconds < 3.0
    assert outcome.wall_seconds >= 0.3
    assert 5.0 < outcome.peak_memory_mb < 100.0
    assert tmp_path.stat().st_mode & 0o777 == 0o700


GROUPS = Path("/proc/sys/kernel/sched_autogroup_enabled")
grouped = pytest.mark.skipif(
    not GROUPS.exists() or GROUPS.read_text().strip() != "1" or not Path("/proc/self/autogroup").exists(),
    reason="this kernel does not share the processor by sessions",
)


def test_nothing_is_started_for_a_keeper_that_has_died(tmp_path: Path) -> None:
    code = """
import os, sys
from esper.workers import child
from esper.workers.limits import Limits
read, write = os.pipe()
if sys.argv[1] == "dead":
    os.close(read)
child._first(["touch", sys.argv[2]], os.path.dirname(sys.argv[2]), Limits(background=False), os.getppid(), write)
"""
    for keeper in ("dead", "alive"):
        command = [sys.executable, "-c", code, keeper, str(tmp_path / keeper)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ROOT}, timeout=60, check=False)
        assert done.returncode == (1 if keeper == "dead" else 0)
    assert [file.name for file in tmp_path.iterdir()] == ["alive"]


@grouped
def test_the_session_of_a_job_goes_last_not_its_processes_alone(tmp_path: Path) -> None:
    outcome = run_sandboxed(["cat", "/proc/self/autogroup"], tmp_path, Limits(background=False))
    assert outcome.ok and "nice 19" in outcome.stderr_tail


@grouped
def test_only_a_session_of_ones_own_is_made_to_go_last() -> None:
    def told(*, leads: bool) -> str:
        code = "from esper.workers.confine import be_nice as f; f(10); print(open('/proc/self/autogroup').read())"
        given = {"cwd": ROOT, "text": True, "timeout": 60}
        if leads:
            return subprocess.check_output([sys.executable, "-c", code], start_new_session=True, **given)  # type: ignore[call-overload, no-any-return]
        # In a session that somebody else leads, as in a terminal.
        shell = ["sh", "-c", f'{sys.executable} -c "{code}"; true']
        return subprocess.check_output(shell, start_new_session=True, **given)  # type: ignore[call-overload, no-any-return]

    assert "nice 10" in told(leads=True) and "nice 0" in told(leads=False)


@pytest.mark.parametrize(
    ("do", "fields", "limits", "ending", "said"),
    [
        ("exit_with", {"status": 3, "say": "bad weather"}, {}, Ending.EXITED, "bad weather"),
        ("allocate", {"mb": 900}, {"memory_mb": 300}, Ending.EXITED, "MemoryError"),
        ("spin", {}, {"cpu_s": 1.0}, Ending.CPU_LIMIT, ""),
        ("sleep", {"seconds": 1000}, {"wall_s": 1.0}, Ending.WALL_LIMIT, ""),
        ("fork_bomb", {}, {"processes": 20, "memory_mb": 8192}, Ending.PROCESS_LIMIT, ""),
        ("segfault", {}, {}, Ending.SIGNALLED, ""),
        ("huge_file", {"mb": 64}, {}, Ending.EXITED, "File too large"),
        ("many_files", {"count": 200}, {}, Ending.FILES_LIMIT, ""),
        ("escape", {"wait": True}, {"wall_s": 1.0}, Ending.WALL_LIMIT, ""),
        ("kill_keeper", {}, {"wall_s": 1.0}, Ending.WALL_LIMIT, ""),
    ],
)
def test_every_misdeed_is_contained_and_named(
    tmp_path: Path, mark: str, do: str, fields: dict[str, object], limits: dict[str, object], ending: Ending, said: str
) -> None:
    outcome = act(tmp_path, mark, do, limits, **fields)
    assert not outcome.ok
    assert outcome.ending is ending, outcome
    assert said in outcome.stderr_tail
    assert outcome.timed_out == (ending in (Ending.CPU_LIMIT, Ending.WALL_LIMIT))
    assert outcome.detail
    assert outcome.wall_seconds < 45.0
    if ending is Ending.EXITED and do == "exit_with":
        assert outcome.exit_code == 3
    if ending is Ending.SIGNALLED:
        assert outcome.exit_code == -11


def test_memory_is_bounded_without_a_bound_on_address_space(tmp_path: Path, mark: str) -> None:
    limits = {"memory_mb": 0, "resident_mb": 100}
    (tmp_path / "hog.py").write_text("import time\nheld = b'x' * (300 * 2**20)\ntime.sleep(1000)\n")
    allowed = Limits(**{**GENEROUS, **limits})
    outcome = run_sandboxed([sys.executable, "hog.py"], tmp_path, allowed, env={"ESPER_TEST_MARK": mark})
    assert outcome.ending is Ending.MEMORY_LIMIT, outcome
    assert outcome.peak_memory_mb > 100.0


def test_descendants_left_behind_are_ended_with_the_command(tmp_path: Path, mark: str) -> None:
    assert act(tmp_path, mark, "escape").ok


@pytest.mark.parametrize(
    ("do", "fields", "limits", "ending"),
    [
        ("escape", {}, {}, Ending.EXITED),
        ("escape", {"wait": True}, {"wall_s": 1.0}, Ending.WALL_LIMIT),
        ("fork_bomb", {}, {"processes": 20, "memory_mb": 8192}, Ending.PROCESS_LIMIT),
        ("spin", {}, {"cpu_s": 1.0}, Ending.CPU_LIMIT),
        ("segfault", {}, {}, Ending.SIGNALLED),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in /proc")
def test_a_system_without_namespaces_contains_too_and_says_what_is_missing(
    tmp_path: Path, mark: str, do: str, fields: dict[str, object], limits: dict[str, object], ending: Ending
) -> None:
    outcome = act_without_namespaces(tmp_path, mark, do, limits, **fields)
    assert outcome.ending is ending, outcome
    assert any("namespaces are refused here" in line for line in outcome.missing)
    assert any(line.startswith("network") for line in outcome.missing)


def test_the_environment_is_empty_but_for_the_list(tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_FORGE", "1")
    assert act(tmp_path, mark, "environ").ok
    seen = json.loads((tmp_path / "result").read_bytes())
    assert "SECRET_OF_THE_FORGE" not in seen
    assert seen["HOME"] == seen["TMPDIR"] == str(tmp_path)
    assert seen["OMP_NUM_THREADS"] == "1"


def protected(tmp_path: Path, mark: str, what: str) -> None:
    """Skip where the system refuses a protection, in its own words."""
    for line in act(tmp_path, mark, "echo").missing:
        if line.startswith(what):
            pytest.skip(line)


def test_there_is_no_network_unless_allowed(tmp_path: Path, mark: str) -> None:
    protected(tmp_path, mark, "namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not act(tmp_path, mark, "connect", port=port).ok
        assert act(tmp_path, mark, "connect", {"network": True}, port=port).ok


def test_nothing_is_written_outside_the_folder(tmp_path: Path, mark: str) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    protected(home, mark, "files")
    outcome = act(home, mark, "write_outside", path=str(other / "file"))
    assert "Permission" in outcome.stderr_tail
    assert not list(other.iterdir())
    assert act(home, mark, "write_outside", {"writable": (str(other),)}, path=str(other / "file")).ok
    assert (other / "file").read_text() == "outside"


def test_a_hidden_folder_is_empty_inside_and_untouched_outside(tmp_path: Path, mark: str) -> None:
    home, keys = tmp_path / "home", tmp_path / "keys"
    home.mkdir()
    keys.mkdir()
    (keys / "private").write_text("secret")
    protected(home, mark, "mounts")
    protected(home, mark, "namespaces")
    assert act(home, mark, "read", path=str(keys / "private")).ok
    outcome = act(home, mark, "read", {"hidden": (str(keys),)}, path=str(keys / "private"))
    assert "No such file" in outcome.stderr_tail
    assert (keys / "private").read_text() == "secret"


def test_a_cancelled_command_ends_at_once(tmp_path: Path, mark: str) -> None:
    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()
    started = time.monotonic()
    outcome = run_sandboxed(["sleep", "1000"], tmp_path, env={"ESPER_TEST_MARK": mark}, cancelled=cancelled)
    assert outcome.ending is Ending.CANCELLED
    assert time.monotonic() - started < 20.0


def keeper_of(parent: psutil.Process) -> psutil.Process:
    until = time.monotonic() + 20.0
    while time.monotonic() < until:
        for child in parent.children(recursive=True):
            if "sleep" in child.name():
                return next(p for p in parent.children(recursive=True) if "esper.workers.child" in p.cmdline())
        time.sleep(0.02)
    raise AssertionError("the command did not start")


def test_a_killed_keeper_takes_its_command_along(tmp_path: Path, mark: str) -> None:
    outcomes: list[SandboxOutcome] = []
    environment = {"ESPER_TEST_MARK": mark}
    runner = threading.Thread(
        target=lambda: outcomes.append(run_sandboxed(["sleep", "1000"], tmp_path, env=environment))
    )
    runner.start()
    keeper_of(psutil.Process()).kill()
    runner.join(20.0)
    assert outcomes[0].ending is Ending.LOST
    assert "-9" in outcomes[0].detail


def test_the_command_dies_with_whoever_ran_it(tmp_path: Path, mark: str) -> None:
    code = f"from esper.workers.sandbox import run_sandboxed; run_sandboxed(['sleep', '1000'], {str(tmp_path)!r},"
    code += f" env={{'ESPER_TEST_MARK': {mark!r}}})"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}) as runner:
        keeper_of(psutil.Process(runner.pid))
        runner.kill()


@pytest.mark.parametrize("limits", [{"cpu_s": 0.0}, {"wall_s": -1.0}, {"processes": 0}, {"memory_mb": -1}])
def test_limits_out_of_range_are_refused(tmp_path: Path, limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        run_sandboxed(["true"], tmp_path, Limits(**limits))


def test_no_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command"):
        run_sandboxed([], tmp_path)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    outcome = run_sandboxed(["/no/such/program"], tmp_path)
    assert outcome.exit_code == 127
    assert "/no/such/program" in outcome.stderr_tail
