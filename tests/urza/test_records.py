"""Records come back as they were, and several writers lose nothing."""

import threading
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.codec import decode, encode
from esper.leyline.errors import ContractError, SchemaMismatch, StoreError
from esper.leyline.kernels import ArtifactStatus, Blueprint
from esper.urza.records import Records, Use, _checked, _summed
from tests.urza.test_disk import execute

blueprints = st.builds(
    Blueprint,
    id=st.text(max_size=20),
    name=st.text(max_size=20),
    status=st.sampled_from(ArtifactStatus),
    ir=st.text(max_size=100),
    parents=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    interest_scores=st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=3),
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return Records(tmp_path_factory.mktemp("records"))


@given(key=st.text(max_size=30), blueprint=blueprints)
def test_records_round_trip(records: Records, key: str, blueprint: Blueprint) -> None:
    records.blueprints.set(key, blueprint)
    assert records.blueprints.get(key) == blueprint
    assert key in records.blueprints.keys()  # noqa: SIM118


def test_compare_and_set_notices_another_writer(tmp_path: Path) -> None:
    one, two = Records(tmp_path), Records(tmp_path)
    one.uses.compare_and_set("k", None, Use(count=1))
    seen = two.uses.get("k")
    one.uses.compare_and_set("k", Use(count=1), Use(count=2))
    with pytest.raises(StoreError, match="another writer"):
        two.uses.compare_and_set("k", seen, Use(count=9))
    assert two.uses.need("k").count == 2


def test_threads_count_every_use(tmp_path: Path) -> None:
    records = Records(tmp_path)

    def count() -> None:
        for _ in range(20):
            with records.transaction():
                records.uses.set("k", Use(count=(records.uses.get("k") or Use()).count + 1))
        records.close()

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert records.uses.need("k").count == 60


def test_a_failed_change_leaves_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with pytest.raises(ZeroDivisionError), records.transaction():
        records.uses.set("k", Use(count=1))
        raise ZeroDivisionError
    assert records.uses.get("k") is None


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x92\xa3Use\x80"[:-1], 7, "text", None])
def test_damaged_records_are_store_errors(tmp_path: Path, value: object) -> None:
    records = Records(tmp_path)
    records.uses.set("k", Use(count=1))
    execute(tmp_path / "cache.db", "UPDATE Cache SET value = ? WHERE key = 'use/k'", value)
    if value is None:
        assert records.uses.get("k") is None
    else:
        with pytest.raises(StoreError, match="damaged") as raised:
            records.uses.get("k")
        assert records.uses.damage("k") == str(raised.value)


def test_what_is_sound_or_of_another_release_is_not_damaged_nor_is_a_lost_database(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.uses.set("k", Use(count=1))
    assert records.uses.damage("k") == records.uses.damage("none") == ""
    records._cache.set("use/k", _summed(msgpack.packb(("Use", {"schema_version": "2.0", "count": 1}))))
    with pytest.raises(SchemaMismatch, match="use/k is of another release"):
        records.uses.damage("k")
    execute(tmp_path / "cache.db", "UPDATE Cache SET mode = 5, value = '{' WHERE key = 'use/k'")
    assert "use/k is damaged: A record holds broken JSON" in records.uses.damage("k")
    records.close()
    (tmp_path / "cache.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(StoreError, match="cannot be read or written"):
        records.uses.damage("k")


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.blueprints.set("k", Blueprint(id="k", name="BP-A", ir="{}", interest_scores={"field": 0.5}))
    written = bytes(records._cache.get("blueprint/k"))
    for place in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ContractError):
            decode(Blueprint, _checked(bytes(flipped)))


def test_a_record_without_a_checksum_is_read(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records._cache.set("use/k", encode(Use(count=3)))
    assert records.uses.need("k").count == 3


def test_a_damaged_record_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = Records(tmp_path)
    for key in "abc":
        records.uses.set(key, Use(count=1))
    records._cache.set("use/b", b"damaged")
    assert [key for key, _ in records.uses.items()] == ["a", "c"]
    assert "use/b is damaged" in caplog.text


def test_a_database_of_garbage_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(StoreError, match="cannot be opened"):
        Records(tmp_path)


def test_records_of_another_release_are_refused(tmp_path: Path) -> None:
    Records(tmp_path).close()
    execute(tmp_path / "cache.db", """UPDATE Cache SET value = '{"format": 2}' WHERE key = 'meta'""")
    with pytest.raises(StoreError, match="this release reads"):
        Records(tmp_path)


def test_planted_settings_cannot_break_the_refusal(tmp_path: Path) -> None:
    Records(tmp_path).close()
    execute(tmp_path / "cache.db", "INSERT INTO Settings VALUES ('disk_evil', 1)")
    with pytest.raises(StoreError, match="cannot be opened"):
        Records(tmp_path)
