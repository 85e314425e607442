import json

from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.record import SeedRecord
from esper.leyline.states import SeedState


@given(st.lists(st.tuples(st.sampled_from(SeedState), st.integers(0, 9)), max_size=8))
def test_clocks(stages):
    record = SeedRecord(seed_id="a#0.0", blueprint="B", ir={}, reads="output", dims={}, strategy="s", init_seed=0)
    totals, first = {}, {}
    for epoch, (state, steps) in enumerate(stages):
        record.enter(state, epoch)
        first.setdefault(state.value, epoch)
        for _ in range(steps):
            record.tick()
            totals[state.value] = totals.get(state.value, 0) + 1
        assert record.steps_in_stage == steps
    assert record.stage_steps == totals
    assert record.stage_epochs == first


def test_a_record_is_plain_data(rig):
    rig.grow("2#0.0", SeedState.FOSSILIZED)
    (record,) = rig.bank.records.values()
    record.evidence = [0.1, 0.0, 0.2, 8.0]
    again = SeedRecord.from_plain(json.loads(json.dumps(record.to_plain())))
    assert again == record
    again.dims["h"] = 99
    assert record.dims != again.dims
