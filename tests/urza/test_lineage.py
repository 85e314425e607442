"""Lineage: who comes from whom, never in a circle."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import StoreError
from esper.urza.lineage import Lineage

edges = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=24)


@given(edges=edges)
def test_no_order_of_additions_makes_a_cycle(edges: list[tuple[int, int]]) -> None:
    lineage = Lineage()
    for child, parent in edges:
        try:
            lineage.add(str(child), [str(parent)])
        except StoreError:
            assert child == parent or str(parent) in lineage.descendants(str(child))
    for node in map(str, range(8)):
        assert node not in lineage.ancestors(node)
        assert all(node in lineage.descendants(ancestor) for ancestor in lineage.ancestors(node))


@given(edges=edges)
def test_the_export_is_the_graph(edges: list[tuple[int, int]]) -> None:
    lineage = Lineage()
    accepted = {(max(pair), min(pair)) for pair in edges if pair[0] != pair[1]}
    for child, parent in sorted(accepted):
        lineage.add(str(child), [str(parent)])
    exported = json.loads(lineage.to_json())
    assert {(int(child), int(parent)) for child, parents in exported.items() for parent in parents} == accepted


def test_a_refused_parent_changes_nothing() -> None:
    lineage = Lineage()
    lineage.add("b", ["a"])
    before = lineage.to_json()
    with pytest.raises(StoreError, match="cannot come from b"):
        lineage.add("a", ["b", "z"])
    assert lineage.to_json() == before
