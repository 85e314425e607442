"""What comes from what: blueprints from blueprints, kernels from both, field reports from what was grafted."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import final

from esper.leyline.errors import StoreError
from esper.leyline.kernels import Blueprint, CompiledKernelArtifact
from esper.urza.field import Kept


@final
class Lineage:
    """A directed graph without cycles; nodes are ids of blueprints, kernels and field reports.

    Example:
        >>> lineage = Lineage()
        >>> lineage.add("b", ["a"])
        >>> lineage.add("c", ["b"])
        >>> sorted(lineage.ancestors("c")), sorted(lineage.descendants("a"))
        (['a', 'b'], ['b', 'c'])
    """

    def __init__(self) -> None:
        """Start empty."""
        self._parents: dict[str, set[str]] = {}
        self._children: dict[str, set[str]] = {}

    @classmethod
    def of(
        cls, blueprints: Iterable[Blueprint], kernels: Iterable[CompiledKernelArtifact], reports: Iterable[Kept] = ()
    ) -> "Lineage":
        """Return the lineage of records.

        Raises:
            StoreError: it has a cycle.
        """
        lineage, named, compiled = cls(), defaultdict[str, list[str]](list), set()
        for blueprint in blueprints:
            lineage.add(blueprint.id, blueprint.parents)
            named[blueprint.name].append(blueprint.id)
        for kernel in kernels:
            lineage.add(kernel.id, (kernel.blueprint_id, *kernel.parents))
            compiled.add(kernel.id)
        for kept in reports:
            # A run names its blueprint; the kernel of an eager graft is in no store.
            grafted = {kept.report.kernel_artifact_id} & compiled
            lineage.add(kept.id, grafted | set(named.get(kept.report.blueprint_id, ())))
        return lineage

    def add(self, child: str, parents: Iterable[str]) -> None:
        """Add a node and what it comes from.

        Raises:
            StoreError: one of its parents comes from it.
        """
        parents = set(parents)
        below = {child} | self.descendants(child)
        if below & parents:
            loop = sorted(below & parents)[0]
            raise StoreError(f"{child} cannot come from {loop}, which comes from it; name other parents.")
        self._parents.setdefault(child, set()).update(parents)
        for parent in parents:
            self._children.setdefault(parent, set()).add(child)

    def parents(self, node: str) -> set[str]:
        """Return what a node comes from directly."""
        return set(self._parents.get(node, ()))

    def ancestors(self, node: str) -> set[str]:
        """Return everything that a node comes from."""
        return _reach(self._parents, node)

    def descendants(self, node: str) -> set[str]:
        """Return everything that comes from a node."""
        return _reach(self._children, node)

    def to_json(self) -> str:
        """Return the parents of every node, as JSON with sorted keys."""
        nodes = self._parents.keys() | self._children.keys()
        return json.dumps({node: sorted(self._parents.get(node, ())) for node in sorted(nodes)})


def _reach(edges: Mapping[str, set[str]], node: str) -> set[str]:
    """Return the nodes that edges lead to, without the start."""
    found: set[str] = set()
    todo = [node]
    while todo:
        fresh = edges.get(todo.pop(), set()) - found
        found |= fresh
        todo += fresh
    return found
