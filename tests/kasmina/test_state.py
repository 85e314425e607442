import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.state import SeedArrays
from esper.leyline.errors import StateCorruption
from esper.leyline.states import SEED_STATE_CODES, SeedState


@given(st.lists(st.sampled_from(SeedState), min_size=1, max_size=12))
def test_states_come_back(states):
    arrays = SeedArrays()
    assert arrays.add_rows(len(states)) == 0
    for row, state in enumerate(states):
        arrays.set_state(row, state)
    assert [arrays.state(row) for row in range(len(arrays))] == states
    assert arrays.host("lifecycle").tolist() == [SEED_STATE_CODES[state] for state in states]
    assert arrays.add_row() == len(states)
    assert arrays.state(len(states)) is SeedState.DORMANT


@given(
    rows=st.integers(1, 6),
    column=st.sampled_from(["lifecycle", "kernel_hash", "alpha", "last_epoch", "latency_ms"]),
    data=st.data(),
)
def test_any_change_breaks_the_seal(rows, column, data):
    arrays = SeedArrays()
    arrays.add_rows(rows)
    arrays.verify()
    arrays.seal()
    arrays.verify()
    arrays.columns[column][data.draw(st.integers(0, rows - 1))] += 1
    with pytest.raises(StateCorruption, match="restore from a checkpoint"):
        arrays.verify()
    arrays.seal()
    arrays.verify()


def test_rows_that_appear_break_the_seal():
    arrays = SeedArrays()
    arrays.seal()
    arrays.add_row()
    with pytest.raises(StateCorruption):
        arrays.verify()


def test_types_and_reset():
    arrays = SeedArrays()
    arrays.add_rows(3)
    kinds = {name: arrays.host(name).dtype for name in arrays.columns}
    assert kinds == {
        "lifecycle": np.uint8,
        "kernel_hash": np.int64,
        "alpha": np.float32,
        "last_epoch": np.int32,
        "latency_ms": np.float32,
    }
    arrays.set_state(1, SeedState.GRAFTING)
    arrays.columns["alpha"][1] = 0.5
    arrays.reset(2)
    assert len(arrays) == 2
    assert not any(column.any() for column in arrays.columns.values())
