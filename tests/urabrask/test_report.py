"""Verdict, risk, score and tags: what is made of findings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.codec import decode, encode
from esper.leyline.events import Rejection
from esper.leyline.kernels import UrabraskValidationReport
from esper.urabrask import risk, wep
from esper.urabrask.findings import Failure, Findings
from esper.urabrask.limits import GAIN
from esper.urabrask.report import verdict
from esper.urabrask.tags import ENOUGH, Standing, peers_of, tags
from tests.urabrask.findings import HERE, findings, measured
from tests.urabrask.kernels import spec

SPEC = spec()
SHARE = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("ratio", "spread", "rejection"),
    [
        (0.80, 0.02, None),
        (0.95, 0.02, None),
        (0.951, 0.0, Rejection.TOO_SLOW),
        (1.50, 0.02, Rejection.TOO_SLOW),
        (0.90, 0.11, Rejection.TOO_SLOW),
    ],
)
def test_only_what_is_faster_beyond_the_spread_is_promoted(
    ratio: float, spread: float, rejection: Rejection | None
) -> None:
    judged = verdict(findings(ratio, spread), SPEC)
    assert judged.rejection is rejection
    assert judged.report.passed_validation is (rejection is None)
    assert (f"{ratio:.3f}" in judged.detail) is (rejection is not None)


@given(st.floats(0.01, 3.0), st.floats(0.0, 1.0), st.floats(0.0, 0.99))
def test_a_promotion_is_always_worth_it(ratio: float, spread: float, margin: float) -> None:
    judged = verdict(findings(ratio, spread, margin=margin), SPEC)
    if judged.rejection is None:
        assert 1.0 - ratio >= GAIN - 1e-12 and 1.0 - ratio > spread
        assert judged.report.risk_score <= risk.LIMIT
    assert 0.0 <= judged.interest <= 1.0
    assert decode(UrabraskValidationReport, encode(judged.report)) == judged.report


def test_an_eager_kernel_need_not_be_faster_than_itself() -> None:
    assert verdict(findings(1.0, pipeline="fast", library_mb=0.0), SPEC).rejection is None


def test_the_first_failure_is_the_reason() -> None:
    failures = (
        Failure(check="batches", detail="it is off", rejection=Rejection.GRADIENT_MISMATCH),
        Failure(check="memory", detail="it leaks"),
    )
    judged = verdict(findings(failures=failures, measured=None), SPEC)
    assert judged.rejection is Rejection.GRADIENT_MISMATCH
    assert "it is off" in judged.detail and "1 more" in judged.detail
    assert (judged.report.risk_score, judged.report.conf_level, judged.interest) == (1.0, 1.0, 0.0)


def test_a_kernel_that_was_not_measured_does_not_pass() -> None:
    assert verdict(findings(measured=None), SPEC).rejection is Rejection.SANITY_FAILED


def test_a_kernel_of_much_risk_is_rejected() -> None:
    wild = measured(0.3, 0.25, forward_ms_p99=9.0, drift=1e-3)
    judged = verdict(findings(measured=wild, margin=1.0, nodes=64), SPEC)
    assert judged.rejection is Rejection.TOO_RISKY


def test_noise_lowers_confidence_and_is_said() -> None:
    calm, noisy = verdict(findings(0.5, 0.01), SPEC).report, verdict(findings(0.5, 0.20), SPEC).report
    assert calm.conf_level > noisy.conf_level > 0.0
    assert "noisy" in noisy.generated_tags and "noisy" not in calm.generated_tags
    assert noisy.baseline_comparison["spread.ratio"] == 0.20


def test_the_features_are_in_the_report() -> None:
    found = verdict(findings(), SPEC).report.baseline_comparison
    assert {f"risk.{name}" for name in risk.WEIGHTS} <= found.keys()
    again = {name: found[f"risk.{name}"] for name in risk.WEIGHTS}
    assert risk.risk(again) == verdict(findings(), SPEC).report.risk_score


@given(st.fixed_dictionaries(dict.fromkeys(risk.WEIGHTS, SHARE)), st.sampled_from(sorted(risk.WEIGHTS)))
def test_risk_grows_with_every_feature(found: dict[str, float], name: str) -> None:
    assert 0.0 <= risk.risk(found) <= risk.risk({**found, name: 1.0}) <= 1.0


@given(st.fixed_dictionaries(dict.fromkeys(wep.TRAINING, st.floats(0.01, 10.0))))
def test_a_smaller_ratio_scores_more(found: dict[str, float]) -> None:
    better = {name: ratio / 2 for name, ratio in found.items()}
    assert 0.0 < wep.score(found) <= wep.score(better) < 1.0


def tags_of(found: Findings, peers: list[Standing]) -> set[str]:
    return set(tags(found, "btd", "float32", peers))


def test_tags_are_by_rule_until_there_are_enough_peers() -> None:
    slow = [Standing(0.99, 1.0, 1e-6)] * (ENOUGH - 1)
    found = tags_of(findings(0.7), slow)
    assert {"provisional", "fast-p50", "fast-p75", "compiled", "standard", "btd", "float32", "cpu"} <= found
    assert "fast-p90" not in found


def test_tags_are_percentiles_then() -> None:
    peers = [Standing(0.5 + number / 100, 1.0, 1e-6) for number in range(50)]
    found = tags_of(findings(0.535), peers)
    assert "provisional" not in found
    assert "fast-p90" in found and "fast-p99" not in found
    assert tags_of(findings(0.49), peers) >= {"fast-p50", "fast-p75", "fast-p90", "fast-p99"}
    assert not [tag for tag in tags_of(findings(0.93), peers) if tag.startswith("fast-p")]


@given(st.lists(st.floats(0.1, 2.0), min_size=ENOUGH, max_size=60), st.floats(0.1, 2.0))
def test_a_percentile_is_what_it_says(others: list[float], own: float) -> None:
    found = tags_of(findings(own), [Standing(other, 1.0, 1e-6) for other in others])
    worse = sum(other > own for other in others) / len(others)
    for percentile in (50, 75, 90, 99):
        assert (f"fast-p{percentile}" in found) is (worse >= percentile / 100 - 1e-12)


def test_peers_ran_on_the_same_hardware_and_passed() -> None:
    good = verdict(findings(0.6), SPEC).report
    bad = verdict(findings(1.2), SPEC).report
    elsewhere = verdict(findings(0.6, hardware=HERE.model_copy(update={"device_name": "Other"})), SPEC).report
    eager = verdict(findings(1.0, pipeline="fast", library_mb=0.0), SPEC).report
    assert [peer.fast for peer in peers_of([good, bad, elsewhere, eager], HERE)] == [0.6]
