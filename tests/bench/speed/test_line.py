"""Whether a target is met, and how a number is told."""

import pytest

from esper.bench.speed.line import Line, Verdict, not_measured, short


@pytest.mark.parametrize(
    ("value", "target", "at_least", "verdict"),
    [
        (1.0, 2.0, False, Verdict.MET),
        (2.0, 2.0, False, Verdict.MET),
        (2.001, 2.0, False, Verdict.MISSED),
        (99.5, 99.5, True, Verdict.MET),
        (99.4, 99.5, True, Verdict.MISSED),
        (0.0, 0.0, False, Verdict.MET),
        (1.0, 0.0, False, Verdict.MISSED),
        (5.0, None, False, Verdict.NONE),
        (None, 5.0, False, Verdict.NOT_MEASURED),
        (float("nan"), 5.0, False, Verdict.MISSED),
    ],
)
def test_a_target_is_met_or_not(value: float | None, target: float | None, at_least: bool, verdict: Verdict) -> None:
    assert Line(what="w", value=value, unit="ms", target=target, at_least=at_least).verdict is verdict


def test_what_is_not_measured_says_why_and_keeps_its_target() -> None:
    line = not_measured("compile", "s", 20.0, "give --compile")
    assert line.plain()["verdict"] == "not measured" and line.why == "give --compile" and line.bound() == "at most 20 s"


@pytest.mark.parametrize(("value", "told"), [(1234.5, "1,234"), (-0.0646, "-0.0646"), (99.95, "100"), (1e-4, "0.0001")])
def test_numbers_have_three_digits(value: float, told: str) -> None:
    assert short(value) == told
