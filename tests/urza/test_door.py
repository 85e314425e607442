"""The loader's door: every way in which an artifact is not what it claims has its own refusal, and an alert."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.artifacts import Attestation, Role
from esper.leyline.errors import (
    BadHash,
    BadSignature,
    IllegalTransition,
    StaleManifest,
    TrustError,
    UnsafePath,
    WrongFingerprint,
    WrongRole,
)
from esper.leyline.events import SecurityAlert, Violation
from esper.leyline.kernels import ArtifactStatus
from esper.urza import KeyRing, Urza
from esper.urza.canonical import canonical, parse
from tests.urza.samples import compiled, opened, validated, verdict

S = ArtifactStatus
VERDICT = "k1/urabrask"


def statement(urza: Urza, **fields: object) -> Attestation:
    """What Urabrask said of k1, with some fields changed."""
    return urza.core.records.attestations.need(VERDICT).model_copy(update=fields)


def plant(urza: Urza, said: Attestation) -> None:
    urza.core.records.attestations.set(VERDICT, said)


def signature(urza: Urza) -> Attestation:
    return parse(Attestation, (urza.folder("k1") / "manifest.sig").read_bytes())


def write(path: Path, data: bytes) -> None:
    if path.exists():
        path.chmod(0o600)
    path.write_bytes(data)


def link(path: Path) -> None:
    aside = path.parent.parent / "aside"
    path.rename(aside)
    path.symlink_to(aside)


def forge(urza: Urza) -> None:
    """Another key ring signs a verdict."""
    forger = KeyRing(urza.root.parent / "forger")
    plant(urza, forger.attest(statement(urza, signature=b"")))


def another_role(urza: Urza) -> None:
    """Tezzeret signs what only Urabrask may say: its key is real, its role is not."""
    said = statement(urza, role=Role.TEZZERET, signature=b"")
    ring = urza.core.keys
    plant(urza, said.model_copy(update={"signature": ring.sign(Role.TEZZERET, canonical(said))}))


def tezzerets_status(urza: Urza) -> None:
    plant(urza, urza.core.records.attestations.need("k1/tezzeret"))


def another_role_under_urabrasks_name(urza: Urza) -> None:
    said = statement(urza, signature=b"")
    plant(urza, said.model_copy(update={"signature": urza.core.keys.sign(Role.TEZZERET, canonical(said))}))


def karn_signs_the_manifest(urza: Urza) -> None:
    said = signature(urza).model_copy(update={"role": Role.KARN, "signature": b""})
    signed = said.model_copy(update={"signature": urza.core.keys.sign(Role.KARN, canonical(said))})
    write(urza.folder("k1") / "manifest.sig", canonical(signed))


def missing_verdict(urza: Urza) -> None:
    urza.core.records._cache.delete(f"attestation/{VERDICT}")


def another_kernels_folder(urza: Urza) -> None:
    validated(urza, "k2")
    kernel, other = urza.kernel("k1"), urza.kernel("k2")
    urza.core.records.kernels.set("k1", kernel.model_copy(update={"kernel_ref": other.kernel_ref}))


def artifact(change: Callable[[Path], object]) -> Callable[[Urza], None]:
    return lambda urza: change(urza.folder("k1")) and None


ATTACKS: dict[str, tuple[Callable[[Urza], object], type[TrustError], Violation]] = {
    "verdict by a stranger": (forge, BadSignature, Violation.SIGNATURE),
    "verdict by the wrong role": (another_role, WrongRole, Violation.PERMISSION),
    "tezzeret's statement for a verdict": (tezzerets_status, WrongRole, Violation.PERMISSION),
    "verdict with another role's key": (another_role_under_urabrasks_name, BadSignature, Violation.SIGNATURE),
    "no verdict": (missing_verdict, BadSignature, Violation.SIGNATURE),
    "manifest by the wrong role": (karn_signs_the_manifest, WrongRole, Violation.PERMISSION),
    "another kernel's folder": (another_kernels_folder, TrustError, Violation.HASH),
    "no signature": (lambda u: (u.folder("k1") / "manifest.sig").unlink(), BadHash, Violation.HASH),
    "empty signature": (lambda u: write(u.folder("k1") / "manifest.sig", b""), BadSignature, Violation.SIGNATURE),
    "file cut": (lambda u: write(u.folder("k1") / "fw.so", b"forward"), BadHash, Violation.HASH),
    "file missing": (lambda u: (u.folder("k1") / "fw.so").unlink(), BadHash, Violation.HASH),
    "file added": (lambda u: write(u.folder("k1") / "more.so", b""), BadHash, Violation.HASH),
    "file a link": (lambda u: link(u.folder("k1") / "fw.so"), UnsafePath, Violation.PERMISSION),
    "manifest a link": (lambda u: link(u.folder("k1") / "manifest.json"), UnsafePath, Violation.PERMISSION),
    "file a pipe": (lambda u: os.mkfifo(u.folder("k1") / "x.so"), UnsafePath, Violation.PERMISSION),
    "folder in the folder": (lambda u: (u.folder("k1") / "d").mkdir(), UnsafePath, Violation.PERMISSION),
    "folder a link": (lambda u: link(u.folder("k1")), UnsafePath, Violation.PERMISSION),
    "folder of folders a link": (lambda u: link(u.folder("k1").parent), UnsafePath, Violation.PERMISSION),
    "others may write": (lambda u: u.folder("k1").chmod(0o777), UnsafePath, Violation.PERMISSION),
    "folder missing": (lambda u: shutil.rmtree(u.folder("k1")), BadHash, Violation.HASH),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_has_its_refusal_and_its_alert(tmp_path: Path, attack: str) -> None:
    heard: list[SecurityAlert] = []
    do, kind, violation = ATTACKS[attack]
    with opened(tmp_path, on_alert=heard.append) as urza:
        validated(urza)
        do(urza)
        with pytest.raises(kind):
            urza.verified("k1")
        assert [(alert.source, alert.subject, alert.violation) for alert in heard] == [("urza", "k1", violation)]
        assert urza.alerts() == heard
        assert [entry.action for entry in urza.ledger.entries()][-1] == "alert"
        assert "k1" in {finding.subject for finding in urza.check()}
    with opened(tmp_path) as again, pytest.raises(kind):
        again.verified("k1")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urza]:
    with opened(tmp_path_factory.mktemp("door")) as urza:
        validated(urza)
        yield urza


@given(data=st.data())
def test_a_byte_flipped_anywhere_is_refused(shared: Urza, data: st.DataObject) -> None:
    folder = shared.folder("k1")
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, 2**20)) % len(whole)
    flipped = whole[at] ^ data.draw(st.integers(1, 255))
    try:
        write(path, whole[:at] + bytes([flipped]) + whole[at + 1 :])
        with pytest.raises((BadHash, BadSignature, WrongRole)):
            shared.verified("k1")
    finally:
        write(path, whole)
    assert shared.verified("k1").manifest.kernel_id == "k1"


def test_another_fingerprint_is_refused(urza: Urza) -> None:
    validated(urza, fingerprint="a" * 64)
    assert urza.verified("k1", "a" * 64).manifest.fingerprint == "a" * 64
    with pytest.raises(WrongFingerprint):
        urza.verified("k1", "b" * 64)
    assert urza.alerts()[-1].violation is Violation.FINGERPRINT


def recompiled(urza: Urza) -> None:
    urza.set_kernel("k1", S.COMPILING)
    urza.put(compiled(files={"fw.so": b"new"}))
    urza.judge(verdict(report_timestamp=2.0))


@pytest.mark.parametrize("restarted", [False, True])
def test_an_older_verdict_is_refused_also_after_a_restart(tmp_path: Path, restarted: bool) -> None:
    urza = opened(tmp_path)
    validated(urza)
    good, before = statement(urza), urza.kernel("k1")
    urza.reject("k1", "it faulted")
    if restarted:
        urza.close()
        urza = opened(tmp_path)
    with pytest.raises(StaleManifest):
        urza.attest(good)
    plant(urza, good)
    urza.core.records.kernels.set("k1", before)
    with pytest.raises(StaleManifest):
        urza.verified("k1")
    assert any("the ledger says REJECTED" in str(finding) for finding in urza.check())
    urza.close()


@pytest.mark.parametrize("restarted", [False, True])
def test_an_older_manifest_is_refused_also_after_a_restart(tmp_path: Path, restarted: bool) -> None:
    urza = opened(tmp_path)
    validated(urza)
    old, before, said = urza.folder("k1"), urza.kernel("k1"), statement(urza)
    recompiled(urza)
    new = urza.folder("k1")
    if restarted:
        urza.close()
        urza = opened(tmp_path)
    for name in ("manifest.json", "manifest.sig"):
        write(new / name, (old / name).read_bytes())
    with pytest.raises(StaleManifest, match="tezzeret"):
        urza.verified("k1")
    urza.core.records.kernels.set("k1", before)
    plant(urza, said)
    with pytest.raises(StaleManifest, match="urabrask"):
        urza.verified("k1")
    urza.close()


def test_serials_put_back_in_the_records_do_not_fool_a_running_process(urza: Urza) -> None:
    validated(urza)
    good, before = statement(urza), urza.kernel("k1")
    urza.reject("k1", "it faulted")
    plant(urza, good)
    urza.core.records.kernels.set("k1", before)
    urza.core.records.set_number("mark/k1/urabrask", good.serial)
    with pytest.raises(StaleManifest):
        urza.verified("k1")


def test_only_urabrask_validates(urza: Urza) -> None:
    urza.put(compiled())
    ref = urza.kernel("k1").kernel_ref
    for role in (Role.TEZZERET, Role.KARN):
        said = Attestation(kernel_artifact_id="k1", artifact_hash=ref, status=S.VALIDATED, role=role, serial=99)
        with pytest.raises(WrongRole):
            urza.core.keys.attest(said)
        with pytest.raises(WrongRole):
            urza.attest(said.model_copy(update={"signature": urza.core.keys.sign(role, canonical(said))}))
    unsigned = Attestation(
        kernel_artifact_id="k1", artifact_hash=ref, status=S.VALIDATED, role=Role.URABRASK, serial=99
    )
    with pytest.raises(BadSignature):
        urza.attest(unsigned)
    with pytest.raises(BadHash):
        urza.attest(urza.core.keys.attest(unsigned.model_copy(update={"artifact_hash": "0" * 64})))
    assert urza.kernel("k1").status is S.PENDING_BENCHMARKING
    with pytest.raises(WrongRole):
        urza.put(compiled("k2"), role=Role.KARN)
    assert urza.attest(urza.core.keys.attest(unsigned)).status is S.VALIDATED
    with pytest.raises((StaleManifest, IllegalTransition)):
        urza.attest(urza.core.keys.attest(unsigned))


def test_nobody_vouches_for_files_that_changed_before_the_verdict(urza: Urza) -> None:
    urza.put(compiled())
    write(urza.folder("k1") / "fw.so", b"other")
    with pytest.raises(BadHash):
        urza.judge(verdict())
    assert urza.kernel("k1").status is S.PENDING_BENCHMARKING
    assert urza.judge(verdict(passed=False), "damaged").status is S.REJECTED
