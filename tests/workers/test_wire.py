import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import ContractError
from esper.workers import wire

VERBS = [
    wire.HELLO,
    wire.BEAT,
    wire.DONE,
    wire.FAILED,
    wire.UNFIT,
    wire.WELCOME,
    wire.HEARD,
    wire.JOB,
    wire.WHO,
    wire.STOP,
]


def test_what_is_packed_is_unpacked() -> None:
    fields = {"id": "1", "key": "k", "kind": "t", "payload": b"\0" * 9, "attempt": 2}
    assert wire.unpack(wire.pack(wire.JOB, **fields)) == (wire.JOB, fields)


@given(st.lists(st.binary(max_size=60), max_size=4), st.sampled_from(VERBS))
def test_any_bytes_are_a_message_or_an_error_of_ours(frames: list[bytes], verb: bytes) -> None:
    for given_frames in (frames, [wire.VERSION, *frames], [wire.VERSION, verb, b"".join(frames)]):
        with contextlib.suppress(ContractError):
            wire.unpack(given_frames)


@pytest.mark.parametrize(
    "fields",
    [
        {"job": 1, "result": b"", "cpu": 0.0},
        {"job": "a", "result": "text", "cpu": 0.0},
        {"job": "a", "result": b"", "cpu": float("nan")},
        {"job": "a", "result": b"", "cpu": True},
        {"job": "a" * 30_000, "result": b"", "cpu": 0.0},
        {"job": "a", "result": b""},
        {"job": "a", "result": b"", "cpu": 0.0, "more": 1},
    ],
)
def test_a_field_out_of_place_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ContractError):
        wire.unpack(wire.pack(wire.DONE, **fields))
