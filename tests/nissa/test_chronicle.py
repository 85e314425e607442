from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.states import Reason, SeedCommand, SeedState
from esper.nissa.chronicle import Chronicle
from tests.nissa.stories import CULLED, KEPT, TO_THE_GATE, boundary, life, story


def test_a_life_has_its_stages_and_its_report() -> None:
    kept, lost = story(lives=2).lives()
    assert [stage.state.value for stage in kept.stages][-3:] == ["EVALUATING", "FINE_TUNING", "FOSSILIZED"]
    assert [(s.start, s.end) for s in kept.stages][-2:] == [(40, 50), (50, None)]
    assert kept.kept and kept.report is not None and kept.report.cost.params == 500
    assert lost.outcome is SeedState.CULLED and lost.report is not None
    assert lost.report.reason is Reason.OUTCOMPETED


def test_a_life_under_way_has_no_outcome() -> None:
    chronicle = Chronicle(run_id="r")
    for message in life(path=TO_THE_GATE):
        chronicle.hear(message)
    assert [x.outcome for x in chronicle.lives()] == [None]


def test_a_seed_may_live_twice() -> None:
    chronicle = Chronicle(run_id="r")
    release = ((SeedCommand.RELEASE, 50),)
    for message in [*life(path=(*CULLED, *release)), *life(blueprint="BP-WIDEN", born=80)]:
        chronicle.hear(message)
    first, second = chronicle.lives()
    assert (first.outcome, second.outcome) == (SeedState.CULLED, SeedState.FOSSILIZED)
    assert (first.blueprint, second.blueprint) == ("BP-MLP-GELU", "BP-WIDEN")


def test_what_a_resumed_run_tells_again_is_known_once() -> None:
    told = [boundary(10), *life(), boundary(60, added=500), boundary(60, added=500)]
    chronicle = Chronicle(run_id="r")
    for message in [*told[:-3], *told[1:]]:
        chronicle.hear(message)
    assert [m.step for m in chronicle.of(type(told[0]))] == [10, 60, 60]
    assert len(chronicle.lives()) == 1


def test_a_resume_from_the_very_start_forgets_everything() -> None:
    chronicle = story(lives=3)
    chronicle.hear(boundary(10, 5.0))
    assert chronicle.decision_losses == [(10, 5.0)] and chronicle.lives() == []


def test_losses_fall_back_to_boundaries() -> None:
    chronicle = Chronicle(run_id="r")
    chronicle.hear(boundary(10, None))
    assert chronicle.train_losses == [(10, 3.0)] and chronicle.decision_losses == []


@given(st.integers(min_value=0, max_value=5))
def test_plain_data_and_back(lives: int) -> None:
    chronicle = story(lives=lives, steps=60)
    again = Chronicle.from_plain(chronicle.to_plain())
    assert again == chronicle and again.lives() == chronicle.lives()
    for message in life("other#0.0", born=100, path=KEPT):
        again.hear(message)
    assert len(again.lives()) == lives + 1


def test_a_run_that_goes_on_after_its_end_takes_the_end_back() -> None:
    ended = list(life(path=(*TO_THE_GATE[:5], (SeedCommand.ROLL_BACK, 15))))
    goes_on = list(life(path=KEPT))
    chronicle = Chronicle(run_id="r")
    for message in [*ended, *goes_on[5:]]:
        chronicle.hear(message)
    (found,) = chronicle.lives()
    assert found.kept and found.report is not None
    assert [stage.state.value for stage in found.stages].count("ROLLED_BACK") == 0
