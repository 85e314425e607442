"""The contract of one operation of a blueprint's graph."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from esper.blueprints.expr import evaluate, names
from esper.blueprints.site import LAYOUTS, Layout
from esper.leyline.errors import BlueprintDoesNotFit, BlueprintError

MAX_WIDTH = 1 << 20
"""Widest value that a graph may hold, in features."""

Attribute = bool | int | float | str
"""Plain data that a node may carry."""


class _Formula:
    """Marks an integer attribute that a blueprint may also write as a formula."""


Size = Annotated[int, Field(ge=1, le=MAX_WIDTH), _Formula()]
"""A number of features: an integer, or in the blueprint a formula over its sizes."""


class Value(NamedTuple):
    """Shape of one value of the graph, for one sample.

    Args:
        layout: order of its axes.
        width: length of the feature axis.
        tokens: product of the lengths of the other axes.
    """

    layout: Layout
    width: int
    tokens: int


class Op(BaseModel):
    """One operation; its fields are the attributes of the node, with their defaults.

    A subclass says what it makes of the shapes (`infer`), what it costs (`params`, `macs`), which module
    computes it (`build`) and how its parameters start (`reset`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ARITY: ClassVar[int] = 1
    """Number of inputs."""
    LAYOUTS: ClassVar[tuple[Layout, ...]] = LAYOUTS
    """Layouts that the operation knows."""
    AFFINE: ClassVar[bool] = False
    """Whether the result is an affine function of the input, the same for every token."""
    PARAMETRIC: ClassVar[bool] = False
    """Whether the operation learns."""
    MIXES_TOKENS: ClassVar[bool] = False
    """Whether a token's result depends on other tokens."""
    REQUIRES: ClassVar[tuple[str, ...]] = ()
    """What the machine must offer, from `esper.blueprints.capabilities`."""
    SILENT: ClassVar[bool] = False
    """Whether the result is zero, whatever is read."""
    IDENTITY: ClassVar[bool] = False
    """Whether the result equals the input and only its gradient differs."""

    def infer(self, inputs: Sequence[Value]) -> Value:
        """Return the shape of the result; by default that of the first input.

        Raises:
            BlueprintDoesNotFit: the shapes cannot be taken.
        """
        return inputs[0]

    @abstractmethod
    def build(self, inputs: Sequence[Value], device: str) -> nn.Module:
        """Return the module that computes the operation, its parameters not yet initialised."""

    def params(self, inputs: Sequence[Value]) -> int:
        """Return the exact number of parameters."""
        return 0

    def macs(self, inputs: Sequence[Value]) -> int:
        """Return the multiply-accumulates of matrix products and convolutions for one sample."""
        return 0

    def scratch(self, inputs: Sequence[Value]) -> int:
        """Return how many numbers are made on the way to the result of one sample, e.g. attention scores."""
        return 0

    def reset(self, module: nn.Module, generator: torch.Generator) -> None:
        """Initialise the parameters of `module`, which `build` made, from `generator` alone."""

    @classmethod
    def formulas(cls, attrs: Mapping[str, Attribute]) -> dict[str, str]:
        """Return the attributes that hold formulas."""
        return {
            name: value
            for name, value in attrs.items()
            if isinstance(value, str) and name in cls.model_fields and _is_size(cls, name)
        }

    @classmethod
    def check(cls, attrs: Mapping[str, Attribute], symbols: frozenset[str]) -> None:
        """Check attributes before any size is known.

        Raises:
            BlueprintError: an unknown or malformed attribute, or a formula over unknown names.
        """
        formulas = cls.formulas(attrs)
        for text in formulas.values():
            check_names(text, symbols)
        cls.of(dict(attrs) | dict.fromkeys(formulas, 1), {})

    @classmethod
    def of(cls, attrs: Mapping[str, Attribute], symbols: Mapping[str, int]) -> "Op":
        """Return the operation with every formula replaced by its value.

        Raises:
            BlueprintError: an attribute is unknown, missing, of the wrong type or out of range.
        """
        sizes = {name: evaluate(text, symbols) for name, text in cls.formulas(attrs).items()}
        try:
            return cls.model_validate(dict(attrs) | sizes)
        except ValidationError as error:
            raise BlueprintError(f"{explain(error)}; attributes: {', '.join(cls.model_fields) or 'none'}") from None


def _is_size(op: type[Op], name: str) -> bool:
    return any(isinstance(mark, _Formula) for mark in op.model_fields[name].metadata)


def check_names(text: str, symbols: frozenset[str]) -> None:
    """Check that a formula mentions known names only.

    Raises:
        BlueprintError: it is malformed or mentions others.
    """
    unknown = sorted(names(text) - symbols)
    if unknown:
        raise BlueprintError(f"formula {text!r} uses unknown name {unknown[0]!r}; known: {', '.join(sorted(symbols))}")


def explain(error: ValidationError) -> str:
    """Return what a pydantic error complains of, on one line."""
    complaints = []
    for item in error.errors(include_url=False, include_context=False):
        place = ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        complaints.append(f"{place}: {message}" if place else message)
    return "; ".join(complaints)


def same_width(inputs: Sequence[Value]) -> Value:
    """Return the common shape of several inputs; one feature, or one position, is stretched over the others.

    Raises:
        BlueprintDoesNotFit: two inputs differ in width.
    """
    widest = max(inputs, key=lambda value: value.width)
    for value in inputs:
        if value.width not in (1, widest.width):
            raise BlueprintDoesNotFit(f"its inputs are {[v.width for v in inputs]} features wide; make them equal.")
    return widest._replace(tokens=max(value.tokens for value in inputs))
