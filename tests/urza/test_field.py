"""Field reports in the store: each once, counted by kernel, linked to what was grafted, bounded in bytes."""

import math
from pathlib import Path
from typing import Any

import pytest

from esper.leyline.codec import encode, from_json, to_json
from esper.leyline.errors import ContractError
from esper.leyline.reports import Counterfactual, FieldReport, SiteInfo
from esper.leyline.states import Reason, SeedState
from esper.urza import Urza
from esper.urza.field import LARGEST, FieldReports, Outcomes, report_id
from esper.urza.records import Records
from tests.urza.samples import blueprint, opened, validated

SITE = SiteInfo(module_path="a", module_type="Linear", layout="btd", width=64, input_width=64, depth=0.5)
UNMEASURED = Counterfactual(mean=0.1, lower=-math.inf, upper=math.nan, n=1)


def report(number: int = 0, kernel: str = "k1", **fields: Any) -> FieldReport:
    whole = {"outcome": SeedState.FOSSILIZED, "reason": Reason.GATE_PASSED, "counterfactual": UNMEASURED, **fields}
    return FieldReport(
        run_id="r", blueprint_id="BP-A", kernel_artifact_id=kernel, seed_id=f"a#0.{number}", site=SITE, **whole
    )


CULLED = {"outcome": SeedState.CULLED, "reason": Reason.GATE_FAILED}
FAULTED = {"outcome": SeedState.CULLED, "reason": Reason.RUNTIME_ERROR}
CANCELLED = {"outcome": SeedState.CANCELLED, "reason": Reason.USER_CANCELLED}


def test_a_report_is_kept_once_and_linked_to_its_kernel_and_blueprint(urza: Urza) -> None:
    design = urza.submit(blueprint())
    validated(urza)
    before = urza.core.records.uses.get("k1")
    assert urza.report(report())
    assert not urza.report(from_json(FieldReport, to_json(report()))), "the same report, read back, is another one"
    (kept,) = urza.reports()
    assert to_json(kept.report) == to_json(report()) and kept.received > 0
    assert urza.lineage.parents(kept.id) == {"k1", design.id}
    assert urza.lineage.descendants(design.id) == {"k1", kept.id}
    assert urza.core.records.uses.need("k1").count == (before.count if before else 0) + 1
    assert urza.outcomes("k1") == Outcomes(grafted=1, fossilized=1)
    assert urza.kernel("k1").interest_scores["field"] == urza.blueprint(design.id).interest_scores["field"] == 0.6


def test_the_order_of_its_fields_makes_no_other_report() -> None:
    one = report(stage_steps={SeedState.TRAINING: 1, SeedState.GRAFTING: 2})
    other = report(stage_steps={SeedState.GRAFTING: 2, SeedState.TRAINING: 1})
    assert report_id(one) == report_id(other) != report_id(report(1))


def test_how_grafts_ended_is_counted_by_kernel(urza: Urza) -> None:
    validated(urza)
    for number, fields in enumerate([{}, {}, CULLED, FAULTED, CANCELLED]):
        urza.report(report(number, **fields))
    assert urza.outcomes("k1") == Outcomes(grafted=5, fossilized=2, culled=1, faulted=1)
    assert str(urza.outcomes("k1")) == "5: 2 stayed, 1 culled, 1 faulted"
    assert str(urza.outcomes("k2")) == ""


def test_a_graft_that_was_called_off_says_nothing_of_its_kernel(urza: Urza) -> None:
    validated(urza)
    urza.report(report(0))
    urza.report(report(1, **CANCELLED))
    urza.report(report(2, outcome=SeedState.CULLED, reason=Reason.RUN_ENDED))
    assert urza.kernel("k1").interest_scores == {"field": 0.6}
    urza.report(report(3, **CULLED))
    assert urza.kernel("k1").interest_scores == {"field": 0.48}


def test_an_eager_graft_is_linked_to_its_blueprint_alone(urza: Urza) -> None:
    design = urza.submit(blueprint())
    urza.report(report(kernel="ab12-btd.64.64.h8-eager-00"))
    (kept,) = urza.reports()
    assert urza.lineage.parents(kept.id) == {design.id}
    assert urza.blueprint(design.id).interest_scores == {"field": 0.6}


def test_a_report_of_nothing_that_is_known_is_kept_too_and_linked_when_it_is(urza: Urza) -> None:
    assert urza.report(report())
    (kept,) = urza.reports()
    assert urza.lineage.parents(kept.id) == set() and urza.outcomes("k1") == Outcomes()
    design = urza.submit(blueprint())
    assert urza.lineage.parents(kept.id) == {design.id}


def test_a_report_that_is_too_long_is_refused_and_changes_nothing(urza: Urza) -> None:
    validated(urza)
    with pytest.raises(ContractError, match="too long"):
        urza.report(report(group="x" * LARGEST))
    assert urza.reports() == [] and urza.outcomes("k1") == Outcomes()
    assert urza.check() == []


def test_the_oldest_are_given_up_and_the_counts_stay(tmp_path: Path) -> None:
    size = len(encode(report()))
    records = Records(tmp_path)
    reports = FieldReports(records, budget=3 * size + size // 2)
    for number in range(8):
        with records.transaction():
            reports.keep(report(number), counts=True)
    kept = list(reports)
    assert [each.report.seed_id for each in kept] == ["a#0.5", "a#0.6", "a#0.7"]
    assert records.number("reports/bytes") == sum(each.size for each in kept) <= 3 * size + size // 2
    assert [reports.knows(report_id(report(number))) for number in range(8)] == [False] * 5 + [True] * 3
    assert reports.outcomes("k1").grafted == 8
    with records.transaction():
        FieldReports(records, budget=1).keep(report(9), counts=False)
    assert [each.report.seed_id for each in reports] == ["a#0.9"], "the newest must stay, whatever the budget"
    records.close()


def test_damaged_records_stop_no_report(tmp_path: Path) -> None:
    records = Records(tmp_path)
    reports = FieldReports(records, budget=2 * len(encode(report())))
    for number in range(6):
        with records.transaction():
            reports.keep(report(number), counts=True)
        if number in (damaged := {1: "report/000000000002", 4: "outcomes/k1"}):
            records._cache.set(damaged[number], b"damaged")
    kept = list(reports)
    assert [each.report.seed_id for each in kept] == ["a#0.4", "a#0.5"]
    assert records.number("reports/bytes") == sum(each.size for each in kept)
    assert reports.outcomes("k1").grafted == 1
    records.close()


def test_reports_outlive_the_process_and_are_checked(tmp_path: Path) -> None:
    with opened(tmp_path) as urza:
        urza.report(report())
    with opened(tmp_path) as urza:
        (kept,) = urza.reports()
        assert not urza.report(kept.report)
        assert urza.check() == []
        urza.core.records._cache.set("report/000000000001", b"damaged")
        assert any("damaged" in finding.problem for finding in urza.check())
