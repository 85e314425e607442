"""A small part of the fuzz campaign; `make soak` runs it whole."""

import pytest

from benchmarks.fuzz import Reader, campaign, case, readers
from esper.leyline.errors import ContractError

READERS = {reader.name: reader for reader in readers()}


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_are_read_or_refused(name: str) -> None:
    reader = READERS[name]
    for example in reader.examples:
        assert reader.read(reader.write(example))
    tally = campaign(reader, range(1000), seed=1)
    assert not tally.crashes
    assert tally.read and sum(tally.refused.values()) > tally.read


def test_a_case_depends_on_its_number_alone() -> None:
    reader = READERS["message"]
    assert [case(reader, n, 0) for n in range(50)] == [case(reader, n, 0) for n in range(50)]
    assert len({case(reader, n, 0) for n in range(50)}) > 40


def test_what_is_neither_read_nor_refused_is_told() -> None:
    def careless(data: bytes) -> object:
        if b"\x00" in data:
            raise KeyError("careless")
        raise ContractError("no")

    example = READERS["message"]
    tally = campaign(Reader("careless", example.examples, example.write, careless), range(50), seed=0)
    assert tally.crashes and tally.crashes[0].what.startswith("KeyError")
    assert tally.refused["ContractError"] + len(tally.crashes) == 50
