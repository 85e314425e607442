import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.nissa.summary import RunResult, gain_scale, graft_lines, headline, number, summarize, verdict
from tests.nissa.stories import story

LOSSES = tuple(2.0 + 0.01 * (i % 7) for i in range(40))


def run(loss: float | None, samples: tuple[float, ...] | None = None, added: int = 0, **given: int) -> RunResult:
    return RunResult("t", "out", 1000, added, report_loss=loss, report_samples=samples, **given)  # type: ignore[arg-type]


def shifted(by: float, spread: float = 0.001) -> tuple[float, ...]:
    return tuple(loss + by + spread * (-1) ** i for i, loss in enumerate(LOSSES))


def test_growth_that_paid() -> None:
    found = verdict(run(1.87, shifted(-0.16), added=90), run(2.03, LOSSES))
    assert found == (
        "Growth earned its place: report loss 1.870 against 2.030 without it (7.9 % lower; paired gain .160, "
        "95 % interval .160 to .160), for 90 more parameters (+9.0 %)."
    )


def test_growth_that_did_not_pay() -> None:
    found = verdict(run(2.19, shifted(0.16), added=90), run(2.03, LOSSES))
    assert found.startswith("Growth did not pay: report loss 2.190 against 2.030 without it (7.9 % higher; ")
    assert "interval -.160 to -.160" in found


def test_a_difference_inside_its_interval_is_none() -> None:
    found = verdict(run(2.031, shifted(0.001, spread=0.2), added=90), run(2.03, LOSSES))
    assert found.startswith("No difference that the report part can tell: ")


def test_equal_runs() -> None:
    with_samples = verdict(run(2.03, LOSSES, added=90), run(2.03, LOSSES))
    assert with_samples.startswith("No difference") and "(equal; paired gain .000" in with_samples
    assert verdict(run(2.0, added=90), run(2.0)).startswith("No difference")


@pytest.mark.parametrize(("loss", "side"), [(1.9, "lower"), (2.1, "higher")])
def test_a_single_number_is_called_one(loss: float, side: str) -> None:
    found = verdict(run(loss, added=90), run(2.0))
    assert found.startswith(f"Report loss is {side} with growth, but chance is not ruled out: ")
    assert "a single number, without an interval" in found


def test_few_samples_are_called_few() -> None:
    found = verdict(run(1.9, (1.9, 1.9), added=90), run(2.0, (2.0, 2.0)))
    assert "2 report samples are too few for an interval" in found and "earned" not in found


def test_samples_that_do_not_match_give_no_interval() -> None:
    assert "a single number" in verdict(run(1.9, LOSSES, added=90), run(2.0, LOSSES[:-1]))
    assert "a single number" in verdict(run(1.9, (math.nan, *LOSSES[1:]), added=90), run(2.0, LOSSES))


@pytest.mark.parametrize(
    ("grown", "twin", "expected"),
    [
        (math.nan, 2.0, "Growth did not pay: report loss is nan with it and 2.000 without it."),
        (math.inf, 2.0, "Growth did not pay: report loss is inf with it and 2.000 without it."),
        (2.0, math.nan, "No verdict: report loss is 2.000 with growth, but nan without it."),
        (math.nan, math.nan, "No verdict: report loss is nan with growth and nan without it."),
        (None, 2.0, "No verdict: the report part was not measured in both runs."),
        (2.0, None, "No verdict: the report part was not measured in both runs."),
    ],
)
def test_losses_that_are_no_numbers(grown: float | None, twin: float | None, expected: str) -> None:
    assert verdict(run(grown, added=90), run(twin)) == expected


@pytest.mark.parametrize(
    ("by", "head"),
    [(-0.1, "Nothing was kept, yet the run came out ahead"), (0.1, "Nothing was kept, and the search did not pay")],
)
def test_nothing_kept(by: float, head: str) -> None:
    found = verdict(run(2.03 + by, shifted(by)), run(2.03, LOSSES))
    assert found.startswith(f"{head}: ") and found.endswith("and no parameter was added.")


@pytest.mark.parametrize(
    ("macs", "words"),
    [(1000, "at the same training compute"), (1100, "10.0 % more training"), (900, "10.0 % less training")],
)
def test_the_compute_is_told(macs: int, words: str) -> None:
    grown, twin = run(1.9, LOSSES, added=90, train_macs=macs), run(2.0, LOSSES, train_macs=1000)
    assert words in verdict(grown, twin)


def test_a_loss_below_zero_has_no_percentage() -> None:
    assert "(.100 lower; " in verdict(run(-1.1, added=9), run(-1.0))
    assert "less than .1 % lower" in verdict(run(1.9999, added=9), run(2.0))


def test_without_a_twin() -> None:
    grown = summarize(story(lives=3), title="t", output_dir="out")
    found = verdict(grown)
    assert found.startswith("Kept BP-MLP-GELU of 3 adaptations tried, for 500 more parameters (+50.0 %); compare=true")
    none_kept = replace(grown, grafts=tuple(x for x in grown.grafts if not x.kept), added_params=0)
    assert verdict(none_kept).startswith("Nothing was kept of 2 adaptations tried")
    assert verdict(replace(grown, grafts=())).startswith("Nothing was tried")


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.none()
samples = st.none() | st.lists(st.floats(-1e6, 1e6), max_size=12).map(tuple)


@given(numbers, numbers, samples, samples, st.sampled_from([0, 9]))
def test_a_verdict_is_one_sentence_and_never_claims_against_the_numbers(
    a: float | None, b: float | None, x: tuple[float, ...] | None, y: tuple[float, ...] | None, added: int
) -> None:
    found = verdict(run(a, x, added=added), run(b, y))
    assert found.endswith(".") and "\n" not in found
    if found.startswith("Growth earned"):
        assert x is not None and y is not None and sum(x) < sum(y)


def test_lines_and_summary() -> None:
    chronicle = story(lives=2)
    kept, lost = graft_lines(chronicle)
    assert (kept.outcome, kept.gain, kept.price, kept.born, kept.ended) == ("FOSSILIZED", 0.1, 0.005, 20, 50)
    assert (lost.outcome, lost.reason, lost.samples) == ("CULLED", "OUTCOMPETED", 32)
    result = summarize(chronicle, title="t", output_dir="o", report_loss=1.0, seconds=3.0)
    assert (result.host_params, result.added_params, result.steps) == (1000, 500, 100)
    assert result.decision_loss == 2.01 and result.grafts == (kept, lost)


def test_headlines() -> None:
    grown, twin = story(lives=3), story(lives=0)
    assert headline(grown) == "Tried 3, kept BP-MLP-GELU for 500 more parameters (+50.0 %); decision loss 2.010"
    assert headline(grown, twin).endswith("decision loss 2.010, 2.010 without growth")
    assert headline(twin) == "Nothing was tried; decision loss 2.010"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_can_be_read_back(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=0.06, abs=0.0)


def test_gains_share_their_decimals() -> None:
    scale = gain_scale(graft_lines(story(lives=2)))
    assert [number(0.1, scale), number(-0.001, scale), number(-1e-9, scale)] == [".1000", "-.0010", ".0000"]
