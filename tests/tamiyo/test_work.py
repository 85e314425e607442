"""The account of a run's work."""

from hypothesis import given
from hypothesis import strategies as st

from esper.tamiyo.work import Work, WorkTally

SPANS = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 32), st.integers(0, 90), st.integers(0, 90)), max_size=8)


@given(SPANS, st.integers(0, 7))
def test_every_span_is_charged_with_the_children_that_lived_in_it(spans: list[tuple[int, ...]], cut: int) -> None:
    tally, evidence, living, on_trial, total, search = WorkTally(), 0, 0, 0, 0.0, 0.0
    tally.host = 100.0
    for number, (samples, judged, kept, tried) in enumerate(spans):
        tally.add(samples, new_step=True)
        total += 3 * samples * (100 + living) + judged * (100 + living)
        search += 3 * samples * on_trial + judged * (100 + living)
        evidence, living, on_trial = evidence + judged, kept + tried, tried
        tally.close(evidence=evidence, living=living, on_trial=on_trial)
        if number == cut:  # as a resumed run does
            saved, tally = tally.state_dict(), WorkTally()
            tally.load_state_dict(saved)
    assert (tally.total, tally.search) == (total, search)
    work = tally.work(trial_steps=1, judged_on=1)
    assert work.total == total and (total == search or work.overhead == search / (total - search))


def test_nothing_is_charged_while_the_host_is_not_known() -> None:
    tally = WorkTally()
    tally.add(8, new_step=True)
    tally.close(evidence=32, living=10, on_trial=10)
    work = tally.work(trial_steps=1, judged_on=1)
    assert (work.total, work.search, work.overhead, work.known) == (0.0, 0.0, 0.0, False)


def test_accumulated_batches_make_one_step() -> None:
    tally = WorkTally()
    for new_step in (False, True, False, True):
        tally.add(4, new_step=new_step)
    assert tally.work(trial_steps=1, judged_on=1).batch == 8.0


def test_what_is_left_of_the_overhead() -> None:
    work = Work(host=100.0, batch=8.0, search=400.0)
    assert work.left(0.5, total_steps=2) == 0.5 * 3 * 8 * 100 * 2 - 400
