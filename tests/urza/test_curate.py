"""Curation archives, clears away, checks, and repairs nothing."""

import os
import shutil
import time
from pathlib import Path

import pytest

from esper.leyline.errors import BadHash, IllegalTransition, StoreError
from esper.leyline.kernels import ArtifactStatus, KernelQuery
from esper.urza import Urza
from tests.urza.samples import compiled, opened, validated, verdict

S = ArtifactStatus


def test_the_unused_is_archived_and_can_be_brought_back(urza: Urza) -> None:
    for kernel_id in ("used", "unused", "cheap"):
        validated(urza, kernel_id, cpu_seconds=1.0 if kernel_id == "cheap" else 15.0)
    urza.used("used")
    size = urza.core.tree.size(urza.kernel("used").kernel_ref)
    before = urza.verified("unused")

    assert urza.curation(budget=2 * size + 20).archive == ("cheap",)
    done = urza.curate(budget=size)
    assert done.archived == ("cheap", "unused")
    assert done.findings == ()
    assert done.freed >= 2 * size - 10
    assert not before.folder.exists()
    assert urza.kernel("unused").status is S.ARCHIVED
    assert urza.find(KernelQuery()).matching_kernels == ("used",)
    with pytest.raises(StoreError, match="ARCHIVED"):
        urza.verified("unused")

    assert urza.restore("unused").status is S.PENDING_BENCHMARKING
    urza.judge(verdict("unused", report_timestamp=2.0))
    after = urza.verified("unused")
    assert (after.manifest, after.folder) == (before.manifest, before.folder)
    assert after.attestation.serial > before.attestation.serial
    with pytest.raises(IllegalTransition):
        urza.restore("used")
    assert urza.check() == []


def test_within_the_budget_nothing_moves(urza: Urza) -> None:
    validated(urza)
    assert urza.curation() == ((), (), urza.core.tree.size(urza.kernel("k1").kernel_ref))
    assert urza.curate() == ((), (), 0, 0, ())


def test_superseded_folders_go_to_the_archive_when_they_are_old(urza: Urza) -> None:
    validated(urza)
    old = urza.folder("k1")
    urza.set_kernel("k1", S.COMPILING)
    urza.put(compiled(files={"fw.so": b"new"}))
    assert urza.curate().cleared == ()
    os.utime(old, (time.time() - 4000,) * 2)
    assert urza.curate().cleared == (old.name,)
    assert not old.exists()
    assert (urza.root / "archive" / f"{old.name}.tar").exists()


def test_nothing_is_cleared_while_a_record_is_damaged(urza: Urza) -> None:
    validated(urza)
    folder = urza.folder("k1")
    os.utime(folder, (time.time() - 4000,) * 2)
    urza.core.records._cache.set("kernel/k1", b"damaged")
    done = urza.curate()
    assert done.cleared == ()
    assert "k1: Record kernel/k1 is damaged" in "; ".join(map(str, done.findings))
    assert folder.exists()


@pytest.mark.parametrize("record", ["manifest", "use"])
def test_a_kernel_with_a_damaged_record_stays_and_the_others_are_curated(urza: Urza, record: str) -> None:
    for kernel_id in ("hurt", "whole"):
        validated(urza, kernel_id)
        urza.used(kernel_id)
    urza.core.records._cache.set(f"{record}/hurt", b"damaged")
    done = urza.curate(budget=0)
    assert done.archived == ("whole",)
    assert urza.kernel("hurt").status is S.VALIDATED
    assert f"Record {record}/hurt is damaged" in "; ".join(map(str, done.findings))


def test_unfinished_folders_of_dead_writers_are_swept(urza: Urza) -> None:
    host = os.uname().nodename
    dead = urza.root / "artifacts" / f".part-{host}-999999999-x"
    alive = urza.root / "artifacts" / f".part-{host}-{os.getpid()}-x"
    dead.mkdir()
    alive.mkdir()
    assert urza.curate().swept == 1
    assert not dead.exists()
    assert alive.exists()


def test_a_damaged_artifact_is_a_finding_and_stays(urza: Urza) -> None:
    validated(urza)
    path = urza.folder("k1") / "fw.so"
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    done = urza.curate(budget=0)
    assert done.archived == ()
    assert "not archived" in str(done.findings[0])
    assert path.read_bytes() == b"damaged"
    assert urza.kernel("k1").status is S.VALIDATED


def test_a_good_archive_is_not_written_over_by_what_was_left_lying_about(urza: Urza) -> None:
    """A writer was killed between the archive and the removal; then somebody changed the leftover."""
    validated(urza)
    folder = urza.folder("k1")
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    urza.curate(budget=0)
    kept.rename(folder)
    (folder / "fw.so").chmod(0o600)
    (folder / "fw.so").write_bytes(b"evil")
    os.utime(folder, (0, 0))
    assert urza.curate().cleared == (folder.name,)
    urza.restore("k1")
    urza.judge(verdict(report_timestamp=2.0))
    assert (urza.verified("k1").folder / "fw.so").read_bytes() != b"evil"


def test_an_archive_with_another_file_is_not_restored(urza: Urza, tmp_path: Path) -> None:
    validated(urza)
    ref = urza.kernel("k1").kernel_ref
    urza.curate(budget=0)
    files = urza._archive.read(ref) | {"fw.so": b"evil"}
    with opened(tmp_path / "other") as other:
        other.core.tree.write(ref, files)
        other._archive.pack(ref)
        shutil.copy(other._archive.path(ref), urza._archive.path(ref))
    with pytest.raises(BadHash):
        urza.restore("k1")
    assert urza.kernel("k1").status is S.ARCHIVED
    assert urza.alerts()
