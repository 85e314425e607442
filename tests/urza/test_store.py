"""The store from end to end: what goes in comes out verified, and nothing else does."""

import json
import threading
from pathlib import Path

import pytest

from esper.leyline.artifacts import CompiledKernel, Role
from esper.leyline.errors import BadHash, ConfigError, IllegalTransition, StoreError, UnsafePath, WrongRole
from esper.leyline.events import SecurityAlert
from esper.leyline.kernels import ArtifactStatus, KernelQuery
from esper.leyline.reports import FieldReport, SiteInfo
from esper.leyline.states import Reason, SeedState
from esper.urza import KeyRing, Urza
from tests.urza.samples import FILES, blueprint, compiled, opened, spec, validated, verdict
from tests.urza.test_disk import execute

S = ArtifactStatus


def test_a_kernel_goes_in_is_judged_found_and_verified(urza: Urza) -> None:
    urza.submit(blueprint(), "a test")
    assert urza.put(compiled()).status is S.PENDING_BENCHMARKING
    assert urza.find(KernelQuery()).matching_kernels == ()
    with pytest.raises(StoreError, match="PENDING_BENCHMARKING"):
        urza.verified("k1")

    kernel = urza.judge(verdict(generated_tags=("low_latency",)))
    assert kernel.status is S.VALIDATED
    found = urza.find(KernelQuery(required_tags=("low_latency",)))
    assert found.matching_kernels == ("k1",)
    assert found.ranked[0].why == "0.5 ms, risk 0.10, interest 0.00"
    assert urza.of_spec(spec()) == ["k1"]
    assert urza.of_spec(spec(tokens=33)) == []

    verified = urza.verified("k1")
    assert verified.folder == urza.folder("k1")
    assert verified.attestation.role is Role.URABRASK
    assert {name: (verified.folder / name).read_bytes() for name in FILES} == FILES
    assert json.loads((verified.folder / "ir.json").read_bytes())["name"] == "BP-A"
    assert verified.folder.stat().st_mode & 0o777 == 0o700

    assert urza.blueprint(blueprint().id).status is S.VALIDATED
    assert urza.blueprint(blueprint().id).kernels == ("k1",)
    assert [entry.after for entry in urza.ledger.entries() if entry.subject == "k1"] == [
        "PENDING_BENCHMARKING",
        "VALIDATED",
    ]
    assert urza.ledger.verify(urza.core.records.head()) == []
    assert urza.alerts() == []


def test_a_reader_needs_the_public_keys_only(urza: Urza, tmp_path: Path) -> None:
    validated(urza)
    public = tmp_path / "public"
    public.mkdir()
    for role in Role:
        (public / f"{role}.pub").write_bytes((tmp_path / "keys" / f"{role}.pub").read_bytes())
    with Urza(tmp_path / "store", KeyRing.public_only(public)) as reader:
        assert reader.verified("k1").manifest.kernel_id == "k1"
        assert reader.find(KernelQuery()).matching_kernels == ("k1",)
        with pytest.raises(WrongRole, match="No private key of tezzeret"):
            reader.put(compiled("k2"))


def test_keys_inside_the_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inside the store"):
        Urza(tmp_path, KeyRing(tmp_path / "keys"))


def test_put_and_judge_twice_are_once(urza: Urza) -> None:
    first = urza.put(compiled())
    assert urza.put(compiled()) == first
    judged = urza.judge(verdict())
    assert urza.judge(verdict()) == judged
    assert urza.put(compiled()) == judged
    assert len(list(urza.ledger.entries())) == 2
    assert len(urza.core.tree.refs()) == 1


def test_a_kernel_is_offered_where_it_can_be_loaded(urza: Urza) -> None:
    for name, made_for in (("k1", "a" * 64), ("k2", "b" * 64), ("k3", "")):
        validated(urza, name, fingerprint=made_for)
    assert urza.of_spec(spec()) == ["k1", "k2", "k3"]
    assert urza.of_spec(spec(), "a" * 64) == ["k1", "k3"]
    assert urza.of_spec(spec(), "c" * 64) == ["k3"]


def test_a_kernel_with_a_damaged_record_is_given_up_for_good_and_told_of(urza: Urza, tmp_path: Path) -> None:
    heard: list[SecurityAlert] = []
    validated(urza, "k1")
    validated(urza, "k2")
    with opened(tmp_path, on_alert=heard.append) as other:
        assert other.of_spec(spec()) == ["k1", "k2"]
        assert other.give_up_damaged("k1") == other.give_up_damaged("unknown") == ""
        execute(tmp_path / "store/records/cache.db", "UPDATE Cache SET value = x'00' WHERE key = 'kernel/k1'")
        (finding,) = other.check()
        assert other.give_up_damaged("k1") == finding.problem
        assert [alert.detail for alert in heard] == [f"BadHash: {finding.problem}"]
        assert heard == urza.alerts() and not urza.has("k1")
        assert other.of_spec(spec()) == urza.of_spec(spec()) == ["k2"]
        assert other.give_up_damaged("k1") == "" and other.check() == []
    serial = urza.core.records.number("mark/k1/tezzeret")
    urza.put(compiled("k1"))
    assert urza.manifest("k1").serial > serial, "an older statement could be shown again"


def test_a_rejection_has_a_reason_and_is_not_offered(urza: Urza) -> None:
    urza.submit(blueprint())
    urza.put(compiled())
    with pytest.raises(StoreError, match="passed, or has a reason"):
        urza.judge(verdict(passed=False))
    assert urza.judge(verdict(passed=False), "wrong gradient of w1").status is S.REJECTED
    assert urza.reason("k1") == "wrong gradient of w1"
    assert urza.find(KernelQuery()).matching_kernels == ()
    assert urza.blueprint(blueprint().id).status is S.REJECTED


def test_a_kernel_that_faulted_is_withdrawn(urza: Urza) -> None:
    validated(urza)
    assert urza.find(KernelQuery()).matching_kernels == ("k1",)
    urza.reject("k1", "NaN at step 1000")
    assert urza.find(KernelQuery()).matching_kernels == ()
    with pytest.raises(StoreError, match="REJECTED"):
        urza.verified("k1")


def test_recompilation_replaces_the_files_and_needs_a_new_verdict(urza: Urza) -> None:
    validated(urza)
    before = urza.verified("k1")
    urza.set_kernel("k1", S.COMPILING, detail="outdated toolchain")
    urza.put(compiled(files={"fw.so": b"new"}))
    with pytest.raises(StoreError, match="only VALIDATED"):
        urza.verified("k1")
    urza.judge(verdict(report_timestamp=2.0))
    after = urza.verified("k1")
    assert after.folder != before.folder
    assert after.manifest.serial > before.manifest.serial
    assert after.attestation.serial > before.attestation.serial


def test_statuses_follow_the_table(urza: Urza) -> None:
    urza.put(compiled())
    with pytest.raises(IllegalTransition, match="ARCHIVED is not allowed in state PENDING_BENCHMARKING"):
        urza.set_kernel("k1", S.ARCHIVED)
    with pytest.raises(StoreError, match="signed verdict only"):
        urza.set_kernel("k1", S.VALIDATED)
    urza.judge(verdict())
    with pytest.raises(IllegalTransition):
        urza.judge(verdict(report_timestamp=2.0))


def test_blueprints_are_versioned_and_hashed(urza: Urza) -> None:
    first = urza.submit(blueprint())
    assert urza.submit(blueprint()) == first
    with pytest.raises(BadHash):
        urza.submit(blueprint().model_copy(update={"id": "0" * 64}))
    other = blueprint("BP-B").model_copy(update={"name": "BP-A"})
    with pytest.raises(StoreError, match="new version"):
        urza.submit(other)
    with pytest.raises(StoreError, match="not in the store"):
        urza.submit(blueprint("BP-C", parents=("0" * 64,)))
    urza.submit(blueprint("BP-C", parents=(first.id,)))
    assert urza.lineage.ancestors(blueprint("BP-C").id) == {first.id}


def test_a_blueprint_is_valid_only_with_a_valid_kernel(urza: Urza) -> None:
    urza.submit(blueprint())
    urza.set_blueprint(blueprint().id, S.COMPILING, interest={"karn": 0.9})
    with pytest.raises(IllegalTransition):
        urza.set_blueprint(blueprint().id, S.ARCHIVED)
    urza.set_blueprint(blueprint().id, S.PENDING_BENCHMARKING)
    with pytest.raises(StoreError, match="no VALIDATED kernel"):
        urza.set_blueprint(blueprint().id, S.VALIDATED)
    assert urza.blueprint(blueprint().id).interest_scores == {"karn": 0.9}


@pytest.mark.parametrize("name", ["../evil.so", "/tmp/evil.so", "a/b.so", "..", "", ".hidden", "fw.so\x00", "x" * 201])
def test_names_that_leave_the_folder_are_refused(urza: Urza, name: str) -> None:
    with pytest.raises(UnsafePath):
        urza.put(compiled(files={name: b"evil"}))
    assert urza.core.tree.refs() == []


def test_files_that_differ_from_the_manifest_are_refused(urza: Urza) -> None:
    honest = compiled()
    for files in ({**FILES, "fw.so": b"other"}, {"fw.so": FILES["fw.so"]}, {**FILES, "extra.so": b""}):
        with pytest.raises(BadHash):
            urza.put(CompiledKernel(manifest=honest.manifest, files=files, record=honest.record))
    assert len(urza.alerts()) == 3


def test_other_processes_see_what_was_written(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as two:
        assert two.find(KernelQuery()).matching_kernels == ()
        validated(one, "k1")
        assert two.find(KernelQuery()).matching_kernels == ("k1",)
        validated(two, "k2")
        assert one.find(KernelQuery()).matching_kernels == ("k1", "k2")
        one.reject("k1", "fault")
        assert two.find(KernelQuery()).matching_kernels == ("k2",)


def test_a_kernel_id_cannot_leave_a_folder_either(urza: Urza) -> None:
    with pytest.raises(UnsafePath):
        urza.put(compiled("../k1"))


def test_field_reports_feed_the_interest_of_kernel_and_blueprint(urza: Urza) -> None:
    urza.submit(blueprint())
    validated(urza)
    site = SiteInfo(module_path="a", module_type="Linear", layout="btd", width=64, input_width=64, depth=0.5)
    stayed = FieldReport(
        run_id="r",
        blueprint_id="BP-A",
        kernel_artifact_id="k1",
        seed_id="a#0.0",
        site=site,
        outcome=SeedState.FOSSILIZED,
        reason=Reason.GATE_PASSED,
    )
    culled = stayed.model_copy(update={"outcome": SeedState.CULLED, "reason": Reason.GATE_FAILED})
    urza.report(stayed)
    assert urza.kernel("k1").interest_scores == urza.blueprint(blueprint().id).interest_scores == {"field": 0.6}
    urza.report(culled)
    assert urza.kernel("k1").interest_scores == {"field": 0.48}
    urza.interest("k1", "karn", 0.9)
    assert urza.find(KernelQuery()).ranked[0].why.endswith("interest 0.90")
    with pytest.raises(StoreError, match="from 0 to 1"):
        urza.interest("k1", "karn", 1.1)
    with pytest.raises(StoreError, match="from 0 to 1"):
        urza.set_blueprint(blueprint().id, interest={"karn": float("nan")})


def test_threads_share_a_store(urza: Urza) -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(5):
                validated(urza, f"{name}-{number}")
                assert f"{name}-{number}" in urza.find(KernelQuery()).matching_kernels
                urza.verified(f"{name}-{number}")
            urza.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    assert len(urza.find(KernelQuery()).matching_kernels) == 15
    assert urza.check() == []
