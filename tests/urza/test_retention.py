"""What stays at hand: the budget is kept, the worthless goes first, and nothing is lost."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import BadHash, StoreError
from esper.leyline.kernels import ArtifactStatus
from esper.urza import Urza
from esper.urza.retention import Archive, Holding, score, to_archive
from tests.urza.samples import validated

S = ArtifactStatus
WAITING = {S.COMPILING, S.PENDING_BENCHMARKING}
holdings = st.lists(
    st.builds(
        Holding,
        kernel_id=st.integers(0, 10**6).map(str),
        status=st.sampled_from([S.VALIDATED, S.REJECTED, S.INVALID, *WAITING]),
        size=st.integers(0, 1000),
        uses=st.integers(0, 100),
        idle_s=st.floats(0, 1e8),
        cpu_seconds=st.floats(0, 100),
    ),
    max_size=12,
    unique_by=lambda holding: holding.kernel_id,
)


@given(held=holdings, budget=st.integers(0, 6000))
def test_the_budget_is_kept_by_the_least_worth(held: list[Holding], budget: int) -> None:
    gone = set(to_archive(held, budget))
    kept = [holding for holding in held if holding.kernel_id not in gone]
    movable = [holding for holding in kept if holding.status not in WAITING]
    assert sum(holding.size for holding in kept) <= budget or not movable
    assert not gone & {holding.kernel_id for holding in held if holding.status in WAITING}
    lost = [holding for holding in held if holding.kernel_id in gone]
    if lost and movable:
        assert max(map(score, lost)) <= min(map(score, movable))
    if lost:
        last = max(lost, key=score)
        assert sum(holding.size for holding in kept) + max(holding.size for holding in lost) > budget or not last.size


@given(uses=st.integers(0, 9), idle_s=st.floats(0, 1e7), cpu_seconds=st.floats(0, 100))
def test_use_cost_and_youth_are_worth_more(uses: int, idle_s: float, cpu_seconds: float) -> None:
    held = Holding("k", S.VALIDATED, 1, uses, idle_s, cpu_seconds)
    assert score(held._replace(uses=held.uses + 1)) > score(held)
    assert score(held._replace(cpu_seconds=cpu_seconds + 1.0)) > score(held)
    assert score(held._replace(idle_s=held.idle_s + 86_400)) < score(held)
    assert score(held._replace(status=S.REJECTED)) == 0.0


def test_what_is_packed_comes_back_the_same(urza: Urza, tmp_path: Path) -> None:
    validated(urza)
    ref, folder = urza.kernel("k1").kernel_ref, urza.folder("k1")
    archive = Archive(tmp_path / "archive", urza.core.tree)
    archive.pack(ref)
    assert archive.read(ref) == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("member", ["../evil", "/tmp/evil", "a/b"])
def test_an_archive_cannot_write_elsewhere(urza: Urza, tmp_path: Path, member: str) -> None:
    validated(urza)
    ref = urza.kernel("k1").kernel_ref
    archive = Archive(tmp_path / "archive", urza.core.tree)
    with tarfile.open(archive.pack(ref), "a") as tar:
        info = tarfile.TarInfo(member)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(Exception, match="no name of a file"):
        archive.unpack(ref)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_an_archive_holds_plain_files_only(urza: Urza, tmp_path: Path, kind: bytes) -> None:
    validated(urza)
    ref = urza.kernel("k1").kernel_ref
    archive = Archive(tmp_path / "archive", urza.core.tree)
    with tarfile.open(archive.pack(ref), "a") as tar:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(StoreError, match="no plain file"):
        archive.read(ref)


def test_a_damaged_or_exchanged_archive_is_refused(urza: Urza, tmp_path: Path) -> None:
    validated(urza, "k1")
    validated(urza, "k2")
    archive = Archive(tmp_path / "archive", urza.core.tree)
    one, two = urza.kernel("k1").kernel_ref, urza.kernel("k2").kernel_ref
    archive.path(one).parent.mkdir()
    archive.path(one).write_bytes(archive.pack(two).read_bytes())
    with pytest.raises(BadHash, match="another artifact"):
        archive.read(one)
    archive.path(two).write_bytes(b"garbage")
    with pytest.raises(StoreError, match="cannot be read"):
        archive.read(two)
