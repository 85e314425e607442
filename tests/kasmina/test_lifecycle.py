import pytest

from esper.kasmina.config import KasminaConfig
from esper.kasmina.lifecycle import stage_complete
from esper.kasmina.record import SeedRecord
from esper.leyline.states import SeedState as S

CONFIG = KasminaConfig(training_steps=3, stabilization_steps=4, fine_tuning_steps=5)


def complete(state, steps=0, alpha=0.0, kernel_ready=False, embargo=0):
    record = SeedRecord(
        seed_id="a#0.0", blueprint="B", ir={}, reads="output", dims={}, strategy="s", init_seed=0, embargo=embargo
    )
    record.enter(state, 0)
    for _ in range(steps):
        record.tick()
    return stage_complete(record, CONFIG, alpha, kernel_ready)


@pytest.mark.parametrize(
    ("state", "steps"),
    [(S.GERMINATED, 0), (S.TRAINING, 3), (S.STABILIZATION, 4), (S.EVALUATING, 0), (S.FINE_TUNING, 5), (S.CANCELLED, 0)],
)
def test_stages_last_their_steps(state, steps):
    assert complete(state, steps)
    assert complete(state, steps + 1)
    assert steps == 0 or not complete(state, steps - 1)


def test_stages_that_end_otherwise():
    assert [complete(S.LOADING, 9, kernel_ready=ready) for ready in (False, True)] == [False, True]
    assert [complete(S.GRAFTING, 99, alpha=alpha) for alpha in (0.0, 0.999, 1.0)] == [False, False, True]
    assert [complete(S.CULLED, steps, embargo=2) for steps in (0, 1, 2)] == [False, False, True]


@pytest.mark.parametrize("state", [S.DORMANT, S.FOSSILIZED, S.ROLLED_BACK])
def test_states_that_wait_for_nothing_are_never_complete(state):
    assert not complete(state, 10**4, alpha=1.0, kernel_ready=True)
