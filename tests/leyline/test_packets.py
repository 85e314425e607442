"""Columns: arrays survive, rows line up, and what does not is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from esper.leyline import (
    Array,
    ContractError,
    Counterfactual,
    EdgeKind,
    Edges,
    HealthMap,
    SeedState,
    SeedSummary,
    SeedTable,
    SystemStatePacket,
    decode,
    encode,
)

DTYPES = ("bool", "uint8", "int32", "int64", "float32", "float64")
arrays = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4)))


@given(arrays)
def test_array_keeps_every_bit(values: np.ndarray) -> None:
    """Type, shape and bytes come back, NaN payloads included."""
    back = Array.of(values).numpy()
    assert (back.dtype, back.shape, back.tobytes()) == (values.dtype, values.shape, values.tobytes())


@given(arrays)
def test_array_of_a_view_is_in_c_order(values: np.ndarray) -> None:
    """A transposed view arrives as it looks, not as it lies in memory."""
    np.testing.assert_array_equal(Array.of(values.T).numpy(), values.T)


def test_array_is_little_endian_and_read_only() -> None:
    """The bytes do not depend on the machine, and nobody can change a frozen message through a view."""
    array = Array.of(np.array([1], dtype=">i4"))
    assert array.data == b"\x01\x00\x00\x00"
    with pytest.raises(ValueError, match="read-only"):
        array.numpy()[0] = 2


@pytest.mark.parametrize("values", [["text"], [1j], np.zeros(1, "float16"), [object()]])
def test_array_refuses_other_types(values: object) -> None:
    """What may not travel is named."""
    with pytest.raises(ContractError, match="do not travel"):
        Array.of(values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "size"),
    [((2,), 4), ((), 8), ((-1,), 4), ((-1, -1), 4), ((1, 1, 1, 1, 1), 4), ((2**40, 0), 0), ((0, 2**62, 2**62), 0)],
)
def test_array_refuses_a_shape_that_lies(shape: tuple[int, ...], size: int) -> None:
    """Shape and buffer must agree, and stay within what numpy can hold."""
    with pytest.raises(ValidationError):
        Array(dtype="float32", shape=shape, data=bytes(size))


def test_array_refuses_unknown_dtypes() -> None:
    """Only the listed element types may be named; `object` above all not."""
    with pytest.raises(ValidationError):
        Array(dtype="object", shape=(1,), data=bytes(8))  # type: ignore[arg-type]


def test_left_out_columns_are_those_of_dormant_seeds() -> None:
    """A table of ids alone is a table of dormant seeds."""
    table = SeedTable.of(["a#0.0", "a#1.0"])
    assert list(table.rows()) == [SeedSummary(seed, SeedState.DORMANT, 0.0, 0, -1, False) for seed in table.seed_ids]


@pytest.mark.parametrize(
    "columns",
    [{"state": [0]}, {"alpha": [0.0, 0.0, 0.0]}, {"state": [0, 12]}, {"ready": [[0, 0]]}],
    ids=["short", "long", "no such state", "two axes"],
)
def test_table_refuses_columns_that_do_not_fit(columns: dict[str, list[float]]) -> None:
    """Each column has one valid entry per seed."""
    with pytest.raises(ValidationError):
        SeedTable.of(["a#0.0", "a#1.0"], **columns)  # type: ignore[arg-type]


def test_table_refuses_repeated_seeds_and_other_types() -> None:
    """Each seed has one row, each column its one type."""
    with pytest.raises(ValidationError, match="repeat"):
        SeedTable.of(["a#0.0", "a#0.0"])
    table = SeedTable.of(["a#0.0"])
    with pytest.raises(ValidationError, match=r"alpha must be float32\[1\]"):
        SeedTable(**{**dict(table), "alpha": Array.of([0.0], "float64")})


def test_health_map_names_what_it_has() -> None:
    """A column is found by name; one that was not sampled is an error that lists the others."""
    health = HealthMap.of(chunk_mean=[1, 2], custom=[0, np.nan])
    assert health.column("chunk_mean").dtype == np.float32
    with pytest.raises(ContractError, match=r"'entropy'; this packet has: chunk_mean, custom\."):
        health.column("entropy")
    with pytest.raises(ContractError, match="nothing was sampled"):
        HealthMap().column("entropy")
    with pytest.raises(ValidationError):
        HealthMap.of(chunk_mean=[1, 2], custom=[0])


def test_packet_answers_by_seed(packet: SystemStatePacket) -> None:
    """State, rows, edges and accuracy are readable without knowing the columns."""
    assert packet.state_of("blocks.0.mlp#0.1") is SeedState.EVALUATING
    assert [row.state for row in packet.rows()] == [SeedState.GRAFTING, SeedState.EVALUATING, SeedState.DORMANT]
    assert packet.validation_accuracy == 0.5
    assert list(packet.named_edges()) == [
        ("blocks.0.mlp", "blocks.0.mlp#0.0", EdgeKind.CONTAINS),
        ("blocks.0.mlp", "blocks.1.mlp", EdgeKind.LAYER_FORWARD),
        ("blocks.0.mlp#0.0", "blocks.0.mlp#0.1", EdgeKind.SEQUENTIAL),
    ]
    with pytest.raises(ContractError, match="No seed 'nowhere#0.0' in this packet of 3 seeds"):
        packet.state_of("nowhere#0.0")


def test_reading_a_packet_does_not_change_it(packet: SystemStatePacket) -> None:
    """The cached index is no part of the message: not of its bytes, not of its identity."""
    fresh = decode(SystemStatePacket, encode(packet))
    packet.state_of("blocks.0.mlp#0.1")
    assert fresh == packet
    assert encode(packet) == encode(fresh)


@pytest.mark.parametrize(
    "change",
    [
        {"health_map": HealthMap.of(chunk_mean=[1.0])},
        {"site_health": HealthMap.of(chunk_mean=[1.0])},
        {"memory_pressure": {"cpu": 1.5}},
        {"edges": Edges.of(["a"], [(0, 4, EdgeKind.CONTAINS)])},
        {"edges": Edges.of(["a"], [(-1, 0, EdgeKind.CONTAINS)])},
        {"evidence": {"nowhere#0.0": Counterfactual(mean=0, lower=0, upper=0, n=1)}},
        {"current_epoch": -1},
        {"unknown": 1},
    ],
    ids=[
        "health rows",
        "site rows",
        "pressure",
        "edge target",
        "edge source",
        "evidence",
        "negative epoch",
        "unknown field",
    ],
)
def test_packet_refuses_parts_that_do_not_belong(packet: SystemStatePacket, change: dict[str, object]) -> None:
    """Telemetry, edges and evidence must be about the packet's own seeds."""
    with pytest.raises(ValidationError):
        SystemStatePacket(**{**dict(packet), **change})  # type: ignore[arg-type]


def test_edges_refuse_unknown_kinds() -> None:
    """A code that names no kind is refused, and so are columns of different lengths."""
    one = {"src": Array.of([0], "int32"), "dst": Array.of([0], "int32")}
    with pytest.raises(ValidationError, match="names no kind"):
        Edges(**one, kind=Array.of([4], "uint8"))
    with pytest.raises(ValidationError, match="src must be"):
        Edges(**one, kind=Array.of([0, 0], "uint8"))


def test_ten_thousand_seeds_travel() -> None:
    """A large packet comes back whole, in about the size of its columns."""
    rng = np.random.default_rng(0)
    ids = [f"layer{row}#0.0" for row in range(10_000)]
    table = SeedTable.of(ids, state=rng.integers(0, 12, 10_000), alpha=rng.random(10_000))
    data = encode(SystemStatePacket(run_id="r", current_epoch=0, global_step=0, seed_states=table))
    back = decode(SystemStatePacket, data).seed_states
    assert back == table
    assert len(data) < sum(len(seed) + 1 for seed in ids) + 10_000 * 18 + 1_000
