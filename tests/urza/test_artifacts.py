"""The tree: whole artifacts or none, within bounds, and never outside."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import BadHash, StoreError, UnsafePath
from esper.urza import artifacts
from esper.urza.artifacts import ArtifactTree, check_name, hash_file, read_file
from esper.urza.canonical import sha256

REF = sha256(b"{}")


@given(name=st.text(max_size=20))
def test_a_name_that_is_allowed_stays_in_its_folder(name: str) -> None:
    try:
        check_name(name)
    except UnsafePath:
        return
    assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}"
    assert Path("/folder", name).parent == Path("/folder")


@pytest.mark.parametrize("ref", ["", "..", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "/.."])
def test_a_reference_is_a_hash(tmp_path: Path, ref: str) -> None:
    with pytest.raises(UnsafePath):
        ArtifactTree(tmp_path).path(ref)


def test_an_artifact_is_written_once_and_read_back(tmp_path: Path) -> None:
    tree = ArtifactTree(tmp_path)
    content = os.urandom(300_000)
    path = tree.write(REF, {"manifest.json": b"{}", "fw.so": content})
    assert tree.write(REF, {"manifest.json": b"other"}) == path
    assert tree.refs() == [REF]
    assert tree.size(REF) == 300_002
    with tree.opened(REF) as folder:
        assert read_file(folder, "manifest.json") == b"{}"
        assert hash_file(folder, "fw.so") == sha256(content)
        with pytest.raises(BadHash, match="at most 1000"):
            read_file(folder, "fw.so", 1000)
        with pytest.raises(BadHash, match="missing"):
            read_file(folder, "bw.so")
        with pytest.raises(UnsafePath):
            read_file(folder, "../fw.so")
    assert [entry.name for entry in tmp_path.iterdir()] == [REF[:2]]
    tree.remove(REF)
    tree.remove(REF)
    assert tree.refs() == []


def test_several_may_write_measure_and_remove_the_same_artifact(tmp_path: Path) -> None:
    tree = ArtifactTree(tmp_path)
    files = {"manifest.json": b"{}", **{f"f{n}": bytes(10) for n in range(20)}}
    until = time.monotonic() + 1.0

    def writer() -> None:
        while time.monotonic() < until:
            assert tree.write(REF, files).name == REF
            tree.remove(REF)

    def reader() -> None:
        while time.monotonic() < until:
            assert 0 <= tree.size(REF) <= 202
            assert tree.age_s(REF) < 60
            assert tree.refs() in ([], [REF])

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(work) for work in (writer, writer, reader, reader)]:
            done.result(timeout=60)


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ArtifactTree(tmp_path)
    monkeypatch.setattr(artifacts, "MAX_ARTIFACT", 1000)
    monkeypatch.setattr(artifacts, "MAX_MANIFEST", 100)
    for files in ({"a": bytes(1001)}, {f"a{n}": b"" for n in range(33)}, {"manifest.json": bytes(101)}):
        with pytest.raises(StoreError, match="too large"):
            tree.write(REF, files)
    tree.write(REF, {"a": bytes(1000)})
