"""Writers die at any moment, disks fill up, several write at once: the store holds the old or the new, never less."""

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.leyline.errors import StoreError
from esper.leyline.kernels import ArtifactStatus, KernelQuery
from esper.urza import Urza
from tests.urza.samples import blueprint, compiled, opened, verdict

ROOT = Path(__file__).parents[2]
SOAK = int(os.environ.get("ESPER_SOAK", "5"))
S = ArtifactStatus


def start(root: Path, *args: object) -> subprocess.Popen[str]:
    """Start a writer; it says when it has opened the store."""
    command = [sys.executable, "-m", "tests.urza.writer", str(root), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def killed(process: subprocess.Popen[str]) -> int:
    """Kill a process, and return how it ended."""
    process.send_signal(signal.SIGKILL)
    return ended(process)


def ended(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    code = process.wait(timeout=60)
    process.stdout.close()
    return code


def sound(urza: Urza) -> int:
    """Assert that the store is whole, and return how many kernels can be used."""
    findings = [finding for finding in urza.check() if finding.subject != "ledger"]
    assert findings == []
    valid = [kernel.id for kernel in urza.kernels() if kernel.status is S.VALIDATED]
    for kernel_id in valid:
        assert urza.verified(kernel_id).manifest.kernel_id == kernel_id
    assert sorted(urza.find(KernelQuery()).matching_kernels) == sorted(valid)
    assert urza.alerts() == []
    return len(valid)


def await_validated(folder: Path, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        with opened(folder) as urza:
            if any(kernel.status is ArtifactStatus.VALIDATED for kernel in urza.kernels()):
                return
        assert time.monotonic() < deadline, "nothing was validated"
        time.sleep(0.2)


@pytest.mark.slow
def test_writers_killed_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(0)
    for turn in range(SOAK):
        writers = [start(tmp_path, f"t{turn}w{number}") for number in range(2)]
        for writer in writers:
            await_ready(writer)
        time.sleep(chance.uniform(0.05, 0.6))
        assert killed(writers[0]) == -signal.SIGKILL
        time.sleep(chance.uniform(0.05, 0.2))
        assert writers[1].poll() is None, "the death of one writer stopped the other"
        assert killed(writers[1]) == -signal.SIGKILL
        with opened(tmp_path) as urza:
            sound(urza)
            urza.submit(blueprint(version=f"1.0.{turn}"))  # What the dead left in the ledger is moved aside here.
            assert urza.check() == []
    last = start(tmp_path, "last")
    await_ready(last)
    await_validated(tmp_path)
    assert killed(last) == -signal.SIGKILL
    with opened(tmp_path) as urza:
        assert sound(urza) > 0
        urza.curate()
        assert not list((tmp_path / "store/artifacts").glob(".part-*"))


@pytest.mark.slow
def test_a_death_between_any_two_durable_steps(tmp_path: Path) -> None:
    """Die before the first call of `os.fsync`, after it, before the second, and so on; a short run tries a third."""
    chance = random.Random(0)
    for moment in itertools.count(2):
        if SOAK < 50 and chance.random() > 1 / 3:
            continue
        root = tmp_path / str(moment)
        if ended(start(root, "k1", moment)) == 0:
            break
        with opened(root) as urza:
            sound(urza)
            urza.submit(blueprint())
            if not urza.has("k1") or urza.kernel("k1").status is S.PENDING_BENCHMARKING:
                urza.put(compiled("k1"))
                urza.judge(verdict("k1"))
            if urza.kernel("k1").status is S.ARCHIVED:
                urza.restore("k1")
                urza.judge(verdict("k1", report_timestamp=2.0))
            assert sound(urza) == 1
            assert urza.check() == []
    assert moment > 2 * 13, "the writer made too few durable steps to have been tested"


@pytest.mark.slow
def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.urza.samples import *\n"
        "with opened(Path(sys.argv[1])) as urza:\n"
        "    for number in range(10):\n"
        "        validated(urza, f'{sys.argv[2]}-{number}')\n"
        "        urza.put(compiled('shared')); urza.used('shared')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    writers = [subprocess.Popen([*command, f"w{number}"], cwd=ROOT) for number in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    with opened(tmp_path) as urza:
        assert sound(urza) == 30
        assert urza.check() == []
        assert urza.core.records.uses.need("shared").count == 30
        entries = list(urza.ledger.entries())
        assert len([entry for entry in entries if entry.subject == "shared"]) == 1
        assert len({urza.manifest(kernel.id).serial for kernel in urza.kernels()}) == 31
        assert len(urza.core.tree.refs()) == 31


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=10, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], timeout=10, check=True)


def fill(urza: Urza) -> list[str]:
    """Put kernels of 200 KB until the disk is full, or a file may not grow; return those that went in."""
    done: list[str] = []
    with pytest.raises(StoreError):
        for number in range(100):
            urza.put(compiled(f"k{number}", files={"fw.so": os.urandom(200_000)}))
            urza.judge(verdict(f"k{number}"))
            done.append(f"k{number}")
    return done


def test_a_full_disk_refuses_and_keeps_what_there_was(small_disk: Path) -> None:
    with opened(small_disk) as urza:
        done = fill(urza)
        assert len(done) > 3
        stuffed = small_disk / "stuffed"
        with pytest.raises(OSError, match="No space"), stuffed.open("wb") as file:
            while True:
                file.write(b"0" * 1024)
        for attempt in range(10):
            with pytest.raises(StoreError):
                urza.put(compiled(f"more{attempt}", files={"fw.so": os.urandom(200_000)}))
            with pytest.raises(StoreError):
                urza.interest(done[0], "test", 0.5 + attempt / 100)
        stuffed.unlink()
        assert set(done) <= {kernel.id for kernel in urza.kernels()}
        assert sound(urza) == len(done)
        urza.interest(done[0], "test", 0.9)
        assert urza.check() == []
    with opened(small_disk) as again:
        assert sound(again) == len(done)


LIMITED = """
import resource, sys
from pathlib import Path
from esper.leyline.errors import StoreError
from tests.urza.samples import *
with opened(Path(sys.argv[1])) as urza:
    validated(urza, "before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    refused = 0
    for number in range(30):
        try:
            validated(urza, f"k{number}", files={"fw.so": bytes(1000)})
        except StoreError:
            refused += 1
    print(refused)
"""


@pytest.mark.parametrize("limit", [2_000, 8_000, 300_000])
def test_files_that_may_not_grow(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stops the artifact, the ledger or the database: each time nothing is lost."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    refused = int(run.stdout)
    assert refused > 0
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    with opened(tmp_path) as urza:
        assert sound(urza) >= 1
        urza.interest("before", "test", 0.5)
        assert urza.check() == []
