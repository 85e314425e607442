"""BlueprintIR: a child network as plain data, checked on construction and named by its content."""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from esper.blueprints.expr import FUNCTIONS
from esper.blueprints.graph import MAX_NODES, Node, check_graph
from esper.blueprints.hashing import content_hash
from esper.blueprints.op import MAX_WIDTH, check_names, explain
from esper.blueprints.ops import OPS
from esper.blueprints.site import SITE_KINDS, Layout
from esper.leyline.errors import BlueprintError

Placement = Literal["output", "input"]
"""What a child reads: the host's output (serial) or its input (parallel)."""

SITE_SYMBOLS: Final = frozenset({"d", "d_in", "d_out", "tokens"})
"""Names that the site gives: `d_in` and `d` are the width read, `d_out` the width written, `tokens` the positions."""

MAX_DIMS: Final = 16
"""Most sizes that a blueprint may declare."""

_DIM_NAME = re.compile(r"[a-z][a-z0-9_]{0,15}")


class DimSpec(BaseModel):
    """One size of the graph.

    Args:
        default: value where none is chosen: a number, or a formula over the site's symbols.
            A size that is not free may also mention free sizes, and always has this value.
        min: least value.
        max: greatest value: a number, or a formula over the site's symbols.
        multiple_of: every value is a multiple of it.
        free: whether whoever plants the child may choose the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: StrictInt | StrictStr
    min: int = Field(default=1, ge=1, le=MAX_WIDTH, strict=True)
    max: StrictInt | StrictStr = 1 << 16
    multiple_of: int = Field(default=1, ge=1, le=MAX_WIDTH, strict=True)
    free: bool = Field(default=True, strict=True)


class BlueprintIR(BaseModel):
    """A child network as a graph of whitelisted operations over symbolic sizes.

    Args:
        ir_version: version of these rules.
        name: e.g. `BP-MLP-GELU`.
        version: semantic version of this blueprint, e.g. `1.0.0`.
        reads: what the child reads.
        also_reads: other placements that it permits.
        trainable: whether its parameters learn.
        mergeable: whether it folds into a linear host; then every operation is affine.
        layouts: layouts of the sites that it serves.
        site_kinds: families of sites that it serves; empty means any.
        initial: `zero_residual` returns a residual that is zero at birth and is added to the host's output;
            `identity` returns a replacement that equals the host's output at birth.
        dims: sizes by name.
        nodes: the graph.
        output: id of the node whose result is returned.

    Raises:
        pydantic.ValidationError: the graph breaks a rule; `parse_ir` turns it into a `BlueprintError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ir_version: Literal[1] = 1
    name: str = Field(pattern=r"^BP(-[A-Z0-9]+)+$", max_length=64)
    version: str = Field(default="1.0.0", pattern=r"^(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5})){2}$")
    reads: Placement = "output"
    also_reads: tuple[Placement, ...] = ()
    trainable: bool = Field(default=True, strict=True)
    mergeable: bool = Field(default=False, strict=True)
    layouts: tuple[Layout, ...] = Field(min_length=1)
    site_kinds: tuple[Annotated[str, Field(max_length=32)], ...] = ()
    initial: Literal["zero_residual", "identity"] = "zero_residual"
    dims: dict[str, DimSpec] = Field(default_factory=dict, max_length=MAX_DIMS)
    nodes: tuple[Node, ...] = Field(min_length=1, max_length=MAX_NODES)
    output: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_dims()
        check_graph(self.nodes, self.output, SITE_SYMBOLS | self.dims.keys())
        self._check_claims()
        self._check_places()
        return self

    def _check_dims(self) -> None:
        free = frozenset(name for name, spec in self.dims.items() if spec.free)
        for name, spec in self.dims.items():
            if not _DIM_NAME.fullmatch(name) or name in SITE_SYMBOLS | FUNCTIONS.keys():
                raise BlueprintError(f"size {name!r}: choose a short lower-case name other than the site's symbols.")
            if isinstance(spec.default, str):
                check_names(spec.default, SITE_SYMBOLS if spec.free else SITE_SYMBOLS | free)
            if isinstance(spec.max, str):
                check_names(spec.max, SITE_SYMBOLS)

    def _check_claims(self) -> None:
        for node in self.nodes:
            op = OPS[node.op]
            if self.mergeable and not op.AFFINE:
                raise BlueprintError(f"node {node.id!r}: op {node.op!r} is not affine, so nothing here is mergeable.")
            alien = set(self.layouts) - set(op.LAYOUTS)
            if alien:
                raise BlueprintError(f"node {node.id!r}: op {node.op!r} does not know layout {min(alien)!r}.")
        if self.trainable and not any(OPS[node.op].PARAMETRIC for node in self.nodes):
            raise BlueprintError("trainable, but no node has parameters; set trainable to false.")

    def _check_places(self) -> None:
        for field in ("layouts", "site_kinds", "also_reads"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise BlueprintError(f"{field} repeats an entry: {list(values)}.")
        if self.reads in self.also_reads:
            raise BlueprintError(f"also_reads repeats reads: {self.reads!r}.")
        if self.initial == "identity" and "input" in (self.reads, *self.also_reads):
            raise BlueprintError("a child that starts as identity replaces the host's output, so it must read it.")
        unknown = set(self.site_kinds) - set(SITE_KINDS)
        if unknown:
            raise BlueprintError(f"unknown site kind {min(unknown)!r}; known: {', '.join(SITE_KINDS)}.")

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical JSON: equal content, equal id."""
        return content_hash(self.model_dump(mode="json"))

    @property
    def full_name(self) -> str:
        """Name and version, e.g. `BP-MLP-GELU@1.0.0`."""
        return f"{self.name}@{self.version}"

    @property
    def requires(self) -> tuple[str, ...]:
        """What the machine must offer, from `esper.blueprints.capabilities`."""
        return tuple(sorted({need for node in self.nodes for need in OPS[node.op].REQUIRES}))

    def __hash__(self) -> int:
        """Hash by content."""
        return hash(self.id)

    def reading(self, where: Placement) -> "BlueprintIR":
        """Return the same graph placed so that it reads `where`; its id differs, its name does not.

        Raises:
            BlueprintError: the blueprint does not permit the placement.
        """
        if where == self.reads:
            return self
        if where not in self.also_reads:
            given = " or ".join(repr(place) for place in (self.reads, *self.also_reads))
            raise BlueprintError(f"{self.full_name} cannot read {where!r}; it reads {given}.")
        others = tuple(place for place in get_args(Placement) if place != where)
        return BlueprintIR.model_validate(self.model_dump() | {"reads": where, "also_reads": others})


def parse_ir(data: object) -> BlueprintIR:
    """Return the blueprint that plain data describe.

    Args:
        data: a mapping with the fields of `BlueprintIR`, e.g. read from JSON or YAML.

    Raises:
        BlueprintError: the data break a rule; the message names the field or the node.
    """
    name = data.get("name", "blueprint") if isinstance(data, Mapping) else "blueprint"
    try:
        return BlueprintIR.model_validate(data)
    except ValidationError as error:
        raise BlueprintError(f"{str(name)[:64]}: {explain(error)}") from None
