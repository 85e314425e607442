"""The nodes of a blueprint and the rules that make them a graph."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from torch import nn

from esper.blueprints.ops import op_named
from esper.leyline.errors import BlueprintError

INPUT: Final = "input"
"""Name by which nodes mention what the child reads."""

MAX_NODES: Final = 64
"""Largest graph, in nodes."""

RESERVED: Final = frozenset({INPUT, "ir", "site", "dims"}) | frozenset(dir(nn.Module()))
"""Names that a node may not bear: they would hide a part of the module that is built."""

FiniteFloat = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Node(BaseModel):
    """One operation and what it takes.

    Args:
        id: name of the node, and of its parameters in the child's state dict.
        op: operation, from `esper.blueprints.ops.OPS`.
        inputs: ids of other nodes, or `input`.
        attrs: the operation's attributes; a size may be a formula.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=32)
    op: str = Field(max_length=32)
    inputs: tuple[StrictStr, ...] = (INPUT,)
    attrs: dict[str, StrictBool | StrictInt | FiniteFloat | StrictStr] = Field(default_factory=dict)


def check_graph(nodes: Sequence[Node], output: str, symbols: frozenset[str]) -> None:
    """Check names, wiring and attributes of a whole graph.

    Args:
        nodes: in any order.
        output: id of the node whose result the child returns.
        symbols: names that formulas may mention.

    Raises:
        BlueprintError: it names the node at fault.
    """
    _check_names(nodes)
    for node in nodes:
        _check_node(node, symbols)
    _check_wiring(nodes, output)
    in_order(nodes)


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes so that each follows its inputs, otherwise in the order given.

    Raises:
        BlueprintError: some nodes wait for each other.
    """
    ready, waiting, ordered = {INPUT}, list(nodes), []
    while waiting:
        following = next((node for node in waiting if ready.issuperset(node.inputs)), None)
        if following is None:
            raise BlueprintError(f"nodes {', '.join(node.id for node in waiting)} form a cycle, or wait for one.")
        waiting.remove(following)
        ordered.append(following)
        ready.add(following.id)
    return ordered


def _check_names(nodes: Sequence[Node]) -> None:
    for name, count in Counter(node.id for node in nodes).items():
        if count > 1:
            raise BlueprintError(f"node {name!r} is defined {count} times; ids must differ.")
        if name in RESERVED:
            raise BlueprintError(f"node {name!r}: the name is reserved; choose another.")


def _check_node(node: Node, symbols: frozenset[str]) -> None:
    try:
        op = op_named(node.op)
        if len(node.inputs) != op.ARITY:
            raise BlueprintError(f"op {node.op!r} takes {op.ARITY} inputs, not {len(node.inputs)}.")
        op.check(node.attrs, symbols)
    except BlueprintError as error:
        raise BlueprintError(f"node {node.id!r}: {error}") from None


def _check_wiring(nodes: Sequence[Node], output: str) -> None:
    by_id = {node.id: node for node in nodes}
    for node in nodes:
        for source in node.inputs:
            if source != INPUT and source not in by_id:
                raise BlueprintError(f"node {node.id!r} takes unknown input {source!r}; known: {', '.join(by_id)}.")
    if output not in by_id:
        raise BlueprintError(f"output {output!r} is not a node; nodes: {', '.join(by_id)}.")
    idle = by_id.keys() - _reached(by_id, output)
    if idle:
        raise BlueprintError(f"node {min(idle)!r} does not lead to the output {output!r}; remove it.")


def _reached(by_id: Mapping[str, Node], output: str) -> set[str]:
    reached, todo = {INPUT}, [output]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo.extend(by_id[name].inputs)
    return reached
