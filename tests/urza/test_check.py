"""The check for `esper doctor` names every damage and changes nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.leyline.kernels import ArtifactStatus
from esper.urza import Urza
from tests.urza.samples import blueprint, compiled, opened, validated, verdict
from tests.urza.test_disk import execute

S = ArtifactStatus


def as_validated(urza: Urza) -> None:
    kernel = urza.kernel("rejected")
    urza.core.records.kernels.set("rejected", kernel.model_copy(update={"status": S.VALIDATED}))


def another_ir(urza: Urza) -> None:
    known = urza.blueprint(blueprint().id)
    urza.core.records.blueprints.set(known.id, known.model_copy(update={"ir": "{}"}))


def no_archive(urza: Urza) -> None:
    (urza.root / "archive" / f"{urza.kernel('archived').kernel_ref}.tar").unlink()


def damaged_record(urza: Urza) -> None:
    execute(urza.root / "records/cache.db", "UPDATE Cache SET value = x'00' WHERE key = 'kernel/good'")


def damaged_in(table: str) -> Callable[[Urza], object]:
    statement = f"UPDATE Cache SET value = x'00' WHERE key LIKE '{table}/good%'"
    return lambda urza: execute(urza.root / "records/cache.db", statement)


def edited_ledger(urza: Urza) -> None:
    path = urza.ledger.path
    path.write_bytes(path.read_bytes().replace(b"REJECTED", b"VALIDATE"))


DAMAGE: dict[str, tuple[Callable[[Urza], object], str]] = {
    "status": (as_validated, "rejected: the records say VALIDATED, the ledger says REJECTED"),
    "verdict": (as_validated, "rejected: WrongRole: Urabrask says that rejected is REJECTED"),
    "blueprint": (another_ir, "BadHash"),
    "archive": (no_archive, "archived: StoreError: Archive"),
    "record": (damaged_record, "good: Record kernel/good is damaged"),
    "manifest": (damaged_in("manifest"), "good: Record manifest/good is damaged"),
    "attestation": (damaged_in("attestation"), "good/tezzeret: Record attestation/good/tezzeret is damaged"),
    "ledger": (edited_ledger, "has been changed: its hash does not fit"),
    "file": (lambda urza: (urza.folder("good") / "ir.json").unlink(), "good: BadHash"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_named(tmp_path: Path, damage: str) -> None:
    do, expected = DAMAGE[damage]
    with opened(tmp_path) as urza:
        urza.submit(blueprint())
        validated(urza, "archived", cpu_seconds=0.0)
        urza.curate(budget=0)
        validated(urza, "good")
        urza.put(compiled("rejected"))
        urza.judge(verdict("rejected", passed=False), "too slow")
        assert urza.check() == []
        do(urza)
        before = contents(tmp_path)
        assert any(expected in str(finding) for finding in urza.check()), urza.check()
        assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but SQLite's own bookkeeping."""
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {str(path): path.read_bytes() for path in files if not path.name.endswith("-shm")}
