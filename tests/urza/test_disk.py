"""Nothing that lies in the database is ever run, whoever wrote it."""

import os
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from diskcache import Cache
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import StoreError, TrustError, UnsafePath
from esper.urza.disk import MODE_JSON, PlainDisk
from esper.urza.records import Records
from tests.urza.samples import opened, validated

PICKLE = 4


class Payload:
    """What an attacker would plant: reading it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def execute(database: Path, statement: str, *values: Any) -> None:
    connection = sqlite3.connect(database)
    with connection:
        connection.execute(statement, values)
    connection.close()


plain = st.one_of(
    st.binary(max_size=64),
    st.text(max_size=64),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    ),
)


@given(value=plain)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    disk = PlainDisk("/nowhere")
    size, mode, filename, stored = disk.store(value, False)
    assert (size, filename) == (0, None)
    stored = bytes(stored) if isinstance(stored, memoryview) else stored
    assert disk.fetch(mode, filename, stored, False) == value


@pytest.mark.parametrize("value", [object(), {1, 2}, float, {"a": {3}}, 2 + 1j, [float("nan")]])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(StoreError, match="no plain data"):
        PlainDisk("/nowhere").store(value, False)


@pytest.mark.parametrize("key", [("a", 1), None, object(), 2**64])
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(StoreError, match="cannot be a key"):
        PlainDisk("/nowhere").put(key)


def test_the_payload_would_run(tmp_path: Path) -> None:
    """The attack is real: diskcache as it comes runs the planted row."""
    with Cache(tmp_path / "cache") as cache:
        cache.set("a", b"")
        row = pickle.dumps(Payload(tmp_path / "ran"))
        execute(tmp_path / "cache/cache.db", "UPDATE Cache SET mode = ?, value = ?", PICKLE, row)
        cache.get("a")
    assert (tmp_path / "ran").exists()


def test_a_planted_pickle_is_not_run(tmp_path: Path) -> None:
    with opened(tmp_path) as urza:
        validated(urza)
        row = pickle.dumps(Payload(tmp_path / "ran"))
        planted = "UPDATE Cache SET mode = ?, value = ? WHERE key = 'kernel/k1'"
        execute(tmp_path / "store/records/cache.db", planted, PICKLE, row)
        with pytest.raises(TrustError, match="reads no pickle"):
            urza.verified("k1")
        assert [alert.subject for alert in urza.alerts()] == ["k1"]
        assert any("not written by Urza" in str(finding) for finding in urza.check())
    with opened(tmp_path) as again, pytest.raises(TrustError):
        again.kernel("k1")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mode", [0, 2, 3, 6, 99])
def test_rows_of_other_modes_are_refused(tmp_path: Path, mode: int) -> None:
    with opened(tmp_path) as urza:
        validated(urza)
        execute(tmp_path / "store/records/cache.db", "UPDATE Cache SET mode = ? WHERE key = 'kernel/k1'", mode)
        with pytest.raises(TrustError):
            urza.verified("k1")


def test_a_planted_pickled_key_is_not_run(tmp_path: Path) -> None:
    with opened(tmp_path) as urza:
        validated(urza)
        row = pickle.dumps(Payload(tmp_path / "ran"))
        insert = "INSERT INTO Cache (key, raw, mode, value) VALUES (?, 0, 1, 'x')"
        execute(tmp_path / "store/records/cache.db", insert, row)
        with pytest.raises(TrustError, match="marked as a pickle"):
            urza.kernels()
        assert urza.verified("k1").manifest.kernel_id == "k1"
        assert any("not written by Urza" in str(finding) for finding in urza.check())
    assert not (tmp_path / "ran").exists()


def test_a_row_that_points_at_a_file_neither_reads_nor_removes_it(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    with opened(tmp_path) as urza:
        validated(urza)
        database = tmp_path / "store/records/cache.db"
        planted = "UPDATE Cache SET mode = 2, filename = '../../victim' WHERE key = 'use/k1' OR key = 'kernel/k1'"
        urza.used("k1")
        execute(database, planted)
        with pytest.raises(UnsafePath):
            urza.kernel("k1")
        with pytest.raises(UnsafePath):
            urza.core.records.uses.set("k1", urza.core.records.uses.kind(count=1))
    assert victim.read_bytes() == b"precious"


def test_broken_json_is_a_store_error(tmp_path: Path) -> None:
    Records(tmp_path).close()
    execute(tmp_path / "cache.db", "UPDATE Cache SET value = '{' WHERE key = 'meta' AND mode = ?", MODE_JSON)
    with pytest.raises(StoreError, match="broken JSON"):
        Records(tmp_path)
